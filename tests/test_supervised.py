"""Learning from labels: RandAugment and erasing as timm's, and whole runs. Losses and steps are in ``test_equality.py``."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from scipy import stats
from test_loader import Pictures, same
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing

from mte_bench.data.draws import Draws
from mte_bench.data.sources import open_source
from mte_bench.data.transforms import normalise
from mte_bench.encoders.checkpoint import open_checkpoint
from mte_bench.encoders.encoder import IMAGENET_MEAN, IMAGENET_STD
from mte_bench.errors import UserError
from mte_bench.training.batches import StepSampler, epoch_order
from mte_bench.training.seeded import seeded
from pretrain import mte
from pretrain.loader import view_loader
from pretrain.methods.supervised import Supervised
from pretrain.optimiser import build_optimiser
from pretrain.recipe import Recipe, View, Views
from pretrain.trainer import Trainer
from pretrain.views import choose, crop, erase, make_views
from tiny import CPU, TINY, assert_same_end, make, run_until

K = 10
RAND = "rand-m9-mstd0.5-inc1"


def make_method(**values: object) -> Supervised:
    return Supervised(Supervised.Settings(**values), K)


def test_mixing_comes_from_the_seed_alone() -> None:
    method = make_method()
    images, labels = torch.randn(1, 6, 3, 16, 16), torch.arange(6)
    before = np.random.get_state()[1].copy(), random.getstate(), torch.get_rng_state()
    found = [method.labels(images.clone(), labels, seed) for seed in range(40)]
    again = [method.labels(images.clone(), labels, seed) for seed in range(40)]
    assert (np.random.get_state()[1] == before[0]).all() and random.getstate() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    kinds = set()
    for (mixed, targets), (mixed2, targets2) in zip(found, again, strict=True):
        assert torch.equal(mixed, mixed2) and torch.equal(targets, targets2)
        kinds.add(bool(((mixed == images) | (mixed == images.flip(1))).all()))  # CutMix makes no new values
        torch.testing.assert_close(targets.sum(1), torch.ones(6))
    assert kinds == {True, False} and len({float(targets[0, 0]) for _, targets in found}) > 30


def test_seeds_of_all_sizes_differ() -> None:
    drawn = set()
    for seed in (0, 1, 1 << 32, 1 << 40, (1 << 40) + 1, (1 << 80) + 1):
        with seeded(seed):
            drawn.add((random.random(), np.random.rand()))
    assert len({a for a, _ in drawn}) == len({b for _, b in drawn}) == 6


def test_an_odd_batch_two_views_or_no_labels_are_one_clear_error(folder: Path, tmp_path: Path) -> None:
    one = {"views": {"global2": None}, "method": "supervised"}
    for values, words in (
        ({**one, "batch_size": 7}, "batch_size 7.*even"),
        ({"method": "supervised"}, "one view.*views.global2=null"),
        ({**one, "method": "dino"}, "global2 must not be null"),
    ):
        from pretrain.methods import METHODS

        with pytest.raises(UserError, match=words):
            mte.check(Recipe(**values), METHODS[values["method"]])
    with pytest.raises(UserError, match="no labels"):
        Supervised(Supervised.Settings(), 0)
    with pytest.raises(UserError, match="batch_size 6 makes micro-batches of 3"):
        mte.check(Recipe(**{**one, "batch_size": 6}), Supervised, processes=2)
    images = open_source(str(folder), "train")
    images.labels = np.where(np.arange(len(images)) == 4, -1, images.labels)
    with pytest.raises(UserError, match="not all of its images have one"):
        Trainer(Recipe(**{**RUN, **one}), images, tmp_path, device=CPU, workers=0)
    with pytest.raises(UserError, match="auto_augment 'randaug' is not in timm's notation"):
        View.check({"auto_augment": "randaug"}, "views")


def pictures(count: int, size: int = 40) -> list[Image.Image]:
    draw = np.random.default_rng(0)
    small = draw.integers(0, 256, (count, 5, 4, 3), dtype=np.uint8)
    return [Image.fromarray(pixels).resize((size + 8, size), Image.Resampling.BICUBIC) for pixels in small]


def test_rand_augment_is_timm_s_under_the_view_s_own_seed() -> None:
    size = 32
    fill = tuple(round(255 * mean) for mean in IMAGENET_MEAN)
    peer = rand_augment_transform(
        RAND, {"translate_const": int(0.45 * size), "img_mean": fill, "interpolation": Image.Resampling.BICUBIC}
    )
    plain = View(size=size, jitter=0, grayscale=0)
    augmented = plain.model_copy(update={"auto_augment": RAND})
    changed = 0
    for index, image in enumerate(pictures(60)):
        numbers = Draws(3).views(1, index, 1)[0]
        choices = choose(augmented, image.size, numbers)
        assert choices._replace(augment=-1) == choose(plain, image.size, numbers)
        before = np.ascontiguousarray(crop(image, plain, choices))
        after = crop(image, augmented, choices)
        with seeded(choices.augment):
            expected = np.asarray(peer(Image.fromarray(before)))
        np.testing.assert_array_equal(after, expected)
        changed += bool((after != before).any())
    assert 30 < changed < 60  # of two operations each is left out half the time


def test_augmented_views_depend_on_seed_epoch_image_and_view_only() -> None:
    views = Views(global1=View(size=24, auto_augment=RAND, erase=0.5, jitter=0, grayscale=0), global2=None)
    images, keys = pictures(12), [(1, index) for index in range(12)]
    state = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    (together,) = make_views(images, keys, views, Draws(0))
    assert together.shape == (1, 12, 3, 24, 24) and together.dtype == torch.uint8
    assert random.getstate() == state[0] and (np.random.get_state()[1] == state[1]).all()
    assert torch.equal(torch.get_rng_state(), state[2])
    for index in (7, 0):
        assert torch.equal(make_views([images[index]], [keys[index]], views, Draws(0))[0][:, 0], together[:, index])
    for seed, epoch in ((1, 1), (0, 2)):
        other = make_views(images, [(epoch, index) for index in range(12)], views, Draws(seed))[0]
        assert (other != together).flatten(2).any(2).all()
    both = Views(global1=views.global1, global2=views.global1)
    pair = make_views(images, keys, both, Draws(0))[0]
    assert torch.equal(pair[:1], together) and not torch.equal(pair[0], pair[1])


def test_erasing_is_distributed_as_timm_s() -> None:
    size, count = 32, 3000
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    random.seed(0)
    torch.manual_seed(0)
    peer = RandomErasing(1.0, mode="pixel", device="cpu")
    found: dict[str, list[np.ndarray]] = {"ours": [], "theirs": []}
    noise: dict[str, list[np.ndarray]] = {"ours": [], "theirs": []}
    for seed in range(count):
        pixels = np.zeros((3, size, size), np.uint8)
        marked = np.full((3, size, size), 255, np.uint8)
        erase(pixels, seed)
        erase(marked, seed)
        ours = (pixels == marked).all(0)  # where neither colour is left
        theirs = peer(torch.full((3, size, size), 99.0))
        there = (theirs != 99).all(0).numpy()
        for name, where in (("ours", ours), ("theirs", there)):
            rows, columns = np.flatnonzero(where.any(1)), np.flatnonzero(where.any(0))
            height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
            assert where.sum() == height * width  # one rectangle
            found[name].append(np.array([rows[0], columns[0], height, width, height * width, height / width]))
        noise["ours"].append(pixels[:, ours])
        noise["theirs"].append(((theirs * std + mean).clamp(0, 1) * 255).round()[:, there].numpy())
    columns = [np.stack(found[name]).T for name in ("ours", "theirs")]
    for ours_, theirs_ in zip(*columns, strict=True):
        assert stats.ks_2samp(ours_, theirs_).pvalue > 1e-3
    for channel in range(3):
        a, b = (np.concatenate([patch[channel] for patch in noise[name]]) for name in ("ours", "theirs"))
        levels = [np.cumsum(np.bincount(values.astype(int), minlength=256)) / len(values) for values in (a, b)]
        assert abs(levels[0] - levels[1]).max() < 0.005
    whole = normalise(torch.from_numpy(np.concatenate([patch[0] for patch in noise["ours"]])).view(1, 1, -1).expand(3, 1, -1),
                      IMAGENET_MEAN, IMAGENET_STD)[0]  # fmt: skip
    assert abs(whole.mean()) < 0.02 and abs(whole.std() - 1) < 0.03  # the clipped tails are small


def test_one_view_in_four_is_erased() -> None:
    view = View(erase=0.25)
    chosen = [choose(view, (64, 64), Draws(7).views(1, index, 1)[0]).erase for index in range(4000)]
    erased = [seed for seed in chosen if seed >= 0]
    assert stats.binomtest(len(erased), 4000, 0.25).pvalue > 1e-3 and len(set(erased)) == len(erased)


def test_repeated_augmentation_takes_each_image_three_times_with_other_views() -> None:
    order = epoch_order(1, 0, 20, repeats=3)
    first = epoch_order(1, 0, 20)
    assert len(order) == 20 and [place % 20 for place in order] == [first[turn // 3] for turn in range(20)]
    assert [place // 20 for place in order] == [turn % 3 for turn in range(20)]
    assert len({place % 20 for place in order}) == 7
    views = Views(global1=View(size=16), global2=None)
    recipe = Recipe(method="supervised", batch_size=6, epochs=2, views=views, repeats=3)
    batches = list(view_loader(Pictures(20), recipe, workers=0))
    assert len(batches) == 6 and len(list(StepSampler(20, 6, 2, repeats=3))) == 6
    for batch in batches:
        assert [len(set(part)) for part in batch.indices.view(2, 3).tolist()] == [1, 1]
        one, two, three = batch.groups[0][0, :3]
        assert not torch.equal(one, two) and not torch.equal(two, three) and not torch.equal(one, three)
        assert batch.labels.tolist() == [index % 2 for index in batch.indices.tolist()]
    assert same(view_loader(Pictures(20), recipe, workers=2, first_step=2), batches[2:])


RUN: dict[str, Any] = {
    **TINY,
    "method": "supervised",
    "method_settings": {},
    "drop_path": 0.2,
    "epochs": 2,
    "mte": None,
    "repeats": 2,
    "views": {"global1": {"size": 32, "jitter": 0, "auto_augment": RAND, "erase": 0.5}, "global2": None},
    "optimiser": {"lr": 0.01, "warmup_epochs": 1},
    "momentum": [0.9, 0.9],
    "knn_every": 1,
}


@pytest.mark.parametrize("enhanced", [False, True])
@pytest.mark.parametrize("ema", [False, True])
def test_a_run_can_be_stopped_and_its_classifier_is_kept(folder: Path, tmp_path: Path, enhanced: bool, ema: bool) -> None:
    settings = {"mte": {"auxiliary_cls": 1, "pooled": 1, "kernel": 3} if enhanced else None}
    values = {**RUN, **settings, "method_settings": {"evaluate_ema": ema}}
    val = open_source(str(folder), "val")
    options = {"held_out": val, "save_minutes": 0.0}
    whole = make(folder, tmp_path / "whole", **values, **options)
    record = whole.run()
    assert record.subject.method == "supervised" and record.subject.mte == enhanced
    run_until(make(folder, tmp_path / "stopped", **values, **options), 3)
    make(folder, tmp_path / "stopped", **values, **options).run()
    assert_same_end(tmp_path / "stopped", tmp_path / "whole")
    files = [(tmp_path / name / "classifier.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert files[0] == files[1]

    branch = whole.teacher if ema else whole.student
    assert not torch.equal(whole.teacher.head.weight, whole.student.head.weight)
    model = timm.create_model(
        "vit_tiny_patch16_224", num_classes=2, img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2
    ).eval()
    weights = {}
    for name in ("encoder", "classifier"):
        weights |= safetensors.torch.load_file(tmp_path / "whole" / f"{name}.safetensors")
    model.load_state_dict(weights, strict=True)
    encoder = open_checkpoint(str(tmp_path / "whole")).encoder
    images = torch.randn(5, 3, 32, 32)
    branch.eval().encoder.use_drop_path(None)
    with torch.no_grad():
        ours = branch.head(branch.encoder(images).global_token.unsqueeze(0))[0]
        torch.testing.assert_close(model(images), ours, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(encoder(images).global_token, branch.encoder(images).global_token, rtol=1e-6, atol=1e-7)

    lines = [json.loads(line) for line in (tmp_path / "whole" / "curves.jsonl").read_text().splitlines()]
    measured = [line for line in lines if "classifier_top1" in line]
    assert len(measured) == 2 and all("knn_top1" in line for line in measured)
    loader = [(val.image(index), int(val.labels[index])) for index in range(len(val))]
    from mte_bench.data.transforms import EvaluationTransform

    transform = EvaluationTransform.for_size(32, IMAGENET_MEAN, IMAGENET_STD)
    with torch.no_grad():
        right = [model(transform(image).unsqueeze(0)).argmax().item() == label for image, label in loader]
    assert measured[-1]["classifier_top1"] == pytest.approx(100 * np.mean(right))


def test_tokens_and_positions_have_no_weight_decay_as_in_timm() -> None:
    recipe = Recipe(**{**RUN, "mte": {}, "optimiser": {"decay": "layers"}})
    student = mte.Branch(recipe, make_method(), student=True)
    groups = build_optimiser(student, recipe.optimiser, CPU).param_groups
    undecayed = {id(parameter) for parameter in groups[1]["params"]}
    model = student.encoder.model
    skipped = model.no_weight_decay()
    assert {"pos_embed", "cls_token"} <= skipped and id(student.auxiliary.cls) in undecayed
    for name, parameter in model.named_parameters():
        assert (id(parameter) in undecayed) == (parameter.ndim == 1 or name in skipped), name


def test_the_global_classifier_learns_from_its_auxiliary_ones_alone(tmp_path: Path) -> None:
    """With equation (9) no label reaches the global token's classifier, and yet it learns them."""
    draw = np.random.default_rng(0)
    for index in range(32):
        path = tmp_path / "images" / "train" / ("dark", "light")[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(90 * (index % 2), 130 + 90 * (index % 2), (32, 32, 3), dtype=np.uint8)).save(path)
    settings = {"mte": {"auxiliary_cls": 1, "pooled": 1, "kernel": 3}, "epochs": 8, "optimiser": {"lr": 0.1, "warmup_epochs": 1}}
    images = open_source(str(tmp_path / "images"), "train")
    views = {"global1": {"size": 32, "jitter": 0, "grayscale": 0}, "global2": None}
    recipe = Recipe(**{**RUN, **settings, "views": views, "repeats": 1})
    Trainer(recipe, images, tmp_path / "run", device=CPU, workers=0, held_out=images).run()
    lines = [json.loads(line) for line in (tmp_path / "run" / "curves.jsonl").read_text().splitlines()]
    top1 = [line["classifier_top1"] for line in lines if "classifier_top1" in line]
    assert top1[-1] > 95
