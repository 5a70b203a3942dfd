"""Processes of one command: they meet within a limit, and leave with one code and one paragraph when one fails."""

import errno
import multiprocessing
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import PartialState

from sit_atconv.errors import InputError, exit_on_input_error
from sit_atconv.runtime import peers as peers_module
from sit_atconv.runtime.peers import MINUTES, meeting_seconds
from sit_atconv.runtime.processes import leaving_in_order, process_state

QUICK = {MINUTES: "0.02"}  # 1.2 seconds


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def command(folder: Path, rank: int, world: int, environment: dict[str, str], work: Callable, arguments: tuple) -> None:
    """One process of a command that does `work` after it has met the others and exchanged a number with them."""
    torch.set_num_threads(1)
    with open(folder / f"{rank}.stderr", "a") as file:
        os.dup2(file.fileno(), 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"OMP_NUM_THREADS": "1", **environment}
    peers_module._PATIENCE = 2.0
    with exit_on_input_error(), leaving_in_order():
        state = process_state()
        state.wait_for_everyone()
        work(state, *arguments)
        state.wait_for_everyone()


def run(folder: Path, ranks: list[int], world: int, environment: dict, work: Callable, *arguments: object) -> list[int]:
    """Those `ranks` of a command of `world` processes; their exit codes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training_runs", "sklearn.datasets", "timm"])  # as in the other tests
    environment = {"MASTER_PORT": str(free_port()), **environment}
    processes = [
        context.Process(target=command, args=(folder, rank, world, environment, work, arguments)) for rank in ranks
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    return [process.exitcode for process in processes]


def said(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted(folder.glob("*.stderr")))


def nothing(state: PartialState) -> None:
    pass


def fail_on(state: PartialState, rank: int, error: BaseException) -> None:
    if state.process_index == rank:
        raise error


def fail_everywhere(state: PartialState) -> None:
    raise InputError("No such file.")


def stop_as_agreed(state: PartialState) -> None:
    raise SystemExit("The disk is full." if state.is_main_process else 1)


def kill(state: PartialState, rank: int) -> None:
    if state.process_index == rank:
        os.kill(os.getpid(), signal.SIGKILL)


def fail_while_others_work(state: PartialState) -> None:
    if state.process_index == 1:
        raise InputError("The picture is bad.")
    time.sleep(600)


def test_all_is_well(tmp_path: Path) -> None:
    assert run(tmp_path, [0, 1, 2], 3, {}, nothing) == [0, 0, 0]
    assert "Traceback" not in said(tmp_path)


@pytest.mark.parametrize(
    ("world", "rank", "error", "code", "text"),
    [
        (2, 0, InputError("The picture is bad."), 2, "error: The picture is bad."),
        (3, 2, InputError("The picture is bad."), 2, "error: The picture is bad."),
        (2, 1, PermissionError(errno.EACCES, "Permission denied", "out"), 2, "Permission denied"),
        (2, 1, OSError(errno.ENOSPC, "No space left on device"), 2, "Make room"),
        (2, 1, SystemExit("Training stopped."), 1, "Training stopped."),
        (2, 0, KeyboardInterrupt(), 130, "Interrupted."),
        (2, 1, RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), 1, "memory was short"),
    ],
)
def test_the_mistake_of_one_is_told_once_and_ends_all(tmp_path: Path, world, rank, error, code, text) -> None:
    assert run(tmp_path, list(range(world)), world, {}, fail_on, rank, error) == [code] * world
    assert said(tmp_path).count(text) == 1
    assert "Traceback" not in said(tmp_path)


def test_a_bug_of_one_is_one_traceback(tmp_path: Path) -> None:
    assert run(tmp_path, [0, 1, 2], 3, {}, fail_on, 1, ValueError("a bug")) == [1, 1, 1]
    assert said(tmp_path).count("ValueError: a bug") == 1
    assert (tmp_path / "0.stderr").read_text() == (tmp_path / "2.stderr").read_text() == ""


@pytest.mark.parametrize("work", [fail_everywhere, stop_as_agreed])
def test_the_mistake_of_all_is_told_once(tmp_path: Path, work: Callable) -> None:
    codes = run(tmp_path, [0, 1], 2, {}, work)
    assert codes == [2, 2] if work is fail_everywhere else [1, 1]
    assert len(said(tmp_path).splitlines()) == 1


def test_who_is_killed_is_missed_once(tmp_path: Path) -> None:
    assert run(tmp_path, [0, 1, 2], 3, {}, kill, 1) == [1, -signal.SIGKILL, 1]
    assert said(tmp_path).count("Another process of this command ended without") == 1
    assert "Traceback" not in said(tmp_path)


def test_who_works_on_is_ended_too(tmp_path: Path) -> None:
    assert run(tmp_path, [0, 1], 2, {}, fail_while_others_work) == [2, 2]
    assert said(tmp_path) == "error: The picture is bad.\n"


def test_who_does_not_come_is_named_and_not_waited_for_longer(tmp_path: Path) -> None:
    unhurried = {MINUTES: "0.1"}  # those missing are named after 0.6 seconds, in which process 2 may not have come
    assert run(tmp_path, [0, 2], 4, unhurried, nothing) == [2, 2]
    assert len(re.findall(r"Waiting for process 1, (?:2, )?3 of 4, for 0\.1 minutes at most\.", said(tmp_path))) == 1
    assert said(tmp_path).count("error: Process 1, 3 of 4 did not come within") == 1
    assert "Traceback" not in said(tmp_path)


def test_an_address_where_nobody_is(tmp_path: Path) -> None:
    assert run(tmp_path, [1], 2, QUICK, nothing) == [2]
    assert "Waiting for process 0 at 127.0.0.1, port" in said(tmp_path)
    assert "error: Did not find process 0 at 127.0.0.1, port" in said(tmp_path)


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        assert run(tmp_path, [0], 2, {"MASTER_PORT": str(taken.getsockname()[1])}, nothing) == [2]
    assert "error: Cannot listen on port" in said(tmp_path)


@pytest.mark.parametrize("text", ["", "soon", "0", "-1", "inf", "nan"])
def test_a_time_that_is_none_is_refused(monkeypatch, text: str) -> None:
    monkeypatch.setenv(MINUTES, text)
    with pytest.raises(InputError, match="expected a number of minutes above 0"):
        meeting_seconds()
