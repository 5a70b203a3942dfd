"""What ends a command with one line, and what keeps its traceback."""

import errno
import os

import pytest

from sit_atconv.errors import InputError, exit_on_input_error


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("no such solver"), 2, "error: no such solver"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x.npz"), 2, "x.npz"),
        (FileExistsError(errno.EEXIST, "File exists", "out"), 2, "'out'"),
        (OSError(errno.EROFS, "Read-only file system", "/mnt/x"), 2, "Read-only file system: '/mnt/x'"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "Make room and run the same command again."),
        (KeyboardInterrupt(), 130, "Interrupted"),
    ],
)
def test_a_users_mistake_is_one_line(error: BaseException, code: int, message: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended, exit_on_input_error():
        raise error
    assert ended.value.code == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError(errno.EBADF, os.strerror(errno.EBADF))])
def test_a_bug_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)), exit_on_input_error():
        raise error
