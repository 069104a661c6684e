"""Which images a step sees, and that neither workers, processes, stops nor broken files change it."""

import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from mte_bench.data.draws import Draws
from mte_bench.data.sources import ImageSet
from mte_bench.errors import CorruptImage, UserError
from mte_bench.training.batches import StepSampler, epoch_order
from pretrain.loader import ViewDataset, view_loader
from pretrain.recipe import Recipe, View, Views
from pretrain.views import make_views

SMALL = Views(global1=View(size=16, blur=1.0), global2=View(size=16, solarize=0.2), local=View(size=8), local_count=2)


class Pictures(ImageSet):
    """Noise in memory; the images in ``broken`` cannot be read."""

    def __init__(self, count: int, broken: tuple[int, ...] = (), missing: tuple[int, ...] = ()):
        self.source, self.split, self.classes = "pictures", "train", ("even", "odd")
        self.labels = np.arange(count) % 2
        self.broken, self.missing = broken, missing

    def name(self, index: int) -> str:
        return f"{index}.jpg"

    def image(self, index: int) -> Image.Image:
        if index in self.broken:
            raise CorruptImage(f"/somewhere/{index}.jpg", "truncated")
        if index in self.missing:
            raise UserError(f"{index}.jpg: has gone; bring it back")
        noise = np.random.default_rng(index).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        return Image.fromarray(noise)


