"""``mte-bench VERB``: find the command of a verb, run it, and turn every failure into an honest line and exit code.

Commands are entry points of the group ``mte_bench.commands`` (verb -> a function with typer's annotations, or a
``typer.Typer`` of several), so a command's module is imported when its verb is called, and another package can add verbs.
An entry point called ``VERB.COMMAND`` adds a command to the several of VERB.

Exit codes: 0 done; 1 a check that failed, or a bug; 2 something the user can mend; 130 interrupted.
"""

import errno
import os
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint, PackageNotFoundError, distribution, entry_points
from typing import TYPE_CHECKING, Any

from mte_bench import __version__
from mte_bench.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import typer

GROUP = "mte_bench.commands"
STDOUT = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """The program. ``--debug``, anywhere, adds the traceback of an error."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    try:
        code = _answer([word for word in given if word != "--debug"])
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        _say("interrupted", debug)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_gone():
            return 1
        line = mendable(error)
        if line is None:
            _say("this is a bug, not your mistake; please report the lines above and what 'mte-bench doctor' prints", True)
            return 1
        _say(f"error: {line}", debug)
        return 2


def run(arguments: Sequence[str]) -> Any:
    """Run one command as if typed and return what its function returns; raises whatever goes wrong.

    >>> record = run(["knn", "timm:vit_small_patch16_224", "--data", "scenes"])  # doctest: +SKIP
    """
    verb, *rest = arguments
    path, command = f"mte-bench {verb}", _command(verb)
    # A group of commands is walked here and its own callback is not called: parsing it would import pydantic for --help.
    while hasattr(command, "commands"):
        if not rest or rest[0] not in command.commands:
            _extend(command, verb)
        if rest[:1] in (["-h"], ["--help"]):
            break
        if not rest or rest[0] not in command.commands:
            wrong = f"'{rest[0]}' is none of its commands" if rest else "say which command"
            raise UserError(f"{path}: {wrong}{did_you_mean(rest[0] if rest else '', command.commands)}")
        path, verb, command, rest = f"{path} {rest[0]}", f"{verb}.{rest[0]}", command.commands[rest[0]], rest[1:]
    with command.make_context(path, rest, help_option_names=["-h", "--help"]) as context:
        return command.invoke(context)


def commands() -> dict[str, EntryPoint]:
    """Every verb that is installed, and as ``verb.command`` what is added to one; this package's own cannot be taken over."""
    return {entry.name: entry for entry in [*entry_points(group=GROUP), *_own()]}


def _answer(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    if arguments[0] == "--version":
        print(f"mte-bench {__version__}")
        return 0
    if arguments[0].startswith("-"):
        raise UserError(f"unknown option '{arguments[0]}'; write mte-bench VERB [OPTIONS], see mte-bench --help")
    import typer

    try:
        result = run(arguments)
    except typer.Exit as leave:  # --help, and commands that fail a check
        return leave.exit_code
    return result if isinstance(result, int) else 0


def _own() -> list[EntryPoint]:
    """The entry points of this distribution: one file, where asking all installed packages takes a file each."""
    try:
        return [entry for entry in distribution("mte-bench").entry_points if entry.group == GROUP]
    except PackageNotFoundError:
        return []


def _command(verb: str) -> Any:
    entry = next((entry for entry in _own() if entry.name == verb), None) or commands().get(verb)
    if entry is None or "." in verb:
        raise UserError(f"unknown verb '{verb}'{did_you_mean(verb, [known for known in commands() if '.' not in known])}")
    return _parser(verb, entry.load())


def _extend(group: Any, verb: str) -> None:
    """Give ``group``, the commands of ``verb``, those that other entry points add to it; its own stay what they are."""
    for name, entry in commands().items():
        parent, _, child = name.rpartition(".")
        if parent == verb and child not in group.commands:
            group.commands[child] = _parser(child, _loaded(entry))


def _loaded(entry: EntryPoint) -> Any:
    """What ``entry`` stands for; if it cannot be imported, a command that says so in the group's help and when called."""
    try:
        return entry.load()
    except Exception as error:
        reason = error

    def broken() -> None:
        raise reason

    broken.__doc__ = f"(cannot be imported: {reason})"
    return broken


def _parser(verb: str, target: Any) -> Any:
    """The command line of ``target``. Plain help: typer's rich help takes a quarter of a second to import."""
    import typer

    if isinstance(target, typer.Typer):
        target.rich_markup_mode = None
        return typer.main.get_group(target)
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(verb)(target)
    return typer.main.get_command(app)


def _help() -> str:
    lines = [
        "Usage: mte-bench VERB [OPTIONS]",
        "",
        "  Pre-train image encoders with Multi-Token Enhancing and measure what any encoder is worth.",
        "  (Not the text-embedding benchmark MTEB.)",
        "",
        "  Start with:  mte-bench quickstart",
        "",
        "Verbs:",
    ]
    found = {verb: entry for verb, entry in commands().items() if "." not in verb}
    width = max(map(len, found), default=0)
    lines += [f"  {verb:<{width}}  {_summary(verb, found[verb])}" for verb in sorted(found)]
    lines += [
        "",
        "Options:",
        "  --version   print the version",
        "  --debug     with any verb: show the traceback of an error",
        "  -h, --help  of the program, or of a verb: mte-bench VERB --help",
    ]
    return "\n".join(lines)


def _summary(verb: str, entry: EntryPoint) -> str:
    try:
        text = _parser(verb, entry.load()).help or ""
    except Exception as error:  # one broken package must not take the help of all others with it
        return f"(cannot be imported: {error})"
    return " ".join(text.strip().partition("\n\n")[0].split()).rstrip(".")


def mendable(error: Exception) -> str | None:
    """The one line for an error that the user can mend, None for a bug."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in _DISK:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{os.strerror(error.errno or 0).lower()}; {_DISK[error.errno]}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's own, without importing torch
        return "out of memory; choose a smaller --batch-size or fewer --workers"
    if "typer" in sys.modules and isinstance(error, sys.modules["typer"].TyperException):
        return _usage(error)
    return None


_DISK = {
    errno.ENOSPC: "free space or choose another --out",
    errno.EDQUOT: "free space or choose another --out",
    errno.EFBIG: "raise the limit on file sizes or choose another --out",
    errno.EROFS: "choose another --out",
    errno.EACCES: "change its permissions or choose another",
    errno.EPERM: "change its permissions or choose another",
}


def _usage(error: "typer.TyperException") -> str:
    """A mistake in the words of the command line, as one line that says where to look."""
    message = " ".join(error.format_message().split()).rstrip(".")
    message = message[:1].lower() + message[1:]
    context = getattr(error, "ctx", None)
    if context is None:
        return message
    option = getattr(error, "option_name", None)
    if option and hasattr(error, "possibilities"):  # an option that does not exist
        known = [name for parameter in context.command.get_params(context) for name in parameter.opts if name[0] == "-"]
        message = f"unknown option '{option}'{did_you_mean(option, known)}"
    return f"{context.command_path}: {message}; see {context.command_path} --help"


def _reader_gone() -> bool:
    """Whether whoever read stdout closed it (``mte-bench list archs | head``); what is still buffered goes nowhere then."""
    import select

    poll = select.poll()
    poll.register(STDOUT, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)
    return True


def _say(line: str, traceback: bool) -> None:
    if traceback:
        import traceback as tracebacks

        tracebacks.print_exc()
    print(line, file=sys.stderr, flush=True)
