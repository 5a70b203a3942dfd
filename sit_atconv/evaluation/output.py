"""A terminal whose reader may have gone."""

import os
import sys


def show(text: str) -> None:
    """Write to the terminal. A reader that has gone, as `head` does, is no mistake."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:  # what is left would fail once more when Python flushes it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
