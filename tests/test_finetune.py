"""Fine-tuning from images on disk to the record: it goes on exactly, and what it says is what the weights do."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from test_evaluate import CLASSES, draw

from downstream import commands
from downstream.evaluate import Request
from downstream.finetune import FINETUNE
from downstream.job import Opened
from downstream.tuning.tuner import Tuner
from mte_bench.data.sources import open_source
from mte_bench.data.transforms import EvaluationTransform
from mte_bench.encoders.checkpoint import open_checkpoint
from mte_bench.errors import UserError
from mte_bench.records import Record, read_record
from mte_bench.training import state
from tiny import Killed

SPEC: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2}
ENCODER = "random:vit_tiny_patch16_224?image_size=16&patch_size=8&" + "&".join(f"{k}={v}" for k, v in SPEC.items())
QUICK = ["epochs=2", "batch_size=16"]
EVERYTHING = [
    "epochs=3",
    "batch_size=16",
    "mixup=0.8",
    "cutmix=1.0",
    "cutmix_share=0.5",
    "erase=0.25",
    "drop_path=0.3",
    "ema=0.9",
]
EVERYTHING += ["repeats=2", "accumulate=2", "reports=best"]
STEPS = 3  # of an epoch: 56 images


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(draw(tmp_path_factory.mktemp("coloured") / "data"))


def finetune(data: str, out: Path, changes: list[str] = QUICK, **options: Any) -> Record:
    encoder = options.pop("checkpoint", ENCODER)
    given = {"protocol": "tiny", "workers": 0, "device": "cpu", **options}
    return commands.finetune(encoder, data, out=str(out), set_=changes, **given)


def curves(out: Path, key: str) -> list[float]:
    lines = [json.loads(line) for line in (out / "curves.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def predictions(out: Path) -> Any:
    return pyarrow.parquet.read_table(out / "predictions.parquet")


@pytest.fixture(scope="module")
def whole(images: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    finetune(images, out, EVERYTHING)
    return out


def assert_same_end(out: Path, reference: Path) -> None:
    for name in ("encoder.safetensors", "classifier.safetensors"):
        assert (out / name).read_bytes() == (reference / name).read_bytes()
    assert predictions(out).equals(predictions(reference))
    assert read_record(out / "record.json").metrics == read_record(reference / "record.json").metrics
    for key in ("step", "loss", "lr", "top1"):
        assert curves(out, key) == curves(reference, key)


@pytest.mark.parametrize("stops", [(2,), (3,), (4, 8)])
def test_a_stopped_run_goes_on_exactly(
    images: str, whole: Path, tmp_path: Path, stops: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With mixing, erasing, stochastic depth, repeats, accumulation and an average; the record counts the stops."""
    step = Tuner.take_step
    for stop in stops:

        def until(tuner: Tuner, *arguments: Any, stop: int = stop) -> Any:
            if tuner.step == stop:
                raise Killed
            return step(tuner, *arguments)

        monkeypatch.setattr(Tuner, "take_step", until)
        with pytest.raises(Killed):
            finetune(images, tmp_path, EVERYTHING, save_minutes=0.0)
        assert state.read(tmp_path / state.NAME)["step"] == stop
    monkeypatch.undo()
    record = finetune(images, tmp_path, EVERYTHING, workers=1)
    assert_same_end(tmp_path, whole)
    assert (record.details["resumed"], record.details["steps"], record.details["epochs_done"]) == (len(stops), 3 * STEPS, 3)
    assert read_record(whole / "record.json").details["resumed"] == 0


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_exactly(images: str, tmp_path: Path) -> None:
    """SIGKILL, three times, whenever a new state has been written; the same command goes on."""
    changes = [*EVERYTHING, "epochs=40"]
    call = f"from downstream.commands import finetune; finetune({ENCODER!r}, {images!r}, protocol='tiny', set_={changes!r}, "
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
    finetune(images, tmp_path / "whole", changes)
    out = tmp_path / "killed"
    for _ in range(3):
        before = _written(out)
        process = subprocess.Popen([sys.executable, "-c", f"{call}workers=1, out={str(out)!r})"], start_new_session=True, **quiet)
        while process.poll() is None and _written(out) == before:
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert finetune(images, out, changes).details["resumed"] == 3
    assert_same_end(out, tmp_path / "whole")


