"""Learning from labels: timm's losses, mixing, RandAugment and erasing, equations 7 to 9, and whole runs."""

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
from test_mte import TINY, perturbed
from test_trainer import CPU, assert_same_end, by_one_and_by_two_processes, folder  # noqa: F401 - a fixture
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

from mte_bench.data.sources import open_source
from mte_bench.encoders.checkpoint import open_checkpoint
from mte_bench.encoders.encoder import IMAGENET_MEAN, IMAGENET_STD
from mte_bench.errors import UserError
from pretrain import mte
from pretrain.loader import StepSampler, epoch_order, view_loader
from pretrain.methods.supervised import Supervised
from pretrain.optimiser import build_optimiser
from pretrain.recipe import Recipe, View, Views
from pretrain.seeded import seeded
from pretrain.trainer import Trainer
from pretrain.views import Draws, choose, crop, erase, make_views, normalise

K = 10
RAND = "rand-m9-mstd0.5-inc1"


def make_method(**values: object) -> Supervised:
    return Supervised(Supervised.Settings(**values), K)


def test_loss_and_gradient_equal_timm() -> None:
    torch.manual_seed(0)
    method = make_method()
    for scale in (1.0, 30.0):
        logits = scale * torch.randn(8, K, dtype=torch.float64)
        target = torch.softmax(torch.randn(8, K, dtype=torch.float64), -1)
        ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        loss = mte.over_pairs(method, [ours], [target])
        expected = SoftTargetCrossEntropy()(theirs, target)
        loss.backward()
        expected.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-14)


def test_smoothed_labels_without_mixing_equal_timm_s_loss() -> None:
    torch.manual_seed(0)
    method = make_method(mixup=0, cutmix=0, smoothing=0.1)
    labels = torch.randint(K, (7,))  # an odd batch is fine then
    images = torch.randn(1, 7, 3, 8, 8)
    same_images, targets = method.labels(images, labels, 3)
    assert same_images is images
    logits = torch.randn(7, K)
    loss = mte.over_pairs(method, [logits], [targets])
    torch.testing.assert_close(loss, LabelSmoothingCrossEntropy(0.1)(logits, labels), rtol=1e-6, atol=1e-7)


def test_mixing_is_timm_s_and_comes_from_the_seed_alone() -> None:
    method = make_method()
    images, labels = torch.randn(1, 6, 3, 16, 16), torch.arange(6)
    peer = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=K)
    before = np.random.get_state()[1].copy(), random.getstate(), torch.get_rng_state()
    found = [method.labels(images.clone(), labels, seed) for seed in range(40)]
    again = [method.labels(images.clone(), labels, seed) for seed in range(40)]
    assert (np.random.get_state()[1] == before[0]).all() and random.getstate() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    kinds = set()
    for seed, ((mixed, targets), (mixed2, targets2)) in enumerate(zip(found, again, strict=True)):
        assert torch.equal(mixed, mixed2) and torch.equal(targets, targets2)
        with seeded(seed):
            expected = peer(images[0].clone(), labels)
        assert torch.equal(mixed[0], expected[0]) and torch.equal(targets, expected[1])
        kinds.add(bool(((mixed == images) | (mixed == images.flip(1))).all()))  # CutMix makes no new values
        torch.testing.assert_close(targets.sum(1), torch.ones(6))
    assert kinds == {True, False} and len({float(targets[0, 0]) for _, targets in found}) > 30


def test_seeds_of_all_sizes_differ() -> None:
    drawn = set()
    for seed in (0, 1, 1 << 32, 1 << 40, (1 << 40) + 1, (1 << 80) + 1):
        with seeded(seed):
            drawn.add((random.random(), np.random.rand()))
    assert len({a for a, _ in drawn}) == len({b for _, b in drawn}) == 6


def test_an_odd_batch_two_views_or_no_labels_are_one_clear_error(folder: Path, tmp_path: Path) -> None:  # noqa: F811
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
    with pytest.raises(UserError, match="batch_size 3"):
        make_method().labels(torch.zeros(1, 3, 3, 8, 8), torch.zeros(3, dtype=torch.long), 0)
    images = open_source(str(folder), "train")
    images.labels = np.where(np.arange(len(images)) == 4, -1, images.labels)
    with pytest.raises(UserError, match="not all of its images have one"):
        Trainer(Recipe(**{**RUN, **one}), images, tmp_path, device=CPU, workers=0)
    with pytest.raises(UserError, match="auto_augment 'randaug' is not in timm's notation"):
        View.check({"auto_augment": "randaug"}, "views")


