"""MoBY beyond what ``test_equality.py`` compares: what its queues hold."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mte_bench.errors import UserError
from pretrain.methods.moby import MoBY
from tiny import make

K, QUEUE, BATCH = 5, 12, 4


def make_method() -> MoBY:
    torch.manual_seed(0)
    return MoBY(MoBY.Settings(output=K, queue=QUEUE))


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_queues_hold_the_newest_keys_of_their_view(micro_batches: int) -> None:
    """First in, first out over five steps of twelve places: the queues are replaced once and two thirds."""
    method = make_method()
    history = [list(queue) for queue in method.queues.clone()]
    for step in range(5):
        vectors = [3 * torch.randn(2 * BATCH // micro_batches, K) for _ in range(micro_batches)]
        for part in vectors:
            for view, rows in enumerate(part.split(BATCH // micro_batches)):
                history[view] += [row / row.norm() for row in rows]
        method.update(vectors, [])
        assert method.oldest.item() == (step + 1) * BATCH % QUEUE
        for view in range(2):
            held = torch.roll(method.queues[view], -int(method.oldest), 0)
            torch.testing.assert_close(held, torch.stack(history[view][-QUEUE:]), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("view", [0, 1])
def test_a_view_is_compared_with_its_own_queue(view: int) -> None:
    """Without a queue that distracts, the loss is that of one key among ``QUEUE`` orthogonal ones."""
    method = make_method()
    key = F.one_hot(torch.zeros(BATCH, dtype=torch.long), K).float()
    method.queues[view] = F.one_hot(torch.ones(QUEUE, dtype=torch.long), K)  # orthogonal to the key
    method.queues[1 - view] = key[0]
    expected = 2 * torch.log(1 + QUEUE * torch.exp(torch.tensor(-1 / 0.2)))
    torch.testing.assert_close(method.pair(key, key, view), expected)


def test_queues_start_as_unit_vectors_of_the_seed() -> None:
    one, two = make_method(), make_method()
    assert torch.equal(one.queues, two.queues) and not torch.equal(one.queues[0], one.queues[1])
    torch.testing.assert_close(one.queues.norm(dim=-1), torch.ones(2, QUEUE))
    assert set(one.state_dict()) == {"queues", "oldest"}


def test_a_batch_that_does_not_divide_the_queue_is_refused() -> None:
    method = MoBY(MoBY.Settings())
    method.fits(512, 64)
    for batch in (500, 8192):
        with pytest.raises(UserError, match=f"batch_size {batch}: must divide method_settings.queue, 4096"):
            method.fits(batch, batch)


def test_training_fills_the_queues(folder: Path, tmp_path: Path) -> None:
    settings = {"hidden": 32, "output": 8, "queue": 40}
    trainer = make(folder, tmp_path, method="moby", method_settings=settings, epochs=1)
    start = trainer.method.queues.clone()
    trainer.run()  # four steps of eight images
    assert trainer.method.oldest.item() == 32
    changed = (trainer.method.queues != start).any(-1)
    assert changed[:, :32].all() and not changed[:, 32:].any()
    torch.testing.assert_close(trainer.method.queues.norm(dim=-1), torch.ones(2, 40))
