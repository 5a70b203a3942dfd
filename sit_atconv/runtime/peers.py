"""The processes of a command: they wait for one another at the start, and all end when one of them fails.

They communicate through the key-value store of torch.distributed, which the launcher or process 0 hosts. Each process
has its own connection, so the store answers even while collective operations hang.
"""

import json
import logging
import os
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from sit_atconv.errors import InputError, describe
from sit_atconv.runtime.reading import positive_from_environment
from sit_atconv.runtime.terminal import say

log = logging.getLogger(__name__)

MINUTES = "SITATCONV_MEETING_MINUTES"  # environment variable: how long processes wait for one another at the start
_DEFAULT_MINUTES = 10.0
_FIRST_WORD = 0.1  # the fraction of that time after which missing processes are reported
_KEY = "sit_atconv"
_INTERVAL = 0.5  # seconds between two queries of the store
_PATIENCE = 10.0  # seconds for the others to learn of a failure, and for this process to end after it has
_LOST = (
    "error: Another process of this command ended without an error message. It was killed, perhaps by the system "
    "because memory was short, or its machine is lost. What is written stays; run the same command again."
)


class Peers:
    """All processes of a command; this one is number `rank`.

    A thread watches for failures of the others. A process that keeps working, or hangs in a collective operation, is
    killed a few seconds after the failure.
    """

    def __init__(self, store: dist.TCPStore, rank: int, world: int, keeps_store: bool) -> None:
        self._store, self._rank, self._world, self._keeps_store = store, rank, world, keeps_store
        self._store_is_gone = False  # with the process that kept it
        self._failed: int | None = None  # the exit code of the process that failed first
        self._word = b""  # its message in the store
        self._lock, self._left = threading.Lock(), threading.Event()
        self._watch = threading.Thread(target=self._look_for_failures, daemon=True)
        self._watch.start()

    def meet(self, limit: float) -> None:
        """Wait for all processes; report missing ones after a while. Raises `InputError` after `limit` seconds."""
        self._store.set(f"{_KEY}/here/{self._rank}", "")
        begun, keys, said = time.monotonic(), [f"{_KEY}/here/{rank}" for rank in range(self._world)], False
        while not self._store.check(keys):
            waited = time.monotonic() - begun
            if waited > limit:
                late = self._missing().capitalize()
                raise InputError(f"{late} did not come within {_minutes(limit)} minutes. {_advice()}")
            if waited > _FIRST_WORD * limit and not said:
                said = True
                if self._store.compare_set(f"{_KEY}/said", "", str(self._rank)) == str(self._rank).encode():
                    log.info("Waiting for %s, for %s minutes at most.", self._missing(), _minutes(limit))
            if self._failed is not None:
                raise SystemExit(self._failed)
            time.sleep(0.05)

    def _missing(self) -> str:
        """The processes that have not arrived: "process 1, 3 of 4"."""
        missing = [str(rank) for rank in range(self._world) if not self._store.check([f"{_KEY}/here/{rank}"])]
        return f"process {', '.join(missing)} of {self._world}"

    def leave_after(self, error: BaseException) -> int | None:
        """The exit code for all processes when `error` ends this one; None if it keeps its traceback.

        Only the first of several errors is reported, by the process in which it occurred. A failed collective operation
        is a consequence of another process's end, so this process waits for the message of that one.
        """
        code, text = describe(error)
        if isinstance(error, SystemExit) and text is None:
            return code  # all processes exit with it
        if _is_lost_connection(error):
            self._await_word()
            code, text = 1, _LOST
        if not self._is_first_to_fail(code):
            return self._failed
        if text is None:
            return None
        say(text)
        return code

    def leave(self) -> None:
        """Stop watching. The process that hosts the store stays until the others have learnt of a failure."""
        self._left.set()
        self._watch.join(_PATIENCE)
        end = time.monotonic() + _PATIENCE
        while self._keeps_store and self._failed is not None and time.monotonic() < end:
            if self._store.add(f"{_KEY}/heard", 0) >= self._world:
                break
            time.sleep(0.02)

    def _is_first_to_fail(self, code: int) -> bool:
        """Whether this process, which ends with `code`, is the first to fail. If so, the others are told."""
        mine = json.dumps({"rank": self._rank, "code": code}).encode()
        if self._failed is None and not self._store_is_gone:
            try:
                self._hear(self._store.compare_set(f"{_KEY}/failed", "", mine.decode()))
            except dist.DistError:
                self._store_is_gone = True
        return self._failed is None or self._word == mine

    def _await_word(self) -> None:
        end = time.monotonic() + _PATIENCE / 2
        while self._failed is None and self._watch.is_alive() and time.monotonic() < end:
            time.sleep(0.02)

    def _look_for_failures(self) -> None:
        while self._failed is None and not self._left.wait(_INTERVAL):
            try:
                if self._store.check([f"{_KEY}/failed"]):
                    self._hear(self._store.get(f"{_KEY}/failed"))
            except dist.DistError:  # perhaps because the command has finished
                self._store_is_gone = True
                return
        if self._failed is not None and not self._left.wait(_PATIENCE):
            os._exit(self._failed)

    def _hear(self, word: bytes) -> None:
        """Record the first failure, and confirm it to the process that hosts the store."""
        with self._lock:
            if self._failed is None:
                self._word, self._failed = word, json.loads(word)["code"]
                self._store.add(f"{_KEY}/heard", 1)


