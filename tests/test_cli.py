"""The command line: quick help, and an honest exit code and one line for whatever goes wrong."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from typing import Annotated, Any

import pytest
import typer

from mte_bench import cli
from mte_bench.errors import UserError

HEAVY = ("torch", "numpy", "pydantic", "matplotlib", "rich", "timm", "PIL", "yaml")
VERBS = sorted(verb for verb in cli.commands() if "." not in verb)


def offer(monkeypatch: pytest.MonkeyPatch, **targets: Any) -> None:
    """Let another package offer commands."""

    class Offered:
        def __init__(self, name: str, target: Any):
            self.name, self.target = name, target

        def load(self) -> Any:
            return self.target

    offered = [Offered(name, target) for name, target in targets.items()]
    monkeypatch.setattr(cli, "entry_points", lambda group: offered)


def raising(error: BaseException) -> Callable[[], None]:
    def command() -> None:
        raise error

    return command


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The program as a person starts it."""
    return subprocess.run([sys.executable, "-m", "mte_bench", *arguments], capture_output=True, text=True, timeout=120)


def test_the_verbs_of_the_design_are_there() -> None:
    evaluations = {"knn", "linear", "retrieval", "analyze", "run"}
    wanted = {"quickstart", "pretrain", *evaluations, "report", "compare", "check", "list", "inspect", "export", "data", "doctor"}
    assert wanted <= set(VERBS)


