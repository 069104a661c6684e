"""Snapshots: what a pre-training run keeps of itself on the way, each a folder that opens like any checkpoint."""

from pathlib import Path

from mte_bench.encoders.checkpoint import ENCODER_NAME

FOLDER = "snapshots"


def snapshot_folder(run: Path, epoch: int) -> Path:
    """Where the run folder ``run`` keeps its state after ``epoch`` epochs; 0 is the untrained one."""
    return run / FOLDER / f"epoch-{epoch:04d}"


def snapshots_of(run: Path) -> dict[int, Path]:
    """Epoch to folder of the snapshots in ``run``, ascending; empty if there are none.

    The state at the end of a run is no snapshot but the run folder itself.
    """
    found = {path.parent.name.removeprefix("epoch-"): path.parent for path in (run / FOLDER).glob(f"epoch-*/{ENCODER_NAME}")}
    return {int(epoch): found[epoch] for epoch in sorted(found, key=int) if epoch.isdigit()}