def join_peers() -> Peers | None:
    """All processes that a launcher started, including this one; None for a single process.

    Raises `InputError` when process 0 or the launcher is not found within the time limit, or when the port is taken.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    told = {"LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()  # else Accelerate uses one process, or MPI
    if world == 1 or not told or dist.is_initialized():
        return None
    keeps_store = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    begun, limit = time.monotonic(), meeting_seconds()
    peers = Peers(_open_store(keeps_store, limit), rank, world, keeps_store)
    try:
        peers.meet(max(limit - (time.monotonic() - begun), 1))
    except BaseException as error:
        code = peers.leave_after(error)
        peers.leave()
        if code is None:
            raise
        raise SystemExit(code) from None
    return peers


def meeting_seconds() -> float:
    """How long processes wait for one another at the start. Raises `InputError` unless it is a number above 0."""
    return 60 * positive_from_environment(MINUTES, _DEFAULT_MINUTES, "minutes")


def _open_store(keeps_store: bool, limit: float) -> dist.TCPStore:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    begun, said = time.monotonic(), False
    while True:
        attempt = timedelta(seconds=min(5.0, max(_FIRST_WORD * limit, 0.1)))  # Ctrl-C is handled between attempts
        try:
            store = dist.TCPStore(
                host, port, None, keeps_store, timeout=attempt, wait_for_workers=False, multi_tenant=True
            )
            store.set_timeout(timedelta(minutes=5))
            return store
        except dist.DistError as error:
            if keeps_store:
                raise InputError(f"Cannot listen on port {port}: {_first_line(error)} {_advice()}") from None
            waited, where = time.monotonic() - begun, f"process 0 at {host}, port {port}"
            if waited > limit:
                raise InputError(f"Did not find {where} within {_minutes(limit)} minutes. {_advice()}") from None
            if waited > _FIRST_WORD * limit and not said:
                said = True
                log.info("Waiting for %s, for %s minutes at most.", where, _minutes(limit))


def _minutes(seconds: float) -> str:
    return f"{round(seconds / 60, 2):g}"


def _advice() -> str:
    return (
        "Check that all processes were started, --main_process_ip and --main_process_port (MASTER_ADDR and "
        f"MASTER_PORT), and firewalls; {MINUTES} sets the time limit."
    )


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].rstrip(".") + "."


def _is_lost_connection(error: BaseException) -> bool:
    """Whether a collective operation failed because another process is gone."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())
