"""Errors for the user, and their conversion to exit codes, which is done only here."""

import contextlib
import difflib
import errno
import logging
import re
import sys
from collections.abc import Iterable, Iterator

from sit_atconv.runtime.terminal import (
    INTERRUPTED,
    INTERRUPTED_TEXT,
    flush_output,
    interruptible,
    open_standard_streams,
    say,
)

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the last one is a limit on file sizes
_REMEDIES = {
    errno.ENOSPC: "Make room",
    errno.EDQUOT: "Make room",
    errno.EFBIG: "Raise the limit on the size of files (ulimit -f)",
}
_OF_THE_USER = (
    errno.EACCES,
    errno.EPERM,
    errno.ENOENT,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EROFS,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EPIPE,
)

_REASON = re.compile(r"\(os error (\d+)\)")  # in safetensors' message about a failed write
# torch's message when a data loading process is gone, with its process id and the signal.
_LOST_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: ([\w ]+))?")


class InputError(ValueError):
    """Input of the user that cannot be used. The message says what was wrong, what was expected and what to do."""


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


def describe(error: BaseException) -> tuple[int, str | None]:
    """The exit code of a command that ends with `error`, and the message for the user.

    The message is None for a programming error, which keeps its traceback, and for an exit with only a code.
    """
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, INTERRUPTED_TEXT
    if isinstance(error, SystemExit):
        return (error.code or 0, None) if isinstance(error.code, int | None) else (1, str(error.code))
    if isinstance(error, InputError):
        return 2, f"error: {error}"
    if isinstance(error, OSError) and error.errno in (*_OF_THE_USER, *_REMEDIES):
        return 2, f"error: {error}{remedy(error)}"
    if (reason := _REASON.search(str(error))) and int(reason[1]) in _REMEDIES:
        return 2, f"error: {error}.{remedy(OSError(int(reason[1]), ''))}"
    if worker := _LOST_WORKER.match(str(error)):
        how = f"was killed ({worker[2]})" if worker[2] else "ended unexpectedly"
        return 1, (
            f"error: A process that loads data (pid {worker[1]}) {how}. Most likely memory was short: the main memory, "
            "or the shared memory in /dev/shm (a Docker container has 64 MB unless it is started with --shm-size 8g "
            "or --ipc=host), or files may not be as large as a batch (ulimit -f). Take smaller batches or fewer "
            "workers (0 needs no shared memory), and run the same command again."
        )
    return 1, None


def remedy(error: BaseException) -> str:
    """A sentence that says how to continue after an `OSError` that a retry can solve; otherwise empty."""
    what = _REMEDIES.get(getattr(error, "errno", None))
    return f" {what} and run the same command again." if what else ""


@contextlib.contextmanager
def exit_on_input_error() -> Iterator[None]:
    """Wrap a command's main function: a user's mistake ends it with one paragraph and exit code 2, without traceback.

    Programming errors keep their traceback. A file that cannot be read or written and a full disk count as mistakes of
    the user. Ctrl-C ends the command with code 130, a second Ctrl-C at once. A closed standard output, as after
    `| head`, is not an error.
    """
    open_standard_streams()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with interruptible():
        try:
            yield
        except BaseException as error:
            code, text = describe(error)
            if text is None:
                raise
            say(text)
            sys.exit(code)
        finally:
            flush_output()
