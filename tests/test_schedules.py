"""The schedules are DINO's, value by value."""

import math

import numpy as np
import pytest

from mte_bench.training.schedules import cosine, teacher_temperature, warmup_cosine


@pytest.mark.parametrize(("total", "warmup"), [(1000, 100), (97, 1), (50, 0), (12, 12)])
def test_warmup_then_cosine_is_the_array_of_the_reference(total, warmup):
    peak, end = 5e-4 * 1024 / 256, 1e-6
    falling = np.arange(total - warmup)
    reference = np.concatenate(
        [
            np.linspace(0, peak, warmup),
            end + 0.5 * (peak - end) * (1 + np.cos(np.pi * falling / max(len(falling), 1))),
        ]
    )
    ours = [warmup_cosine(step, total, peak, end, warmup) for step in range(total)]
    np.testing.assert_allclose(ours, reference, rtol=4e-16, atol=1e-19)  # a unit in the last place: NumPy's cosine is vectorised


def test_warmup_includes_its_end():
    assert warmup_cosine(0, 100, 1.0, 0.0, 10) == 0.0
    assert warmup_cosine(9, 100, 1.0, 0.0, 10) == warmup_cosine(10, 100, 1.0, 0.0, 10) == 1.0
    assert warmup_cosine(1, 100, 1.0, 0.0, 10) == 1 / 9
    assert warmup_cosine(11, 100, 1.0, 0.0, 10) == 0.5 * (1 + math.cos(math.pi / 90))


def test_a_run_shorter_than_its_warmup_ends_on_the_line():
    assert [warmup_cosine(step, 2, 9.0, 0.0, 10) for step in range(2)] == [0.0, 1.0]


def test_cosine_of_weight_decay_and_momentum():
    assert cosine(0, 1000, 0.04, 0.4) == pytest.approx(0.04)
    assert cosine(500, 1000, 0.04, 0.4) == pytest.approx(0.22)
    assert cosine(999, 1000, 0.996, 1.0) < 1.0
    assert cosine(1000, 1000, 0.996, 1.0) == cosine(1001, 1000, 0.996, 1.0) == 1.0


@pytest.mark.parametrize(("epochs", "warmup"), [(100, 30), (5, 1), (5, 0)])
def test_teacher_temperature_is_the_array_of_the_reference(epochs, warmup):
    reference = np.concatenate([np.linspace(0.04, 0.07, warmup), np.full(epochs - warmup, 0.07)])
    ours = [teacher_temperature(epoch, 0.04, 0.07, warmup) for epoch in range(epochs)]
    assert ours == reference.tolist()
