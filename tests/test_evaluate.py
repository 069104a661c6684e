"""The evaluation commands from images on disk to the record, its predictions and what is printed."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from downstream import commands
from downstream.evaluate import Request, percentage
from downstream.features import Pass, extract
from downstream.folders import slug
from downstream.knn import KNN_TASK
from downstream.linear import LINEAR
from downstream.task import Split
from mte_bench.data.sources import open_source
from mte_bench.data.transforms import EvaluationTransform
from mte_bench.encoders.checkpoint import open_checkpoint
from mte_bench.errors import CorruptImage, UserError
from mte_bench.records import read_record
from mte_bench.statistics import bootstrap_ci

ENCODER = "random:vit_tiny_patch16_224?image_size=16&patch_size=8&embed_dim=32&depth=2&num_heads=2"
CLASSES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")


def draw(folder, classes=CLASSES, train=8, val=4):
    """A folder of noisy images whose colour tells the class, most of the time."""
    noise = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for number, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                colour = np.array([number * 36, 255 - number * 36, 128 + 80 * (number % 2)])
                pixels = (colour + 70 * noise.standard_normal((20, 24, 3))).clip(0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{index}.png")
    return folder


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return str(draw(tmp_path / "data"))


def knn(data, *, checkpoint=ENCODER, **options):
    return commands.knn(checkpoint, data, **({"set_": ["k=[5, 10]"], "workers": 0} | options))


def linear(data, *, checkpoint=ENCODER, **options):
    return commands.linear(checkpoint, data, **({"set_": ["epochs=3"], "workers": 0} | options))


@pytest.mark.parametrize("command", [knn, linear])
def test_the_record_says_what_the_predictions_show(command, data, tmp_path):
    record = command(data, out=str(tmp_path / "out"))
    assert record == read_record(tmp_path / "out" / "record.json")
    table = pyarrow.parquet.read_table(tmp_path / "out" / record.predictions)
    columns = table.to_pydict()
    val = open_source(data, "val")
    assert columns["name"] == [val.name(index) for index in range(len(val))] and columns["label"] == val.labels.tolist()
    assert json.loads(table.schema.metadata[b"classes"]) == list(CLASSES)
    for name, metric in record.metrics.items():
        right = np.array(columns[f"prediction:{name}"]) == np.array(columns["label"])
        assert metric.value == pytest.approx(100 * right.mean()) and metric.n == 28
        assert metric.ci95 == pytest.approx([100 * bound for bound in bootstrap_ci(right)])
    assert record.data.images == {"train": 56, "val": 28} and record.data.classes == 7
    assert record.cost.seconds > 0 and record.cost.images_per_second > 0 and record.cost.peak_memory_bytes > 0


def test_metrics_settings_and_names_of_each_task(data):
    found = knn(data)
    assert list(found.metrics) == ["top1_k5", "top5_k5", "top1_k10", "top5_k10"]
    assert found.metrics["top1_k5"].value > 100 / 7  # colour tells
    assert (found.task, found.protocol.name, found.protocol.version) == ("knn", "knn", 1)
    assert found.protocol.settings["k"] == [5, 10] and found.protocol.settings["temperature"] == 0.07
    found = linear(data)
    assert list(found.metrics) == ["top1", "top5"] and found.metrics["top1"].value <= found.metrics["top5"].value
    assert (found.task, found.protocol.name) == ("linear", "linear-fast")
    assert found.details["rate"] in found.details["rates"] and len(found.details["held_out_top1"]) == 45


def test_features_are_extracted_once_for_all_tasks(data):
    assert knn(data).details["features_cached"] == [False, False]
    assert linear(data).details["features_cached"] == [True, True]
    assert knn(data, precision="bfloat16").details["features_cached"] == [False, False]
    assert knn(data, set_=["feature=patch-mean", "k=[5]"]).details["features_cached"] == [False, False]


def test_an_encoder_with_itself_is_that_encoder(data):
    alone, twice = knn(data), knn(data, others=[ENCODER])
    assert twice.metrics == alone.metrics
    assert twice.details["features_cached"] == [[True, True], [True, True]]
    assert twice.subject.sha256 != alone.subject.sha256 and len(twice.subject.parts) == 2


@pytest.mark.parametrize("command", [knn, linear])
def test_an_ensemble_is_its_features_at_unit_length_side_by_side(command, data, tmp_path):
    checkpoints = [ENCODER, ENCODER + "&seed=1", ENCODER.replace("32", "24")]
    parts = [knn(data, checkpoint=text, out=f"part{index}") for index, text in enumerate(checkpoints)]
    record = command(data, others=checkpoints[1:])
    assert record.details["features_cached"] == [[True, True]] * 3
    assert [part.sha256 for part in record.subject.parts] == [part.subject.sha256 for part in parts]
    assert record.subject.checkpoint == " + ".join(checkpoints) and record.subject.seed is None
    assert record.subject.sha256 not in {part.subject.sha256 for part in parts}
    assert command(data, others=checkpoints[:0:-1], out="turned").subject.sha256 != record.subject.sha256
    splits = []
    for split in ("train", "val"):
        images, rows = open_source(data, split), []
        for text in checkpoints:
            opened = open_checkpoint(text)
            spec = opened.encoder.spec
            transform = EvaluationTransform.for_size(spec.image_size, spec.mean, spec.std)
            features = extract(opened.encoder, opened.sha256, images, transform, ("global",), Pass()).arrays["global"]
            rows.append(features / np.linalg.norm(features, axis=1, keepdims=True))
        splits.append(Split(np.concatenate(rows, axis=1), images.labels, images.classes))
    assert splits[0].features.shape == (56, 32 + 32 + 24)
    task = KNN_TASK if command is knn else LINEAR
    protocol = task.protocol.check({**record.protocol.settings, "task": task.name, "version": 1}, "record")
    outcome = task.evaluate(protocol, *splits, "cpu")
    assert record.metrics == {name: percentage(found.correct) for name, found in outcome.metrics.items()}
    assert (tmp_path / "runs").is_dir() and "+" in next((tmp_path / "runs").glob("*+*")).name


def test_a_dry_run_counts_all_encoders(data, capsys):
    assert knn(data, others=[ENCODER + "&seed=1"], dry_run=True, json=True) is None
    plan = json.loads(capsys.readouterr().out)
    assert plan["feature_width"] == 64 and plan["feature_images_cached"] == 0 and plan["feature_steps"] == 2 * 2
    assert plan["encoder"].count("vit_tiny_patch16_224") == 4 and len(plan["transform"]) == 2


def test_the_same_evaluation_gives_the_same_numbers_and_files(data, tmp_path):
    first, second = linear(data, out="a"), linear(data, out="b")
    assert first.metrics == second.metrics and first.details["held_out_top1"] == second.details["held_out_top1"]
    assert (tmp_path / "a" / "predictions.parquet").read_bytes() == (tmp_path / "b" / "predictions.parquet").read_bytes()


def test_where_records_lie_if_not_told(data, tmp_path):
    base = tmp_path / "runs" / slug(ENCODER)
    knn(data, set_=["k=[5]"])
    knn(data, set_=["k=[10]"])
    linear(data, set_=None, smoke=True)
    commands.knn(ENCODER, data, workers=0)
    folders = sorted(path.parent.relative_to(base).as_posix() for path in base.rglob("record.json"))
    assert folders[0] == "knn-data" and folders[-1] == "linear-fast-data-smoke"
    assert len(folders) == 4 and all(folder.startswith("knn-data-") for folder in folders[1:3])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("random:vit_tiny_patch16_224", "random-vit_tiny_patch16_224"),
        ("random:runs/dino", "random-dino"),
        ("/somewhere/dino_vits16.pth", "dino_vits16"),
        ("timm:vit_small_patch16_224.dino", "timm-vit_small_patch16_224.dino"),
        ("cifar10-per_class10", "cifar10-per_class10"),
    ],
)
def test_names_of_folders(text, expected):
    assert slug(text) == expected


def test_a_record_of_something_else_is_not_overwritten(data, tmp_path):
    knn(data, out="out")
    with pytest.raises(UserError, match=r"holds the record of checkpoint random:vit_tiny.*--out"):
        knn(data, checkpoint=ENCODER + "&seed=1", out="out")
    other = str(draw(tmp_path / "other", train=9))
    with pytest.raises(UserError, match=r"holds a record on imagefolder:.*data; choose another --out"):
        knn(other, out="out")
    knn(data, out="out")  # the same again is


def test_json_and_table(data, capsys):
    record = knn(data, json=True)
    assert json.loads(capsys.readouterr().out) == record.model_dump(mode="json")
    knn(data)
    out = capsys.readouterr().out
    assert all(word in out for word in ("top1_k5", "95 % interval", "28", f"{record.metrics['top1_k5'].value:.2f}"))


def test_a_dry_run_tells_and_leaves_nothing(data, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))  # the cache is there, too
    assert linear(data, dry_run=True, json=True) is None
    plan = json.loads(capsys.readouterr().out)
    assert plan["settings"]["epochs"] == 3 and plan["images"] == {"train": 56, "val": 28} and plan["feature_width"] == 32
    assert plan["feature_bytes"] == 84 * 32 * 4 and plan["feature_images_cached"] == 0
    assert plan["feature_seconds"] > 0 and plan["task_seconds"] > 0 and plan["task_memory_bytes"] > 0
    assert sorted(tmp_path.rglob("*")) == before
    knn(data)
    capsys.readouterr()
    assert knn(data, dry_run=True) is None
    assert "feature_images_cached" in (out := capsys.readouterr().out) and "84" in out


def test_a_smoke_run_takes_two_batches_of_all_classes(data):
    record = knn(data, smoke=True, batch_size=7, set_=["k=[3, 200]"])
    assert record.data.images == {"train": 14, "val": 14} and record.data.subset == "images=14"
    assert list(record.metrics) == ["top1_k3", "top5_k3"]
    assert linear(data, smoke=True, set_=None).protocol.settings["epochs"] == 1


def test_size_and_resize_of_the_protocol_reach_encoder_and_transform(data):
    record = knn(data, set_=["k=[5]", "image_size=24", "resize=25"])
    assert record.subject.image_size == 24
    assert (record.details["transform"]["crop"], record.details["transform"]["resize"]) == (24, 25)
    with pytest.raises(UserError, match="crop 24 must not be larger than resize 20"):
        knn(data, set_=["k=[5]", "image_size=24", "resize=20"])


# What the user can mend -------------------------------------------------------------------------------------------------


def test_one_class_only(tmp_path):
    for command in (knn, linear):
        with pytest.raises(UserError, match="only one class"):
            command(str(draw(tmp_path / command.__name__, classes=("ant",))))


def test_a_class_of_train_without_val_images_is_no_mistake(data):
    Path(data, "val", "bee").rename(Path(data, "gone"))
    record = linear(data)
    assert record.data.classes == 7 and record.metrics["top1"].n == 24
    table = pyarrow.parquet.read_table(next(Path("runs").rglob("predictions.parquet"))).to_pydict()
    assert sorted(set(table["label"])) == [0, 2, 3, 4, 5, 6]  # as in train


def test_images_without_labels(data):
    flat = Path("flat")
    for split in ("train", "val"):
        flat.joinpath(split).mkdir(parents=True)
        for path in Path(data, split, "ant").iterdir():
            path.rename(flat / split / path.name)
    with pytest.raises(UserError, match="no class labels"):
        knn("flat")


def test_a_truncated_image_is_named_and_can_be_allowed(data):
    broken = Path(data, "val", "cat", "1.png")
    broken.write_bytes(broken.read_bytes()[:300])
    with pytest.raises(CorruptImage, match=r"val/cat/1\.png.*--allow-corrupt"):
        knn(data)
    record = knn(data, allow_corrupt=1)
    assert [name.endswith("cat/1.png") for name in record.data.corrupt] == [True]
    assert record.data.images == {"train": 56, "val": 27} and record.metrics["top1_k5"].n == 27


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"protocol": "knnn"}, "no protocol named 'knnn' (did you mean 'knn'?)"),
        ({"protocol": "linear-fast"}, "protocol 'linear-fast' is for task 'linear', not 'knn'"),
        ({"set_": ["temprature=1"]}, "unknown setting 'temprature' (did you mean 'temperature'?)"),
        ({"set_": ["k=[]"]}, "k: "),
        ({"set_": ["k=[0]"]}, "k.0: "),
        ({"set_": ["feature=globl"]}, "did you mean 'global'?"),
        ({"set_": ["k=[500]"]}, "fewer than the smallest k"),
        ({"cache": "data/train/ant/0.png"}, "features cannot be kept there"),
        ({"out": "data/train/ant/0.png"}, "0.png"),
    ],
)
def test_mistakes_are_told_by_name(data, options, expected):
    with pytest.raises(UserError) as error:
        knn(data, **options)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_a_protocol_of_ones_own(data, tmp_path):
    (tmp_path / "mine.yaml").write_text("task: knn\nversion: 3\nfeature: global\nimage_size: null\nresize: null\nk: [5]\n")
    with pytest.raises(UserError, match=r"protocol mine\.yaml: temperature: field required"):
        knn(data, protocol="mine.yaml")
    record = knn(data, protocol="mine.yaml", set_=["temperature=0.1"])
    assert (record.protocol.name, record.protocol.version) == ("mine", 3)


# What the commands promise ----------------------------------------------------------------------------------------------


def test_the_module_of_the_commands_imports_nothing_heavy():
    code = "import sys, downstream.commands; print([m for m in ('torch', 'pydantic', 'numpy', 'faiss') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize(("command", "task"), [(commands.knn, KNN_TASK), (commands.linear, LINEAR)])
def test_options_of_the_command_are_the_fields_of_the_request(command, task):
    import inspect

    parameters = inspect.signature(command).parameters
    assert {name.rstrip("_") for name in parameters} == set(Request.__dataclass_fields__)
    assert parameters["protocol"].default == task.default


def test_under_torchrun_the_first_process_writes_the_record(data, tmp_path, monkeypatch):
    """The features are shared; who is not the first has done its part then."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert knn(data, set_=["k=[5]"], out=str(tmp_path / "out")) is None
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("RANK", "0")
    record = knn(data, set_=["k=[5]"], out=str(tmp_path / "out"))
    assert record.details["features_cached"] == [True, True]
    monkeypatch.delenv("WORLD_SIZE")
    assert knn(data, set_=["k=[5]"]).metrics == record.metrics


def test_the_type_of_features_is_an_option(data, tmp_path):
    with pytest.raises(UserError, match=r"--feature-dtype float61.*did you mean 'float16'"):
        knn(data, feature_dtype="float61")
    plan = knn(data, set_=["k=[5]"], feature_dtype="float16", dry_run=True)
    assert plan is None
    assert knn(data, set_=["k=[5]"], feature_dtype="float16").details["features_cached"] == [False, False]