class Witness(Pictures):
    """Images of one colour that says which process read them, and on how many threads it computes."""

    def image(self, index: int) -> Image.Image:
        return Image.new("RGB", (20, 20), (os.getpid() % 256, os.getpid() // 256 % 256, torch.get_num_threads()))


def recipe(**values) -> Recipe:
    return Recipe(method="dino", **{"batch_size": 6, "epochs": 3, "views": SMALL, **values})


def same(batches, others) -> bool:
    return all(
        torch.equal(a.indices, b.indices)
        and torch.equal(a.labels, b.labels)
        and all(torch.equal(x, y) for x, y in zip(a.groups, b.groups, strict=True))
        for a, b in zip(batches, others, strict=True)
    )


def test_an_epoch_takes_every_image_at_most_once_and_drops_the_rest():
    steps = list(StepSampler(20, 6, 2, seed=1))
    assert [len(step) for step in steps] == [6] * 6 and len(StepSampler(20, 6, 2, seed=1)) == 6
    for epoch in (0, 1):
        keys = [key for step in steps[3 * epoch : 3 * epoch + 3] for key in step]
        assert {e for e, _ in keys} == {epoch} and len({index for _, index in keys}) == 18
        assert [index for _, index in keys] == epoch_order(1, epoch, 20)[:18]
    assert sorted(epoch_order(1, 0, 20)) == list(range(20))
    assert len({tuple(epoch_order(seed, epoch, 20)) for seed in (0, 1) for epoch in (0, 1)}) == 4


@pytest.mark.parametrize(("processes", "accumulate"), [(1, 4), (4, 1), (2, 2), (3, 2)])
def test_processes_and_micro_batches_share_the_same_global_batches(processes, accumulate):
    whole = list(StepSampler(50, 12, 3))
    parts = [
        list(StepSampler(50, 12, 3, process=(rank, processes), accumulate=accumulate)) for rank in range(processes)
    ]  # of each process: its micro-steps
    assert all(len(own) == len(whole) * accumulate for own in parts)
    for step, expected in enumerate(whole):
        joined = [key for own in parts for micro in own[step * accumulate : (step + 1) * accumulate] for key in micro]
        assert joined == expected


@pytest.mark.parametrize("first_step", [0, 1, 4, 5, 11, 12])
def test_a_run_can_start_at_any_step(first_step):
    whole = list(StepSampler(50, 12, 3, accumulate=2))
    rest = StepSampler(50, 12, 3, accumulate=2, first_step=first_step)
    assert list(rest) == whole[2 * first_step :] and len(rest) == len(whole) - 2 * first_step


def test_batches_that_do_not_fit_are_one_clear_error():
    with pytest.raises(UserError, match=r"batch_size 64 is more than the 63 images"):
        StepSampler(63, 64, 1)
    with pytest.raises(UserError, match=r"batch_size 64 .* 3 processes x 2 "):
        StepSampler(100, 64, 1, process=(0, 3), accumulate=2)
    with pytest.raises(UserError, match="batch_size"):
        view_loader(Pictures(5), recipe(), workers=0)


def test_a_batch_holds_the_views_of_its_images():
    images = Pictures(20)
    batches = list(view_loader(images, recipe(), seed=4, workers=0))
    assert len(batches) == 9
    for batch, keys in zip(batches, StepSampler(20, 6, 3, seed=4), strict=True):
        assert [group.shape for group in batch.groups] == [(2, 6, 3, 16, 16), (2, 6, 3, 8, 8)]
        assert all(group.dtype == torch.uint8 for group in batch.groups)
        assert batch.indices.tolist() == [index for _, index in keys] and batch.corrupt == {}
        assert batch.labels.tolist() == [index % 2 for _, index in keys]
        expected = make_views([images.image(index) for _, index in keys], keys, SMALL, Draws(4))
        assert all(torch.equal(group, views) for group, views in zip(batch.groups, expected, strict=True))


def test_workers_and_stops_change_nothing():
    state = torch.get_rng_state()
    alone = list(view_loader(Pictures(20), recipe(accumulate=2), workers=0))
    assert torch.equal(torch.get_rng_state(), state)
    assert same(view_loader(Pictures(20), recipe(accumulate=2), workers=2), alone)
    assert same(view_loader(Pictures(20), recipe(accumulate=2), workers=2, first_step=4), alone[8:])


def test_workers_live_through_all_epochs_and_compute_on_one_thread():
    plain = View(size=8, jitter=0, grayscale=0)
    settings = recipe(views=Views(global1=plain, global2=plain), epochs=5)
    colours = {tuple(batch.groups[0][0, 0, :, 0, 0].tolist()) for batch in view_loader(Witness(20), settings, workers=2)}
    assert len(colours) == 2 and {threads for _, _, threads in colours} == {1}
    own = (os.getpid() % 256, os.getpid() // 256 % 256)
    assert own not in {colour[:2] for colour in colours}


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_that_are_allowed_are_replaced_and_named(workers):
    good, broken = Pictures(20), Pictures(20, broken=(3, 4, 19))
    found = {}
    for reference, batch in zip(
        view_loader(good, recipe(), workers=0), view_loader(broken, recipe(), workers=workers, allow_corrupt=3), strict=True
    ):
        found |= batch.corrupt
        stand_in = {3: 5, 4: 5, 19: 0}
        assert batch.indices.tolist() == [stand_in.get(index, index) for index in reference.indices.tolist()]
        assert batch.labels.tolist() == [index % 2 for index in batch.indices.tolist()]
        kept = batch.indices == reference.indices
        assert all(torch.equal(a[:, kept], b[:, kept]) for a, b in zip(batch.groups, reference.groups, strict=True))
    assert found == {f"{index}.jpg": "truncated" for index in (3, 4, 19)}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("allowed", [0, 2])
def test_one_broken_image_more_than_allowed_stops_the_run_by_name(workers, allowed):
    with pytest.raises(CorruptImage, match=r"\d+\.jpg: not readable as an image \(truncated\).*--allow-corrupt") as caught:
        list(view_loader(Pictures(20, broken=(3, 10, 17)), recipe(), workers=workers, allow_corrupt=allowed))
    assert caught.value.path.removeprefix("/somewhere/") in ("3.jpg", "10.jpg", "17.jpg")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_the_user_can_mend_keeps_its_one_line(workers):
    with pytest.raises(UserError, match=r"^7.jpg: has gone; bring it back$"):
        list(view_loader(Pictures(20, missing=(7,)), recipe(epochs=1, batch_size=20), workers=workers))
    with pytest.raises(UserError, match="not one of its 20 images can be read"):
        list(view_loader(Pictures(20, broken=tuple(range(20))), recipe(), workers=workers, allow_corrupt=100))


def test_the_data_set_can_be_sent_to_another_process():
    dataset = ViewDataset(Pictures(20), SMALL, seed=3)
    keys = [(0, 5), (2, 7)]
    assert same([pickle.loads(pickle.dumps(dataset))[keys]], [dataset[keys]])