def _written(out: Path) -> int:
    path = out / state.NAME
    return path.stat().st_mtime_ns if path.exists() else 0


def test_a_finished_run_is_left_as_it_is_and_another_is_not_gone_on_with(images: str, tmp_path: Path) -> None:
    record = finetune(images, tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.is_file()}
    assert finetune(images, tmp_path) == record
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(UserError, match=r"protocol.lr: 0.001 there, 0.002 now.*choose another --out"):
        finetune(images, tmp_path, [*QUICK, "lr=2e-3"])
    with pytest.raises(UserError, match=r"holds the record of checkpoint random:vit_tiny.*choose another --out"):
        finetune(images, tmp_path, checkpoint=ENCODER + "&seed=1")


def test_it_learns_and_the_record_is_the_predictions(images: str, tmp_path: Path) -> None:
    record = finetune(images, tmp_path, ["epochs=12", "batch_size=16", "lr=5e-3"])
    table = predictions(tmp_path)
    label, predicted = (np.array(table[name]) for name in ("label", "prediction:top1"))
    assert record.metrics["top1"].value == pytest.approx(100 * (label == predicted).mean()) and record.metrics["top1"].value > 45
    assert record.metrics["top1"].value == pytest.approx(curves(tmp_path, "top1")[-1], rel=1e-5)
    assert table["name"].to_pylist() == [open_source(images, "val").name(i) for i in range(28)]
    assert record.data.images == {"train": 56, "val": 28} and record.data.classes == 7 and record.task == "finetune"
    assert record.protocol.settings["lr"] == 5e-3 and record.details["reported"] == "the last epoch"


@pytest.mark.parametrize("pool", ["token", "mean"])
def test_the_weights_load_strictly_into_timm_and_predict_the_same(images: str, tmp_path: Path, pool: str) -> None:
    finetune(images, tmp_path, [*QUICK, f"pool={pool}"])
    weights = safetensors.torch.load_file(tmp_path / "encoder.safetensors")
    weights |= safetensors.torch.load_file(tmp_path / "classifier.safetensors")
    if pool == "mean":  # timm has a norm before the mean or after it, not both
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("norm.")}
    pooling = {"token": "token", "mean": "avg"}[pool]
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=16, patch_size=8, global_pool=pooling, **SPEC)
    model.load_state_dict(weights)
    transform, val = EvaluationTransform.for_size(16, *_channels()), open_source(images, "val")
    batch = torch.stack([transform(val.image(index)) for index in range(len(val))])
    with torch.inference_mode():
        scores = model.eval()(batch)
    assert scores.argmax(1).tolist() == predictions(tmp_path)["prediction:top1"].to_pylist()
    assert open_checkpoint(str(tmp_path)).subject.method == "random, fine-tuned"


def _channels() -> tuple[Any, Any]:
    spec = open_checkpoint(ENCODER).encoder.spec
    return spec.mean, spec.std


