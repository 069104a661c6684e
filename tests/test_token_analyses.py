"""What tokens know alone and together: the numbers are scikit-learn's, and parts add up to the whole."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.special import softmax
from sklearn.linear_model import RidgeClassifier
from sklearn.metrics import log_loss, normalized_mutual_info_score
from sklearn.neighbors import KNeighborsClassifier

from downstream.analysis.lookup import by_class, sets_of, wins
from downstream.analysis.pseudo_labels import agreement, matched_accuracy
from downstream.linear.heads import hold_out
from mte_bench.cli import run
from mte_bench.data.sources import SPLITS, Split, open_source
from mte_bench.data.transforms import EvaluationTransform
from mte_bench.encoders.checkpoint import open_checkpoint
from mte_bench.encoders.encoder import EncoderSpec
from mte_bench.encoders.weight_files import read_safetensors
from mte_bench.errors import UserError
from mte_bench.settings import merge
from pretrain.recipe import Recipe
from pretrain.trainer import Trainer
from tiny import CPU, TINY

SCENES = "scenes?train=80&val=60&size=32"


RECIPE = merge(TINY, {"mte": {"auxiliary_cls": 2, "pooled": 2}, "method_settings": {"batch_norm_in_head": True}, "epochs": 1})


def trainer(out: Path) -> Trainer:
    return Trainer(Recipe.check(RECIPE, "recipe"), open_source(SCENES, "train"), out, device=CPU, workers=0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DINO+MTE run of a few steps with batch normalisation in its heads."""
    out = tmp_path_factory.mktemp("trained")
    trainer(out).run()
    return out


def pixels(split: Split, spec: EncoderSpec) -> tuple[torch.Tensor, np.ndarray]:
    """The images of a split as the encoder sees them, and their labels."""
    images, transform = open_source(SCENES, split), EvaluationTransform.for_size(32, spec.mean, spec.std)
    return torch.stack([transform(images.image(index)) for index in range(len(images))]), images.labels


def analyse(name: str, checkpoint: object, out: Path, *more: str) -> tuple[Any, dict[str, Any]]:
    arguments = ["analyze", name, str(checkpoint), "--data", SCENES, "--out", str(out), "--workers", "0", "--device", "cpu"]
    record = run([*arguments, *more])
    return record, json.loads((out / f"{name}.json").read_text())


def test_classes_of_every_token_add_up_to_its_total(trained: Path, tmp_path: Path) -> None:
    record, values = analyse("per-class", trained, tmp_path, "--set", "k=5")
    assert record.data.images == {"train": 80, "val": 60}
    assert values["names"][:5] == ["global", "CLS 1", "CLS 2", "pooled 1", "pooled 2"]
    assert values["names"][5:] == ["all CLS", "all pooled", "all auxiliary", "all tokens"]
    shares = np.array(values["images_of_class"]) / 60
    for row, metric in zip(values["top1_of_class"], record.metrics.values(), strict=True):
        assert float(np.dot(row, shares)) == pytest.approx(metric.value, abs=2e-3)
    assert sum(values["classes_best"].values()) == pytest.approx(10, abs=1e-3)


def test_the_global_tokens_accuracy_is_that_of_knn_and_of_scikit_learn(trained: Path, tmp_path: Path) -> None:
    record, _ = analyse("per-class", trained, tmp_path / "a", "--set", "k=1")
    options = ["--data", SCENES, "--out", str(tmp_path / "b"), "--device", "cpu", "--workers", "0", "--set", "k=[1]"]
    knn = run(["knn", str(trained), *options, "--cache", str(tmp_path / "cache")])
    assert record.metrics["top1_global"].value == knn.metrics["top1_k1"].value
    model = open_checkpoint(str(trained)).multi_token()
    assert model is not None
    splits = []
    for split in SPLITS:
        images, labels = pixels(split, model.encoder.spec)
        with torch.no_grad():
            _, auxiliary = model(images)
        splits.append((torch.nn.functional.normalize(auxiliary[:, :2], dim=2).flatten(1).numpy(), labels))
    (bank, labels), (asked, truth) = splits
    expected = KNeighborsClassifier(1, algorithm="brute").fit(bank, labels).score(asked, truth)
    assert record.metrics["top1_all_cls"].value == pytest.approx(100 * expected)


def test_a_pairs_gain_is_over_its_better_token(trained: Path, tmp_path: Path) -> None:
    record, values = analyse("pairs", trained, tmp_path, "--set", "k=3")
    together, gain = np.array(values["top1"]), np.array(values["gain"], dtype=float)
    alone = np.diag(together)
    np.testing.assert_allclose(
        alone, [record.metrics[f"top1_{n}"].value for n in ("global", "cls_1", "cls_2", "pooled_1", "pooled_2")], atol=1e-3
    )
    better = np.maximum(alone[:, None], alone[None, :])
    np.testing.assert_allclose(gain[~np.eye(5, dtype=bool)], (together - better)[~np.eye(5, dtype=bool)], atol=2e-3)
    upper = np.triu_indices(4, 1)
    assert record.metrics["pair_gain"].value == pytest.approx(gain[1:, 1:][upper].mean(), abs=2e-3)