@pytest.mark.parametrize(
    "settings",
    [None, {}, {"label_weight": 0.5}, {"heads": "shared"}, {"target": "each"}, {"weights": (1.0, 0.25)}],
)
def test_equations_7_to_9_by_hand(settings: dict[str, Any] | None) -> None:
    torch.manual_seed(0)
    recipe = Recipe(**{
        **TINY,
        "method": "supervised",
        "method_settings": {},
        "views": {"global2": None},
        "mte": settings if settings is None else {"auxiliary_cls": 2, "pooled": 3, "kernel": 3, **settings},
    })  # fmt: skip
    method = make_method()
    student, _ = perturbed(recipe, method)
    images = torch.randn(1, 4, 3, 32, 32, dtype=torch.float64)
    labels = torch.softmax(torch.randn(4, K, dtype=torch.float64), -1)

    if settings is None:
        tokens = student.encoder(images[0])
    else:
        tokens, auxiliary = student.auxiliary.encode(student.encoder, images[0])
    head = student.head
    logits = tokens.global_token @ head.weight[0].T + head.bias[0]

    def cross_entropy(target: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return -(target * torch.log_softmax(scores, -1)).sum(-1).mean()

    if settings is None:
        expected = cross_entropy(labels, logits)
    else:
        heads = [student.heads.weight[i] if student.heads else head.weight[0] for i in range(5)]
        biases = [student.heads.bias[i] if student.heads else head.bias[0] for i in range(5)]
        fused = sum(auxiliary[:, i] @ heads[i].T + biases[i] for i in range(5)) / 5
        taught = labels if settings.get("target") == "each" else torch.softmax(fused, -1).detach()
        weights = settings.get("weights", (1.0, 1.0))
        expected = weights[0] * cross_entropy(labels, fused) + weights[1] * cross_entropy(taught, logits)
        expected = expected + settings.get("label_weight", 0.0) * cross_entropy(labels, logits)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()

    targets = mte.Targets([labels], [labels], [])
    found = mte.loss(method, student([images]), targets, recipe)
    found["loss"].backward()
    torch.testing.assert_close(found["loss"], expected, rtol=1e-12, atol=0)
    ours = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert ours.keys() == gradients.keys() == {name for name, _ in student.named_parameters()}
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-8, atol=1e-12, msg=name)


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
    "batch_size": 8,
    "repeats": 2,
    "views": {"global1": {"size": 32, "jitter": 0, "auto_augment": RAND, "erase": 0.5}, "global2": None},
    "optimiser": {"lr": 0.01, "warmup_epochs": 1},
    "momentum": [0.9, 0.9],
    "knn_every": 1,
}


@pytest.mark.parametrize("enhanced", [False, True])
@pytest.mark.parametrize("ema", [False, True])
def test_a_run_can_be_stopped_and_its_classifier_is_kept(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    enhanced: bool,
    ema: bool,
) -> None:
    settings = {"mte": {"auxiliary_cls": 1, "pooled": 1, "kernel": 3} if enhanced else None}
    recipe = Recipe(**{**RUN, **settings, "method_settings": {"evaluate_ema": ema}})
    train, val = open_source(str(folder), "train"), open_source(str(folder), "val")

    def make(name: str) -> Trainer:
        return Trainer(recipe, train, tmp_path / name, device=CPU, workers=0, held_out=val, save_minutes=0.0)

    whole = make("whole")
    record = whole.run()
    assert record.subject.method == "supervised" and record.subject.mte == enhanced
    stopped = make("stopped")
    step = stopped._step

    def until(*arguments: Any) -> Any:
        if stopped.step == 3:
            raise KeyboardInterrupt
        return step(*arguments)

    stopped._step = until
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    make("stopped").run()
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


@pytest.mark.slow
def test_two_processes_compute_what_one_does_but_for_mixing(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    changes = {"method_settings": {"mixup": 0, "cutmix": 0}, "optimiser": {"lr": 1e-4, "warmup_epochs": 0}}
    one, two = by_one_and_by_two_processes({**RUN, **changes, "mte": {"kernel": 3}}, folder, tmp_path)
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (one, two)]
    assert len(losses[0]) == 8 and losses[1] == pytest.approx(losses[0], rel=2e-5)


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
