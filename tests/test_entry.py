"""Commands as a user starts them: Ctrl-C at any moment, closed standard streams, limits on the size of files."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sit_atconv.errors import INTERRUPTED, exit_on_input_error
from sit_atconv.runtime.terminal import begin_command

ROOT = Path(__file__).parents[1]
INTERRUPT_AT_TORCH = """
import os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores Ctrl-C for what it runs in the background
sys.meta_path.insert(0, Finder())
"""


def start(*words: str, **options: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, **options
    )


@pytest.mark.parametrize(
    "words",
    [
        ["train.py"],
        ["sample.py"],
        ["evaluate_fid.py"],
        ["-m", "sit_atconv.data.prepare"],
        ["-m", "sit_atconv.convert"],
        ["-m", "sit_atconv.graft"],
        ["-m", "sit_atconv.sampling.likelihood"],
        ["-m", "sit_atconv.training.power_ema"],
        ["-m", "sit_atconv.training.heldout"],
        ["-m", "sit_atconv.evaluation.digits"],
    ],
)
def test_ctrl_c_while_modules_are_imported_is_one_line(tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "sitecustomize.py").write_text(INTERRUPT_AT_TORCH)
    done = start(*words, env={"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stderr.strip()) == (
        INTERRUPTED,
        "Interrupted. What is written stays; run the same command again.",
    )


def interrupted_twice() -> int:
    """In a process of its own: Ctrl-C, and once more while what is open is closed."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    begin_command()
    with exit_on_input_error():
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
    os._exit(7)


def test_a_second_ctrl_c_ends_at_once(capfd) -> None:
    assert interrupted_twice() == INTERRUPTED
    assert capfd.readouterr().err.count("Interrupted") == 1


@pytest.mark.parametrize(("unbuffered", "code", "told"), [("", 0, ""), ("1", 2, "error: [Errno 32] Broken pipe\n")])
def test_a_reader_that_is_gone_is_no_traceback(unbuffered: str, code: int, told: str) -> None:
    program = "from sit_atconv.errors import exit_on_input_error\nwith exit_on_input_error(): print('x' * 9)"
    reader, writer = os.pipe()
    os.close(reader)
    words, environment = [sys.executable, "-c", program], {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(words, cwd=ROOT, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (code, told)


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed_are_not_taken_by_files(tmp_path: Path, closed: str) -> None:
    code = f"""
import sys
from sit_atconv.errors import exit_on_input_error
with exit_on_input_error():
    file = open({str(tmp_path / "file")!r}, "w")
    print("x"), sys.stderr.write("y")
    assert file.fileno() > 2
"""
    command = f'exec {sys.executable} -c "$CODE" {closed}'
    done = subprocess.run(command, shell=True, cwd=ROOT, env={**os.environ, "CODE": code}, capture_output=True)
    assert done.returncode == 0
    assert (tmp_path / "file").read_text() == ""


def limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def test_a_limit_on_files_is_one_line() -> None:
    code = (
        "from sit_atconv.errors import exit_on_input_error\n"
        "with exit_on_input_error(), open('/dev/shm/limited', 'wb') as file: file.write(bytes(1 << 20))"
    )
    done = start("-c", code, preexec_fn=limit_files)
    Path("/dev/shm/limited").unlink()
    assert done.returncode == 2
    assert done.stderr.startswith("error: [Errno 27] File too large")
    assert done.stderr.endswith("(ulimit -f) and run the same command again.\n")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_limit_on_files_ends_training_with_a_paragraph(tmp_path: Path) -> None:
    from training_runs import command_words

    done = start("train.py", *command_words(), "--run", str(tmp_path / "run"), preexec_fn=limit_files)
    assert done.returncode == 1
    assert "raise the limit on the size of files (ulimit -f)" in done.stderr
    assert "Traceback" not in done.stderr
