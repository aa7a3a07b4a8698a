"""The errors that a user can mend: one sentence that names the thing, what was found, and the mend."""

import difflib
from collections.abc import Iterable

EXIT_USER_ERROR = 2


class UserError(Exception):
    """A user's mistake. The command line prints its message without a traceback and exits with 2."""


class BadRecord(UserError):
    """One record, image or raster that cannot be used; training replaces it by an empty sample."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word most like `word`, as the end of an error message; empty when none is close.

    >>> nearest("B8", ["B02", "B08"])
    '; did you mean "B08"?'
    """
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f'; did you mean "{match[0]}"?' if match else ""
