"""The terminal of a command: its standard streams, which may be closed, and Ctrl-C, at any moment of its life."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

INTERRUPTED = 128 + signal.SIGINT  # exit code
INTERRUPTED_TEXT = "\nInterrupted. What is written stays; run the same command again."


def say(text: str) -> None:
    """Write a paragraph to the terminal, if anybody reads it."""
    with contextlib.suppress(BrokenPipeError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def leave_when_interrupted() -> None:
    """From now on Ctrl-C ends the process at once with one line: for commands, while their modules are imported."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, f"{INTERRUPTED_TEXT}\n".encode())
    os._exit(INTERRUPTED)


def _leave_silently(number: int, frame: FrameType | None) -> None:
    os._exit(INTERRUPTED)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt once, so that what is open is closed; a second one ends the process at once.

    Processes forked meanwhile, such as data workers, leave it to this one.
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
    """Give a process that was started without standard streams (`>&-`) some that lead nowhere.

    Else the first file that it opens would take their place, and hold what libraries print.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, as long as the process lives


def flush_output() -> None:
    """Flush the standard output; when nobody reads it, drop what is left, which would fail once more at exit."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
