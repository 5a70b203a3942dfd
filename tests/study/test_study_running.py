"""Cells in work: order, failures, locks, signals, several at once. The programs are lines for a shell."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tqdm import tqdm

from sit_atconv.errors import InputError
from sit_atconv.runtime.lock import lock_folder
from sit_atconv.study import progress, running
from sit_atconv.study.commands import Command, cell_folder
from sit_atconv.study.plan import Budgets, CellName, Plan
from sit_atconv.study.running import Outcome, Runner, places
from sit_atconv.study.work import ERROR, LOG, last_lines, machines

PLAN = Plan("base.yaml", {"a": {}, "b": {}}, [0, 1], Budgets(steps=10))
CELLS = list(PLAN.cells())


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What the cells run, by row: a line for a shell that makes $OUT, which is the cell's only result."""
    told: dict[str, str] = {}

    def commands(plan: Plan, folder: Path, cell: CellName) -> list[Command]:
        out = cell_folder(folder, cell) / "result"
        script = f"OUT={out}; {told.get(cell.row, 'touch $OUT')}"
        return [Command("working", ("/bin/sh", "-c", script), (out,))]

    monkeypatch.setattr(running, "cell_commands", commands)
    monkeypatch.setattr(running, "_PAUSE", 0.01)
    return told


def run(folder: Path, parallel: int = 1, cells: list[CellName] = CELLS) -> Outcome:
    return Runner(PLAN, folder, parallel, lambda: None).run(cells)


@pytest.mark.parametrize("parallel", [1, 3])
def test_all_cells_are_done_and_nothing_is_run_again(lines: dict, tmp_path: Path, parallel: int) -> None:
    lines["a"] = lines["b"] = "echo x >> $OUT"
    assert sorted(map(str, run(tmp_path, parallel).done)) == sorted(map(str, CELLS))
    assert sorted(map(str, run(tmp_path, parallel).done)) == sorted(map(str, CELLS))
    assert {path.read_text() for path in tmp_path.rglob("result")} == {"x\n"}
    assert not list(tmp_path.rglob(".lock"))
    text = "1 cell at once" if parallel == 1 else "3 cells at once"
    assert text in machines(cell_folder(tmp_path, CELLS[0]))[0]


def test_a_cell_that_fails_is_named_and_the_others_go_on(lines: dict, tmp_path: Path, caplog) -> None:
    lines["a"] = "echo the reason; exit 7"
    with caplog.at_level(logging.INFO):
        outcome = run(tmp_path)
    assert [str(cell) for cell in outcome.failed] == ["a/steps-0", "a/steps-1"]
    assert [str(cell) for cell in outcome.done] == ["b/steps-0", "b/steps-1"]
    said = (cell_folder(tmp_path, CELLS[0]) / ERROR).read_text()
    assert "a/steps-0: working ended with exit code 7" in said and "the reason" in said and LOG in said
    assert said.strip() in caplog.text

    lines["a"] = "touch $OUT"  # the next start tries it again
    assert len(run(tmp_path).done) == 4
    assert not list(tmp_path.rglob(ERROR))


def test_a_program_that_ends_without_its_result_has_failed(lines: dict, tmp_path: Path) -> None:
    lines["a"] = "true"
    lines["b"] = "kill -9 $$"
    assert len(run(tmp_path).failed) == 4
    assert "ended without its result" in (cell_folder(tmp_path, CELLS[0]) / ERROR).read_text()
    assert "was ended by SIGKILL" in (cell_folder(tmp_path, CELLS[1]) / ERROR).read_text()