@pytest.mark.parametrize("arguments", [["--help"], *([verb, "--help"] for verb in VERBS)], ids=" ".join)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    """What makes ``--help`` quick, measured so that a busy machine cannot fail it: 0.13 s on an idle one."""
    code = f"""
import socket, sys
def refuse(*_): raise AssertionError("help must not use the network")
socket.socket.connect = refuse
from mte_bench.cli import main
code = main({arguments!r})
heavy = [name for name in {HEAVY!r} if name in sys.modules]
assert not heavy, heavy
sys.exit(code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Usage: mte-bench" in done.stdout
    assert "cannot be imported" not in done.stdout


def test_subcommands_have_quick_help_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "write", "--help"]) == 0
    assert capsys.readouterr().out.startswith("Usage: mte-bench data write ")


def test_version_and_bare_program(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("mte-bench 0.")
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    assert all(f"  {verb}" in text for verb in VERBS)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["quickstrat"], "unknown verb 'quickstrat' (did you mean 'quickstart'?)"),
        (["--jsn"], "unknown option '--jsn'"),
        (["doctor", "--jsn"], "mte-bench doctor: unknown option '--jsn' (did you mean '--json'?); see mte-bench doctor --help"),
        (["doctor", "now"], "mte-bench doctor: got unexpected extra argument(s) (now); see"),
        (["list"], "mte-bench list: missing argument 'WHAT'; see mte-bench list --help"),
        (["list", "recipe"], "nothing is called 'recipe' (did you mean 'recipes'?)"),
        (["list", "recipes", "no_such*"], "list recipes: no name is like 'no_such*'"),
        (["data"], "mte-bench data: say which command (one of:"),
        (["data", "wirte"], "mte-bench data: 'wirte' is none of its commands (did you mean 'write'?)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage_errors_are_one_line(arguments: list[str], expected: str, error_line: Callable[..., str]) -> None:
    assert expected in error_line(*arguments)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (UserError("a.yaml: this is wrong;\n  do that"), "error: a.yaml: this is wrong; do that"),
        (OSError(errno.ENOSPC, "x", "/disk/file"), "error: /disk/file: no space left on device; free space or choose another"),
        (PermissionError(errno.EACCES, "x", "/root/file"), "error: /root/file: permission denied; change its permissions"),
        (MemoryError(), "error: out of memory; choose a smaller --batch-size"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_mendable_errors(
    error: Exception,
    expected: str,
    error_line: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    offer(monkeypatch, fail=raising(error))
    assert error_line("fail").startswith(expected)
    assert cli.main(["fail", "--debug"]) == 2
    shown = capsys.readouterr().err.splitlines()
    assert shown[0].startswith("Traceback") and shown[-1].startswith(expected)


def test_bugs_show_their_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    offer(monkeypatch, fail=raising(ZeroDivisionError("surprise")))
    assert cli.main(["fail"]) == 1
    shown = capsys.readouterr().err
    assert "ZeroDivisionError: surprise" in shown and "this is a bug" in shown.splitlines()[-1]
    offer(monkeypatch, fail=raising(FileNotFoundError(errno.ENOENT, "x", "y")))  # a path that nobody checked is a bug too
    assert cli.main(["fail"]) == 1


def test_interrupt_is_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    offer(monkeypatch, fail=raising(KeyboardInterrupt()))
    assert cli.main(["fail"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_another_package_adds_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def greet(name: str, loud: Annotated[bool, typer.Option("--loud")] = False) -> str:
        """Say hello.

        At length.
        """
        return name.upper() if loud else name

    def fail_check() -> None:
        raise typer.Exit(1)

    offer(monkeypatch, greet=greet, verify=fail_check, knn=raising(AssertionError("knn was taken over")))
    assert cli.run(["greet", "anna", "--loud"]) == "ANNA"
    assert cli.main(["greet", "anna"]) == 0
    assert cli.main(["verify"]) == 1
    assert cli.main([]) == 0
    assert "greet       Say hello\n" in capsys.readouterr().out
    assert cli.main(["knn", "--help"]) == 0  # its own verbs stay what they are


def test_another_package_adds_a_command_to_a_group(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def price(recipe: str) -> str:
        """What it costs."""
        return recipe.upper()

    offer(monkeypatch, **{"analyze.price": price, "analyze.cka": raising(AssertionError("cka was taken over"))})
    assert cli.run(["analyze", "price", "cheap"]) == "CHEAP"
    assert cli.main(["analyze", "--help"]) == 0
    assert "price" in (shown := capsys.readouterr().out) and "What it costs." in shown and "cka" in shown
    assert cli.main(["analyze", "cka", "--help"]) == 0
    assert "linear CKA" in capsys.readouterr().out
    assert cli.main([]) == 0
    assert "price" not in capsys.readouterr().out
    assert cli.main(["analyze.price", "cheap"]) == 2
    assert cli.main(["analyze", "pricy"]) == 2
    assert "did you mean 'price'?" in capsys.readouterr().err


def test_a_broken_command_does_not_break_its_group(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    broken = EntryPoint("analyze.broken", "no_such_module:command", cli.GROUP)
    monkeypatch.setattr(cli, "entry_points", lambda group: [broken])
    assert cli.main(["analyze", "--help"]) == 0
    assert "broken" in (shown := capsys.readouterr().out) and "No module named" in " ".join(shown.split())
    assert cli.main(["analyze", "broken"]) == 1


def test_a_broken_package_does_not_break_the_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "entry_points", lambda group: [EntryPoint("broken", "no_such_module:command", group)])
    assert cli.main([]) == 0
    assert "broken      (cannot be imported: No module named 'no_such_module')" in capsys.readouterr().out


def test_a_reader_may_leave() -> None:
    """``mte-bench ... | head -1`` ends without a word on stderr."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "mte_bench"], stdout=write, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_doctor_answers_for_people_and_programs() -> None:
    shown = run("doctor", "--json")
    findings = json.loads(shown.stdout)
    assert {"python", "torch", "torchvision", "device", "threads", "faiss", "memory", "cache"} <= {f["name"] for f in findings}
    assert shown.returncode == int(any(finding["mend"] for finding in findings))


def test_doctor_sees_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    from mte_bench.doctor import examine

    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (cache,) = [finding for finding in examine() if finding.name == "cache"]
    assert cache.mend is not None and "cannot be written" in cache.mend


@pytest.mark.parametrize("what", ["recipes", "protocols", "tasks", "suites", "methods", "archs"])
def test_catalogues_list_names(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", what, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    names = [row["name"] for row in rows]
    assert names and len(set(names)) == len(names)
    assert cli.main(["list", what, names[0]]) == 0
    assert names[0] in capsys.readouterr().out
