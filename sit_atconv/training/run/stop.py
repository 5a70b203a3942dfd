"""The ways in which training ends before its last step, each with its exit code."""

import contextlib
import ctypes
import multiprocessing
import signal
import sys
from collections.abc import Generator, Iterator
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

from sit_atconv.runtime.processes import WAIT_FOR_WORK, end_when_unable_to_send

TERMINATED = 128 + signal.SIGTERM
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class TrainingStopped(SystemExit):
    """Training cannot go on. Python prints the message to standard error and exits with code 1."""


class Termination:
    """Notices SIGTERM, which schedulers send some time before they kill, and lets all processes stop at one step.

    They tell one another beside the training: by a reduction between hosts, begun at one step and read at the next,
    so that no device is waited for. Use it as a context: outside it, SIGTERM does what it did before; but if
    `ends_process`, it is ignored once all is done. After `requested` was true, or after `settle`, nothing is under way
    between the processes.
    """

    def __init__(self, processes: int, ends_process: bool = False) -> None:
        self._received, self._ends_process = False, ends_process
        self._group = dist.new_group(backend="gloo", timeout=WAIT_FOR_WORK) if processes > 1 else None
        self._asked: tuple[dist.Work, torch.Tensor] | None = None

    def __enter__(self) -> "Termination":
        self._previous = signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ignored = self._ends_process and kind is None
        signal.signal(signal.SIGTERM, signal.SIG_IGN if ignored else self._previous)

    def requested(self) -> bool:
        """Whether to stop: the same answer on all processes. Each calls it once a step."""
        if self._group is None:
            return self._received
        if self.settle():
            return True
        flag = torch.tensor(int(self._received))
        self._asked = dist.all_reduce(flag, dist.ReduceOp.MAX, self._group, async_op=True), flag
        return False

    def settle(self) -> bool:
        """Wait for the last question's answer, and return it; False before the first."""
        if self._asked is None:
            return False
        work, flag = self._asked
        work.wait()
        self._asked = None
        return bool(flag)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self._received = True


def follow_trainer(worker: int) -> None:
    """For data loading processes: a SIGTERM to the whole group must not kill them while the trainer finishes.

    They leave when their loader is closed (see `ended`), and are killed when the trainer is gone (on Linux; elsewhere
    they notice after a while): they hold copies of its connections, by whose end other trainers see that it is gone.
    """
    end_when_unable_to_send(worker)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@contextlib.contextmanager
def ended(batches: Generator) -> Iterator[None]:
    """A context that closes a loader's batches at its end and leaves none of its processes behind.

    One that does not leave when told, because storage does not answer, would keep the trainer from it: it is killed.
    """
    others = set(multiprocessing.active_children())
    try:
        yield
    finally:
        batches.close()
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()
