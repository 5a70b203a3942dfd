"""Errors for the person at the keyboard, and the one place that turns them into an exit code."""

import contextlib
import difflib
import errno
import logging
import sys
from collections.abc import Iterable, Iterator

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
_OF_THE_USER = (
    *FULL_DISK,
    errno.EACCES,
    errno.EPERM,
    errno.ENOENT,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EROFS,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)


class InputError(ValueError):
    """Something the user gave cannot be used. The message says what was wrong, what was expected and what to do."""


def nearest(word: str, allowed: Iterable[str]) -> str:
    """A hint such as ``did you mean 'euler'?``, or the allowed values when nothing is close."""
    allowed = [str(a) for a in allowed]
    matches = difflib.get_close_matches(word, allowed, n=1, cutoff=0.5)
    return f"did you mean '{matches[0]}'?" if matches else f"allowed: {', '.join(allowed)}."


def require_one_of(value: str, allowed: Iterable[str], what: str) -> None:
    """Raise `InputError` naming the allowed values unless `value` is one of them."""
    allowed = list(allowed)
    if value not in allowed:
        raise InputError(f"Unknown {what} '{value}': {nearest(value, allowed)} All of them: {', '.join(allowed)}.")


@contextlib.contextmanager
def exit_on_input_error() -> Iterator[None]:
    """Wrap a command's main function: a user's mistake ends it with one paragraph and exit code 2, no traceback.

    Programming errors keep their traceback. A file that cannot be read or written counts as the user's, and so does a
    full disk. Ctrl-C ends it with code 130.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write("\nInterrupted. What is written stays; run the same command again.\n")
        sys.exit(130)
    except (InputError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _OF_THE_USER:
            raise
        full = ". Make room and run the same command again." if getattr(error, "errno", None) in FULL_DISK else ""
        sys.stderr.write(f"error: {error}{full}\n")
        sys.exit(2)
