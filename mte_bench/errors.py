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


MOST_CHOICES = 40
"""More of them are not listed in an error: nobody reads on to the end of the line."""


def did_you_mean(word: str, choices: Iterable[str], listed: bool = True) -> str:
    """``" (did you mean 'knn'?)"`` for the closest of ``choices``.

    If none is close, and ``listed``, all of them, unless they are many.
    """
    names = sorted(choices)
    close = get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f" (did you mean '{close[0]}'?)"
    return f" (one of: {', '.join(names)})" if listed and 0 < len(names) <= MOST_CHOICES else ""