def test_the_average_of_the_weights_is_what_it_should_be(images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    tuners: list[Tuner] = []
    step = Tuner.take_step

    def watched(tuner: Tuner, *arguments: Any) -> Any:
        if not seen:
            tuners.append(tuner)
            seen.append(tuner.model.encoder.model.blocks[1].mlp.fc1.weight.detach().clone())
        values = step(tuner, *arguments)
        seen.append(tuner.model.encoder.model.blocks[1].mlp.fc1.weight.detach().clone())
        return values

    monkeypatch.setattr(Tuner, "take_step", watched)
    record = finetune(images, tmp_path, [*QUICK, "ema=0.7", "lr=5e-3"])
    expected = seen[0].double()
    for weights in seen[1:]:
        expected = 0.7 * expected + 0.3 * weights.double()
    found = tuners[0].ema.module.encoder.model.blocks[1].mlp.fc1.weight  # type: ignore[union-attr]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(found, seen[-1]) and "top1_ema" in record.metrics

    monkeypatch.undo()
    other = finetune(images, tmp_path / "ema", [*QUICK, "ema=0.7", "lr=5e-3", "evaluates=ema"])
    assert other.metrics["top1"] == record.metrics["top1_ema"] and "top1_ema" not in other.metrics
    saved = safetensors.torch.load_file(tmp_path / "ema" / "encoder.safetensors")["blocks.1.mlp.fc1.weight"]
    assert torch.equal(saved, found)


def test_the_best_epoch_is_reported_with_its_own_weights(images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The accuracies of five epochs are made up; the second of the two best ones is not better than the first."""
    made_up, classified, heads = [10.0, 30.0, 20.0, 30.0, 5.0], Tuner._classified, []

    def dictated(tuner: Tuner, model: Any) -> Any:
        heads.append(model.head.weight.detach().clone())
        return classified(tuner, model)._replace(top1=made_up[len(heads) - 1])

    monkeypatch.setattr(Tuner, "_classified", dictated)
    record = finetune(images, tmp_path, ["epochs=5", "batch_size=16", "reports=best"])
    assert (record.details["epoch"], record.details["best_top1"], record.details["last_top1"]) == (2, 30.0, 5.0)
    saved = safetensors.torch.load_file(tmp_path / "classifier.safetensors")["head.weight"]
    assert torch.equal(saved, heads[1]) and not torch.equal(saved, heads[4])
    assert "optimistic" in record.details["reported"]


def test_accumulated_micro_batches_take_the_same_step(images: str, tmp_path: Path) -> None:
    plain = ["epochs=1", "batch_size=16", "mixup=0", "drop_path=0.2", "warmup_epochs=0"]
    finetune(images, tmp_path / "1", plain)
    finetune(images, tmp_path / "4", [*plain, "accumulate=4"])
    np.testing.assert_allclose(curves(tmp_path / "4", "loss"), curves(tmp_path / "1", "loss"), rtol=1e-4)


def test_another_size_than_the_encoders_interpolates_its_positions(images: str, tmp_path: Path) -> None:
    record = finetune(images, tmp_path, [*QUICK, "image_size=24", "resize=24"])
    assert safetensors.torch.load_file(tmp_path / "encoder.safetensors")["pos_embed"].shape == (1, 10, 32)
    assert record.subject.image_size == 24 and record.details["transform"]["crop"] == 24


def test_a_swin_is_fine_tuned(images: str, tmp_path: Path) -> None:
    swin = "random:swin_tiny_patch4_window7_224?image_size=32&window_size=4&embed_dim=12&depths=[1,1,1,1]&num_heads=[1,1,2,2]"
    record = finetune(images, tmp_path, [*QUICK, "drop_path=0.2"], checkpoint=swin)
    assert record.metrics["top1"].n == 28 and open_checkpoint(str(tmp_path)).subject.arch == "swin_tiny_patch4_window7_224"


def test_bfloat16_trains_close_to_float32(images: str, tmp_path: Path) -> None:
    finetune(images, tmp_path / "32")
    finetune(images, tmp_path / "16", precision="bfloat16")
    full, half = curves(tmp_path / "32", "loss"), curves(tmp_path / "16", "loss")
    assert full != half
    np.testing.assert_allclose(half, full, rtol=0.02)


def test_unreadable_images_are_named_or_counted(tmp_path: Path) -> None:
    root, changes = draw(tmp_path / "data"), ["epochs=4", "batch_size=16"]
    for name in ("train/ant/0.png", "val/bee/1.png"):
        (root / name).write_bytes(b"no image")
    with pytest.raises(UserError, match=r"bee/1\.png: not readable as an image.*--allow-corrupt"):
        finetune(str(root), tmp_path / "allowed", changes)
    assert state.read(tmp_path / "allowed" / state.NAME)["step"] == STEPS  # nothing of the first epoch is lost
    record = finetune(str(root), tmp_path / "allowed", changes, allow_corrupt=1)
    assert len(curves(tmp_path / "allowed", "top1")) == 4 and record.details["resumed"] == 1
    assert record.data.corrupt == ["train/ant/0.png", "val/bee/1.png"]
    assert record.data.images["val"] == 27 == record.metrics["top1"].n == len(predictions(tmp_path / "allowed"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["batch_size=64"], "batch_size 64 is more than the 56 images"),
        (["batch_size=6", "accumulate=2"], "micro-batches of 3: mixup and CutMix pair images"),
        (["batch_size=6", "accumulate=4"], "must be divisible by accumulate"),
        (["evaluates=ema"], "evaluates=ema needs a decay: set ema"),
        (["layer_dekay=0.5"], "unknown setting 'layer_dekay' .did you mean 'layer_decay'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(images: str, tmp_path: Path, changes: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        finetune(images, tmp_path / "out", changes)
    assert not (tmp_path / "out").exists()


def test_a_protocol_of_another_task_or_images_without_labels_are_refused(images: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="protocol 'knn' is for task 'knn', not 'finetune'"):
        finetune(images, tmp_path / "out", [], protocol="knn")
    for split in ("train", "val"):
        (tmp_path / "flat" / split).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "flat" / split / "0.png")
    with pytest.raises(UserError, match="no class labels"):
        finetune(str(tmp_path / "flat"), tmp_path / "out")


def test_a_dry_run_shows_what_would_be_and_a_smoke_run_does_little(
    images: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune(images, tmp_path / "out", dry_run=True, json=True) is None
    plan = json.loads(capsys.readouterr().out)
    assert (plan["steps"], plan["steps_per_epoch"], plan["classes"]) == (2 * STEPS, STEPS, len(CLASSES))
    assert plan["settings"]["layer_decay"] == 0.75 and plan["task_seconds"] > 0 and not (tmp_path / "out").exists()
    record = finetune(images, tmp_path / "out", [], smoke=True)
    assert record.details["steps"] == 2 and record.data.images == {"train": 16, "val": 16}


def test_it_is_a_job_that_a_suite_can_find_again(images: str, tmp_path: Path) -> None:
    request = Request(ENCODER, images, "tiny", set=tuple(QUICK), out=str(tmp_path), workers=0, device="cpu")
    job = FINETUNE.job(request, Opened())
    assert job.found() is None and job.plan()["task_seconds"] > 0 and not any(tmp_path.iterdir())
    with pytest.raises(UserError, match="trains one encoder, not 2 together"):
        FINETUNE.job(replace(request, others=(ENCODER,)), Opened())
    assert job.run() == job.found() and FINETUNE.job(replace(request, set=("epochs=3",)), Opened()).found() is None


@pytest.mark.slow
def test_two_processes_train_as_one(images: str, tmp_path: Path) -> None:
    """torchrun with gloo and the same global batch, without mixing: the same losses, and all of val is evaluated."""
    changes = ["epochs=3", "batch_size=16", "mixup=0", "drop_path=0.3"]
    script = tmp_path / "tune.py"
    script.write_text(
        "import sys\nfrom downstream import commands\n"
        f"how = dict(protocol='tiny', set_={changes!r}, workers=0, device='cpu')\n"
        f"commands.finetune({ENCODER!r}, {images!r}, out=sys.argv[1], **how)\n"
    )
    finetune(images, tmp_path / "one", changes)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([*launcher, str(script), str(tmp_path / "two")], check=True, env=environment, capture_output=True)
    np.testing.assert_allclose(curves(tmp_path / "two", "loss"), curves(tmp_path / "one", "loss"), rtol=1e-4)
    record = read_record(tmp_path / "two" / "record.json")
    assert record.details["processes"] == 2 and record.metrics["top1"].n == 28
    assert record.metrics["top1"].value == pytest.approx(
        read_record(tmp_path / "one" / "record.json").metrics["top1"].value, abs=4
    )