def test_a_cell_that_another_process_runs_is_left_alone(lines: dict, tmp_path: Path) -> None:
    held = cell_folder(tmp_path, CELLS[0])
    script = (
        "import sys, time; from pathlib import Path; from sit_atconv.runtime.lock import lock_folder\n"
        "with lock_folder(Path(sys.argv[1]), 'run', '--out'): print(flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(held)], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        outcome = run(tmp_path)
        other.kill()
    assert [str(cell) for cell in outcome.elsewhere] == ["a/steps-0"]
    assert len(outcome.done) == 3 and not (held / "result").exists()
    assert len(run(tmp_path).done) == 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_handed_on_and_what_the_program_does_then_is_waited_for(
    lines: dict, tmp_path: Path, number: int
) -> None:
    lines["a"] = (
        "trap 'echo saved > $OUT.saved; exit 143' TERM; touch $OUT.begun; for i in $(seq 2000); do sleep 0.05; done"
    )
    begun, before = cell_folder(tmp_path, CELLS[0]) / "result.begun", signal.getsignal(signal.SIGTERM)
    sender = threading.Thread(target=lambda: (wait_for(begun), os.kill(os.getpid(), number)))
    sender.start()
    outcome = run(tmp_path)
    sender.join()
    assert (outcome.stopped, outcome.done, outcome.failed) == (number, [], [])
    assert begun.with_name("result.saved").exists() and not list(tmp_path.rglob(ERROR))
    assert signal.getsignal(signal.SIGTERM) is before

    lines["a"] = "touch $OUT"
    assert len(run(tmp_path).done) == 4


def test_the_second_signal_kills(lines: dict, tmp_path: Path) -> None:
    lines["a"] = "trap 'touch $OUT.asked' TERM; touch $OUT.begun; for i in $(seq 2000); do sleep 0.05; done"
    out = cell_folder(tmp_path, CELLS[0]) / "result"

    def send() -> None:
        for waited in ("begun", "asked"):
            wait_for(out.with_name(f"result.{waited}"))
            os.kill(os.getpid(), signal.SIGINT)

    sender = threading.Thread(target=send)
    sender.start()
    assert run(tmp_path).stopped == signal.SIGINT
    sender.join()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_killed_study_leaves_no_program_running(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from sit_atconv.study.commands import Command\n"
        "from sit_atconv.study.plan import CellName; from sit_atconv.study.work import Work\n"
        "folder = Path(sys.argv[1]); line = f'echo $$ > {folder}/new; mv {folder}/new {folder}/pid; sleep 600'\n"
        "command = Command('working', ('/bin/sh', '-c', line), (folder / 'x',))\n"
        "work = Work(CellName('a', 'steps', 0), [command], folder, 'm', {})\n"
        "work.advance(); time.sleep(600)"
    )
    study = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)])
    wait_for(tmp_path / "pid")
    study.kill()
    study.wait()
    program = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/stat")
    deadline = time.monotonic() + 30
    while program.exists() and program.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with lock_folder(tmp_path, "run", "--out"):
        pass


def test_threads_are_shared_and_each_cell_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(running.torch.cuda, "device_count", lambda: 0)
    assert [place.variables["OMP_NUM_THREADS"] for place in places(3)] == ["2"] * 3
    assert "8 threads a cell, 1 cell at once" in places(1)[0].machine

    monkeypatch.setattr(running.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(running.torch.cuda, "get_device_name", lambda number: "H200")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [place.variables["CUDA_VISIBLE_DEVICES"] for place in places(2)] == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    assert [place.variables["CUDA_VISIBLE_DEVICES"] for place in places(2)] == ["5", "3"]
    with pytest.raises(InputError, match="--parallel 3: each cell needs a GPU of its own, and there are 2"):
        places(3)


def test_of_a_progress_bar_only_the_last_state_is_shown(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"before\n$ train\none\n 1/9\r 5/9\r 9/9\nerror: two\n\n")
    assert last_lines(tmp_path / "log", 7) == ["$ train", "one", " 9/9", "error: two"]


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 300
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_progress_follows_the_log_and_estimates_the_time_left(tmp_path: Path, monkeypatch, caplog) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    shown = progress.Progress(PLAN, tmp_path, 4, tqdm(disable=True))
    run = cell_folder(tmp_path, CELLS[0]) / "run"
    run.mkdir(parents=True)
    shown.begin(CELLS[0])
    shown.show([(CELLS[0], "training")])
    (run / "log.jsonl").write_text('{"step": 5, "seconds": 1.5}\n{"step": 5, "heldout_loss": 1.0}\n{"step": 6, "se')
    now[0] = 100.0
    with caplog.at_level(logging.INFO):
        shown.show([(CELLS[0], "training")])
    assert caplog.messages == ["cell 1 of 4: a/steps-0, training, step 5; 11:40 left"]  # half a cell took 100 s

    shown.end(CELLS[0], worked=True)
    shown.begin(CELLS[1])
    shown.end(CELLS[1], worked=False)  # it was done already
    shown.begin(CELLS[2])
    now[0] = 200.0
    with caplog.at_level(logging.INFO):
        shown.show([(CELLS[2], "sampling")])
    assert caplog.messages[1] == "cell 3 of 4: a/steps-1, sampling; 06:40 left"
