"""The terminal of a command: its standard streams, which may be closed, and Ctrl-C, which may come at any time."""

import contextlib
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from types import FrameType

INTERRUPTED = 128 + signal.SIGINT  # exit code
INTERRUPTED_TEXT = "\nInterrupted. What is written stays; run the same command again."


def say(text: str) -> None:
    """Write a paragraph to standard error, and ignore a closed pipe."""
    with contextlib.suppress(BrokenPipeError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def begin_command() -> None:
    """Prepare for the imports of a command, which take seconds: Ctrl-C ends the process at once with one line.

    Without a folder for temporary files, which torch needs when it is imported, the process ends with a paragraph.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    try:
        tempfile.gettempdir()
    except OSError as error:
        say(f"error: {error.strerror}: make room, raise the limit on the size of files (ulimit -f), or set TMPDIR.")
        sys.exit(2)


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, f"{INTERRUPTED_TEXT}\n".encode())
    os._exit(INTERRUPTED)


def _leave_silently(number: int, frame: FrameType | None) -> None:
    os._exit(INTERRUPTED)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let the first Ctrl-C raise KeyboardInterrupt, so that files are closed; a second one ends the process at once.

    Processes forked meanwhile, such as data workers, ignore it.
    """
    before, process = signal.getsignal(signal.SIGINT), os.getpid()
    if before not in (signal.default_int_handler, _leave) or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        if os.getpid() == process:
            signal.signal(signal.SIGINT, _leave)
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        interrupted = signal.getsignal(signal.SIGINT) is not interrupt
        signal.signal(signal.SIGINT, _leave_silently if before is _leave and interrupted else before)


def open_standard_streams() -> None:
    """Open /dev/null for the standard streams that a process was started without (`>&-`).

    Otherwise the first file that it opens would take their place and receive what libraries print.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, open as long as the process lives


def flush_output() -> None:
    """Flush standard output; if the pipe is closed, discard the rest, which would raise an error again at exit."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
