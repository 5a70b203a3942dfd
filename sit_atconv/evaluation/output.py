"""Output to a terminal or a pipe that may be closed."""

import os
import sys


def show(text: str) -> None:
    """Write to standard output; a pipe that its reader, such as `head`, has closed is not an error."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:  # Python would fail again when it flushes the rest at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
