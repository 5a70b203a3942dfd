"""The ways in which training ends before its last step, each with its exit code."""

import contextlib
import multiprocessing
import signal
from collections.abc import Generator, Iterator
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

from sit_atconv.runtime.processes import WAIT_FOR_WORK, die_with_parent, end_when_unable_to_send

TERMINATED = 128 + signal.SIGTERM


class TrainingStopped(SystemExit):
    """Training cannot go on. Python prints the message to standard error and exits with code 1."""


class Termination:
    """Notices SIGTERM, which schedulers send some time before they kill, and stops all processes at the same step.

    It also gives all processes the same clock, `seconds`: that of the main process. The processes inform one another by
    an asynchronous all-reduce on the CPU, begun at one step and read at the next, so no device is waited for. Use it as
    a context manager: on exit the previous handler of SIGTERM is restored or, if `ends_process` and without an error,
    SIGTERM is ignored. After `requested` returned True, or after `settle`, no communication between the processes is
    pending.
    """

    def __init__(self, processes: int, ends_process: bool = False) -> None:
        self._received, self._ends_process = False, ends_process
        self._group = dist.new_group(backend="gloo", timeout=WAIT_FOR_WORK) if processes > 1 else None
        self._asked: tuple[dist.Work, torch.Tensor] | None = None
        self.seconds = 0.0

    def __enter__(self) -> "Termination":
        self._previous = signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ignored = self._ends_process and kind is None
        signal.signal(signal.SIGTERM, signal.SIG_IGN if ignored else self._previous)

    def requested(self, seconds: float) -> bool:
        """Whether to stop: the same answer on all processes. Each calls it once a step.

        `seconds` is the main process's clock, and 0 on the others; `self.seconds` becomes what it was then, or a step
        before if there are several processes.
        """
        if self._group is None:
            self.seconds = seconds
            return self._received
        if self.settle():
            return True
        told = torch.tensor([float(self._received), seconds], dtype=torch.float64)
        self._asked = dist.all_reduce(told, dist.ReduceOp.MAX, self._group, async_op=True), told
        return False

    def settle(self) -> bool:
        """Wait for the pending all-reduce and return its result; False if none is pending."""
        if self._asked is None:
            return False
        work, told = self._asked
        work.wait()
        self._asked = None
        received, self.seconds = told.tolist()
        return bool(received)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self._received = True


def follow_trainer(worker: int) -> None:
    """For data loader workers: a SIGTERM to the whole process group must not kill them while the trainer finishes.

    They exit when their loader is closed (see `ended`). On Linux they are killed when the trainer dies (elsewhere they
    notice after a while), because they hold copies of its connections, and other trainers notice its death only when
    these are closed.
    """
    end_when_unable_to_send(worker)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    die_with_parent()


@contextlib.contextmanager
def ended(batches: Generator) -> Iterator[None]:
    """A context manager that closes a loader's batches on exit and leaves none of its workers behind.

    A worker that does not exit when told to, because storage does not answer, is killed: it would keep the trainer from
    exiting.
    """
    others = set(multiprocessing.active_children())
    try:
        yield
    finally:
        batches.close()
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()
