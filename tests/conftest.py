"""What all tests share: the real images in ``.data/``, and a cache that is the test's own."""

from pathlib import Path

import pytest

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
