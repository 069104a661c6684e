"""Every row of ``docs/equality.md``: the methods against independent implementations, same weights and inputs."""

from pathlib import Path

import pytest
import torch

from benchmarks.equality import COMPARISONS

TABLE = Path(__file__).resolve().parent.parent / "docs" / "equality.md"


@pytest.mark.filterwarnings("ignore")  # the peers' own
@pytest.mark.parametrize("row", COMPARISONS, ids=lambda row: f"{row[0]} {row[1]}")
def test_equal(row: tuple[str, str, str]) -> None:
    torch.manual_seed(1)
    value, gradient = COMPARISONS[row]()
    assert value < (1e-6 if row[1] == "table of positions" else 1e-12)
    assert gradient is None or gradient < 1e-10
    assert f"| {row[0]} | {row[1]} | {row[2]} |" in TABLE.read_text()