def test_a_pairs_linear_probe_is_scikit_learns_ridge_on_its_features(trained: Path, tmp_path: Path) -> None:
    """Penalties, held-out images and the choice among them worked out again, on the features of the pair alone."""
    record, values = analyse("pairs", trained, tmp_path, "--set", "k=3")
    model = open_checkpoint(str(trained)).multi_token()
    assert model is not None
    tokens, labels = {}, {}
    for split in SPLITS:
        images, labels[split] = pixels(split, model.encoder.spec)
        with torch.no_grad():
            kept, auxiliary = model(images)
        every = torch.cat([kept.global_token.unsqueeze(1), auxiliary], dim=1).double()
        tokens[split] = torch.nn.functional.normalize(every, dim=2).numpy()
    truth, penalties = labels["train"], record.protocol.settings["penalties"]
    held = hold_out(truth, record.protocol.settings["held_out"], record.protocol.settings["seed"])
    for pair in [(0, 0), (0, 3), (1, 2), (2, 4)]:
        bank, asked = (tokens[split][:, sorted(set(pair))].reshape(len(tokens[split]), -1) for split in SPLITS)

        def ridge(rows: np.ndarray, penalty: float, bank: np.ndarray = bank) -> RidgeClassifier:
            return RidgeClassifier(penalty * bank[rows].var(axis=0).mean() * rows.sum()).fit(bank[rows], truth[rows])

        tried = [ridge(~held, penalty) for penalty in penalties]
        losses = [log_loss(truth[held], softmax(one.decision_function(bank[held]), axis=1), labels=range(10)) for one in tried]
        right = [one.score(bank[held], truth[held]) for one in tried]
        best = max(range(len(tried)), key=lambda place: (round(right[place], 9), -losses[place]))
        expected = ridge(np.ones(len(truth), dtype=bool), penalties[best]).score(asked, labels["val"])
        assert values["top1_linear"][pair[0]][pair[1]] == pytest.approx(100 * expected, abs=1e-3), pair
    together, gain = np.array(values["top1_linear"]), np.array(values["gain_linear"], dtype=float)
    better = np.maximum.outer(np.diag(together), np.diag(together))
    upper = np.triu_indices(5, 1)
    np.testing.assert_allclose(gain[upper], (together - better)[upper], atol=2e-3)
    assert record.metrics["pair_gain_linear"].value == pytest.approx(gain[1:, 1:][np.triu_indices(4, 1)].mean(), abs=2e-3)


def test_an_encoder_without_auxiliary_tokens_has_its_mean_patch(tmp_path: Path) -> None:
    record, values = analyse("pairs", "random:vit_tiny_patch16_224?image_size=32&patch_size=8&depth=2", tmp_path)
    assert values["names"] == ["global", "mean patch"]
    assert record.metrics["pair_gain"].n == 60


def test_pseudo_labels_are_the_prototypes_that_training_would_choose(trained: Path, tmp_path: Path) -> None:
    record, values = analyse("pseudo-labels", trained, tmp_path)
    engine = trainer(trained)
    engine.run()  # finished already: loads its state
    images, labels = pixels("val", engine.teacher.encoder.spec)
    with torch.no_grad():
        vectors = engine.teacher.eval()([images.unsqueeze(0)])
    assert vectors.of_fused is not None and vectors.of_global is not None
    for name, scores in (("fused", vectors.of_fused[0]), ("global", vectors.of_global[0])):
        expected = normalized_mutual_info_score(labels, scores.argmax(1).numpy())
        assert record.metrics[f"nmi_{name}"].value == pytest.approx(expected, abs=1e-6)
    assert values["prototypes_in_use"][0] > 1  # the teacher's head for the global token has statistics of its own to go by


def test_methods_without_prototypes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no prototypes"):
        analyse("pseudo-labels", "random:vit_tiny_patch16_224?image_size=32&patch_size=8&depth=1", tmp_path)


def test_heads_of_another_version_are_refused_by_name(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    tensors, metadata = read_safetensors(run / "auxiliary.safetensors")
    assert any("norms.0.weight" in name for name in tensors)
    older = {name.replace("norms.0.", "norms.0.norm."): tensor for name, tensor in tensors.items()}
    save_file(older, run / "auxiliary.safetensors", metadata)
    with pytest.raises(UserError, match=r"auxiliary\.safetensors: its heads are not as this version writes them"):
        analyse("pseudo-labels", run, tmp_path / "out")


def test_matching_gives_each_class_one_prototype() -> None:
    labels = np.array([0, 0, 0, 1, 1, 1, 2, 2])
    assert matched_accuracy(np.array([7, 7, 7, 3, 3, 3, 9, 9]), labels) == 100
    assert matched_accuracy(np.array([5, 5, 5, 5, 5, 5, 5, 5]), labels) == 37.5
    assert matched_accuracy(np.array([4, 4, 6, 8, 8, 6, 2, 2]), labels) == pytest.approx(75)
    perfect = agreement(labels + 3, labels)
    assert (perfect["nmi"], perfect["ari"], perfect["matched_accuracy"]) == (1, 1, 100)


def test_wins_are_shared_where_rows_tie_and_classes_without_images_left_out() -> None:
    right, labels = np.array([1, 0, 1, 1], bool), np.array([0, 0, 2, 2])
    np.testing.assert_array_equal(by_class(right, labels, 3), [50, np.nan, 100])
    accuracy = np.array([[50, np.nan, 80.0], [50, np.nan, 10]])
    np.testing.assert_array_equal(wins(accuracy), [1.5, 0.5])


def test_sets_of_one_kind_are_named_once() -> None:
    assert sets_of(["global", "mean patch"]) == {}
    assert sets_of(["global", "pooled 1", "pooled 2"]) == {"all pooled": [1, 2], "all tokens": [0, 1, 2]}
    assert list(sets_of(["global", "CLS 1", "pooled 1"])) == ["all auxiliary", "all tokens"]
