"""A real browser without a window: Chromium as Qt brings it, in a process of its own.

Run as a program it opens a page, runs JavaScript in it and prints what came of it:

    python tests/browser.py PAGE.html SCRIPT WIDTH light|dark [PICTURE.png]
"""

import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

SECONDS = 60


def browse(page: Path, script: str, width: int = 1200, scheme: str = "light", picture: Path | None = None) -> Any:
    """What ``script`` (an expression) gives on ``page``; fails on any console message.

    Where no browser can start it skips; with BROWSER_REQUIRED in the environment it fails, unless the platform has none.
    """
    if reason := missing():
        told = f"no browser can start here: {reason}"
        if os.environ.get("BROWSER_REQUIRED") and find_spec("PySide6"):
            pytest.fail(f"{told}; install what Chromium needs of the system (.github/workflows/ci.yml lists it)")
        pytest.skip(told)
    done = _run(str(page), script, str(width), scheme, *([str(picture)] if picture else []))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["loaded"] and found["console"] == []
    return found["result"]


@cache
def missing() -> str:
    """Why no browser can start here; "" if one can."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        page.write_text("<!doctype html><title>x</title>")
        done = _run(str(page), "1 + 1", "200", "light")
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, timeout=2 * SECONDS)


def main(page: str, script: str, width: str, scheme: str, picture: str = "") -> None:
    flags = ["--no-sandbox", "--disable-gpu", f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"]
    os.environ |= {"QT_QPA_PLATFORM": "offscreen", "QTWEBENGINE_CHROMIUM_FLAGS": " ".join(flags)}
    from PySide6.QtCore import QTimer, QUrl
    from PySide6.QtWebEngineCore import QWebEnginePage
    from PySide6.QtWebEngineWidgets import QWebEngineView
    from PySide6.QtWidgets import QApplication

    found: dict[str, Any] = {"loaded": False, "console": [], "result": None}

    class Page(QWebEnginePage):
        def javaScriptConsoleMessage(self, level: Any, message: str, line: int, source: str) -> None:
            found["console"].append(f"{message} ({line})")

    application = QApplication(["browser"])
    view = QWebEngineView()
    view.setPage(Page(view))
    view.resize(int(width), 1000)

    def evaluated(result: Any) -> None:
        found["result"] = json.loads(result) if result else None  # nothing if the script itself is wrong
        QTimer.singleShot(300, finished)  # what the script changed is drawn by then

    def finished() -> None:
        if picture:
            view.grab().save(picture)
        application.quit()

    def loaded(well: bool) -> None:
        found["loaded"] = well
        view.page().runJavaScript(f"JSON.stringify({script})", evaluated)

    view.page().loadFinished.connect(loaded)
    view.load(QUrl.fromLocalFile(str(Path(page).resolve())))
    view.show()
    QTimer.singleShot(1000 * SECONDS, application.quit)
    application.exec()
    print(json.dumps(found), flush=True)
    os._exit(0)  # Qt's own end may take long without a display, and nothing is left to do


if __name__ == "__main__":
    main(*sys.argv[1:])
