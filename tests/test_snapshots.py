"""Snapshots of a run: what they hold, that a stop leaves no gap, and that keeping them changes nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mte_bench.data.sources import open_source
from mte_bench.encoders.checkpoint import open_checkpoint, save_encoder
from mte_bench.encoders.snapshots import snapshot_folder, snapshots_of
from mte_bench.training import state
from mte_bench.training.live import CURVES
from pretrain.recipe import Recipe
from tiny import TINY, Killed, assert_same_end, make, run_until


@pytest.fixture(scope="module")
def kept(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs with a snapshot of each, and k-NN after each."""
    out = tmp_path_factory.mktemp("kept")
    make(folder, out, snapshot_every=1, knn_every=1, held_out=open_source(str(folder), "val")).run()
    return out


def test_the_untrained_state_and_every_epoch_but_the_last_are_kept_and_open_like_runs(folder: Path, kept: Path) -> None:
    assert list(snapshots_of(kept)) == [0, 1, 2]
    untrained = make(folder, kept.parent / "never").teacher
    found = open_checkpoint(str(snapshot_folder(kept, 0)))
    for name, tensor in untrained.encoder.model.state_dict().items():
        assert torch.equal(found.encoder.model.state_dict()[name], tensor), name
    of_epochs = [open_checkpoint(str(place)) for place in (*snapshots_of(kept).values(), kept)]
    assert [one.subject.epochs for one in of_epochs] == [0, 1, 2, 3]
    assert len({one.sha256 for one in of_epochs}) == 4
    assert all(one.multi_token() is not None and one.token_heads() is not None for one in of_epochs)


def test_a_snapshot_is_what_a_run_that_stops_there_exports(folder: Path, kept: Path, tmp_path: Path) -> None:
    """Killed in the third epoch: the run's own export, of the second, is the other run's snapshot, byte for byte."""
    run_until(make(folder, tmp_path, snapshot_every=2, knn_every=1), 10)
    assert list(snapshots_of(tmp_path)) == [0, 2]
    for name in ("encoder.safetensors", "auxiliary.safetensors"):
        own = (tmp_path / name).read_bytes()
        assert own == (snapshot_folder(kept, 2) / name).read_bytes() == (snapshot_folder(tmp_path, 2) / name).read_bytes()


@pytest.mark.parametrize("stop", [3, 4, 9])
def test_going_on_leaves_no_gap_and_no_double(folder: Path, kept: Path, tmp_path: Path, stop: int) -> None:
    """Killed within the first epoch, at its end and in the third, with states saved only at ends of epochs."""
    how = {"snapshot_every": 1, "knn_every": 1, "held_out": open_source(str(folder), "val")}
    run_until(make(folder, tmp_path, **how), stop)
    make(folder, tmp_path, **how).run()
    assert_same_end(tmp_path, kept)
    files = {path.relative_to(kept): path.read_bytes() for path in kept.glob("snapshots/*/*")}
    assert len(files) == 6
    assert {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.glob("snapshots/*/*")} == files


def test_a_kill_between_the_files_of_a_snapshot_leaves_no_half_one(
    folder: Path, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die_in_a_snapshot(path: Path, *rest: Any) -> None:
        if path.parent == snapshot_folder(tmp_path, 1):
            raise Killed
        save_encoder(path, *rest)

    monkeypatch.setattr("pretrain.trainer.save_encoder", die_in_a_snapshot)
    with pytest.raises(Killed):
        make(folder, tmp_path, snapshot_every=1, knn_every=1).run()
    monkeypatch.undo()
    assert (snapshot_folder(tmp_path, 1) / "auxiliary.safetensors").exists()
    assert list(snapshots_of(tmp_path)) == [0]
    run_until(make(folder, tmp_path, snapshot_every=1, knn_every=1), 5)
    assert list(snapshots_of(tmp_path)) == [0, 1]
    for path in snapshot_folder(tmp_path, 1).iterdir():
        assert path.read_bytes() == (kept / path.relative_to(tmp_path)).read_bytes()


def test_snapshots_are_neither_part_of_the_recipe_nor_of_what_is_trained(folder: Path, kept: Path, tmp_path: Path) -> None:
    assert Recipe(**TINY).hash == Recipe(**TINY, snapshot_every=7).hash != Recipe(**{**TINY, "epochs": 4}).hash
    run_until(make(folder, tmp_path, knn_every=1), 6)
    make(folder, tmp_path, knn_every=1, snapshot_every=1).run()  # goes on with a run that kept none
    assert list(snapshots_of(tmp_path)) == [2]
    assert (tmp_path / "encoder.safetensors").read_bytes() == (kept / "encoder.safetensors").read_bytes()


def test_seconds_of_training_leave_pauses_out_and_go_on_after_a_stop(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that a step moves by 10 s and each look at the k-NN by 1000 s."""
    now = 0.0

    def look(*arguments: Any) -> float:
        nonlocal now
        now += 1000
        return 50.0

    monkeypatch.setattr("mte_bench.training.loop.time.monotonic", lambda: now)
    monkeypatch.setattr("pretrain.trainer.knn_top1", look)

    def trainer() -> Any:
        made = make(folder, tmp_path, knn_every=1, held_out=open_source(str(folder), "val"))
        step = made.take_step

        def slow(*arguments: Any) -> dict[str, float]:
            nonlocal now
            now += 10
            return step(*arguments)

        made.take_step = slow
        return made

    run_until(trainer(), 6)
    saved = state.read(tmp_path / state.NAME)
    now += 12345  # between the two runs
    trainer().run()
    lines = [json.loads(line) for line in (tmp_path / CURVES).read_text().splitlines()]
    assert [line["seconds"] for line in lines] == [10.0 * line["step"] for line in lines]
    assert (saved["step"], saved["seconds"], saved["paused"]) == (4, 1040.0, 1000.0)
