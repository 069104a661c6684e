"""What all tests share: the real images in ``.data/``, and a cache that is the test's own."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mte_bench import cli

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the tests run side by side, and are small
DATA = Path(__file__).resolve().parent.parent / ".data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs real images where there are none."""
    if not DATA.is_dir():
        skip = pytest.mark.skip(reason="no real images: .data/ is not there")
        for item in items:
            if item.get_closest_marker("shared_data"):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads what another session cached, and none leaves anything in the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def error_line(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must end with exit code 2, and returns its one ``error:`` line."""

    def run(*arguments: str) -> str:
        capsys.readouterr()
        assert cli.main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        assert captured.err.endswith(f"{line}\n") and "Traceback" not in captured.err
        return line

    return run


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder of noise: two classes, 34 images to train on and 8 held out."""
    import numpy as np
    from PIL import Image

    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, name in [("train", "a"), ("train", "b"), ("val", "a"), ("val", "b")]:
        (root / split / name).mkdir(parents=True)
        for index in range(17 if split == "train" else 4):
            pixels = generator.integers(0, 255, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root
