"""BYOL beyond what ``test_equality.py`` compares: the loss's range and precision, and what its parts are made of."""

import pytest
import torch

from pretrain.methods.byol import BYOL
from pretrain.mte import over_pairs


def test_the_loss_goes_from_0_to_8_and_gives_the_teacher_no_gradient() -> None:
    """Squared distances of unit vectors are 0 to 4; the reference adds up both directions."""
    method = BYOL(BYOL.Settings())
    for sign, expected in ((1, 0.0), (-1, 8.0)):
        vectors = [torch.randn(6, 256) for _ in range(2)]
        targets = [method.target(sign * 7 * view, 0) for view in reversed(vectors)]
        assert over_pairs(method, vectors, targets).item() == pytest.approx(expected, abs=1e-5)


def test_half_precision_is_normalised_in_float32() -> None:
    method = BYOL(BYOL.Settings())
    rows = (300 * torch.randn(5, 256)).half()  # their squares exceed what float16 can hold
    for made in (method.prediction(rows), method.target(rows, 0)):
        assert made.dtype == torch.float32
        torch.testing.assert_close(made.norm(dim=1), torch.ones(5))


def test_parts_have_the_sizes_and_biases_of_the_reference() -> None:
    method = BYOL(BYOL.Settings())
    shapes = {name: tuple(p.shape) for name, p in method.head(384, 1).named_parameters()}
    assert shapes == {
        "layers.0.weight": (1, 4096, 384),
        "layers.0.bias": (1, 4096),
        "layers.1.weight": (1, 256, 4096),
        "norms.0.weight": (4096,),
        "norms.0.bias": (4096,),
    }
    predictor = {name: tuple(p.shape) for name, p in method.tail(student=True).named_parameters()}
    assert predictor == {**shapes, "layers.0.weight": (1, 4096, 256)}
    assert not list(method.tail(student=False).parameters())
    three = BYOL(BYOL.Settings(layers=3)).head(384, 1)
    assert [layer.bias is None for layer in three.layers] == [False, False, True]


def test_last_norm_gives_every_number_of_the_targets_the_same_weight() -> None:
    """A no-op for a projection, which is normalised already; a mean of projections is large only where they agree."""
    method = BYOL(BYOL.Settings(last_norm=True, hidden=16, output=8)).double()
    projections = torch.randn(2, 64, 8, dtype=torch.float64)
    projections[1, :, :4] = projections[0, :, :4]
    projections = (projections - projections.mean(1, keepdim=True)) / projections.std(1, correction=0, keepdim=True)
    expected = torch.nn.functional.normalize(projections[0], dim=-1)
    torch.testing.assert_close(method.target(projections[0], 0), expected, rtol=0, atol=1e-5)
    mean = projections.mean(0)
    assert mean[:, :4].std() > 1.2 * mean[:, 4:].std()
    expected = torch.nn.functional.normalize(mean / mean.std(0, correction=0), dim=-1)
    torch.testing.assert_close(method.target(mean, 0), expected, rtol=0, atol=1e-4)
