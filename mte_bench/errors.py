"""What the user can mend: one line that says what is wrong, where, and what to do about it."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """A mistake in what was asked for (a path, a setting, a file): shown as one ``error:`` line, exit code 2."""


class CorruptImage(UserError):
    """An image that cannot be decoded; ``path`` names it."""

    def __init__(self, path: str, reason: str):
        super().__init__(f"{path}: not readable as an image ({reason}); mend or remove it, or allow some with --allow-corrupt N")
        self.path, self.reason = path, reason

    def __reduce__(self) -> tuple[type["CorruptImage"], tuple[str, str]]:  # crosses process borders whole
        return type(self), (self.path, self.reason)


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """``" (did you mean 'knn'?)"`` for the closest of ``choices``, or the list of them if none is close."""
    names = sorted(choices)
    close = get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f" (did you mean '{close[0]}'?)"
    return f" (one of: {', '.join(names)})" if names else ""
