#!/usr/bin/env python3
"""Set everything up and go, on a machine with Python and git:

    python3 bench.py quickstart    pre-train two small encoders, evaluate them, write a report
    python3 bench.py test          run the tests
    python3 bench.py VERB ...      any other verb of mte-bench; python3 bench.py --help lists them

What is needed is installed inside this folder (.venv, and .uv if uv is not on the PATH); the system's Python stays as it is.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
UV_FOLDER = HERE / ".uv"
UV_NEEDED = (0, 5)
DENSE = ("coco", "ade20k")  # verbs that need OpenMMLab


def main(words: list) -> None:
    if not words:
        print(__doc__.strip())
        return
    environment = dict(os.environ, UV_SYSTEM_CERTS="1", UV_NATIVE_TLS="1")  # trust whom git and pip trust
    environment.pop("VIRTUAL_ENV", None)
    command = [find_uv(), "run", "--project", str(HERE)]
    if words[0] == "test":
        environment.setdefault("OMP_NUM_THREADS", "1")  # the tests run side by side
        os.chdir(HERE)
        command += ["--extra", "dev", "pytest", "-n", "auto", "--maxprocesses", "4", *words[1:]]
    else:
        command += [*(["--extra", "dense"] if words[0] in DENSE else []), "mte-bench", *words]
    os.execve(command[0], command, environment)


def find_uv() -> str:
    """The uv on the PATH, or a private one, which is installed if it is not there yet."""
    private = UV_FOLDER / "bin" / "uv"
    for uv in (shutil.which("uv"), str(private)):
        if uv and usable(uv):
            return uv
    print("bench.py: installing uv into .uv", file=sys.stderr)
    pip_install = ["-m", "pip", "install", "uv"]
    ways = (
        [[sys.executable, "-m", "venv", str(UV_FOLDER)], [str(UV_FOLDER / "bin" / "python"), *pip_install]],
        # Debian has venv in a package of its own; a target folder is allowed even where plain pip install is refused.
        [[sys.executable, *pip_install, "--target", str(UV_FOLDER)]],
    )
    for steps in ways:
        shutil.rmtree(str(UV_FOLDER), ignore_errors=True)
        if all(quietly(step) for step in steps) and usable(str(private)):
            return str(private)
    return sys.exit(
        "error: uv cannot be installed: this Python has neither venv nor pip, or the package index cannot be reached; "
        "install uv (or, on Debian and Ubuntu, python3-venv) and run this again"
    )


def usable(uv: str) -> bool:
    try:
        text = subprocess.check_output([uv, "--version"], stderr=subprocess.DEVNULL).decode()
    except (OSError, subprocess.CalledProcessError):
        return False
    found = re.search(r"(\d+)\.(\d+)", text)
    return found is not None and tuple(map(int, found.groups())) >= UV_NEEDED


def quietly(command: list) -> bool:
    try:
        return subprocess.call(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0
    except OSError:
        return False


if __name__ == "__main__":
    main(sys.argv[1:])
