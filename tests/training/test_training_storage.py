"""Runs on storage that lacks what disks have: links, locks, modes, synced directories, shared memory."""

import ctypes
import errno
import fcntl
import json
import os
import stat
import sys
from pathlib import Path

import pytest
from PIL import Image
from training_runs import NO_PREVIEW, assert_same_checkpoint, fresh_accelerate, run_tiny, start_run

import sample
from sit_atconv.data.prepare.options import PrepareOptions
from sit_atconv.data.prepare.preparation import prepare
from sit_atconv.models import SiT
from sit_atconv.runtime.whole_files import followed, point_link, pointed
from sit_atconv.sampling.pipeline import SiTPipeline

SCORED = (
    "--evaluation.reference digits:heldout@8 --evaluation.features pixels --evaluation.samples 250 "
    "--evaluation.solver euler --evaluation.steps 1 --evaluation.every 2"
)
_NEW_NAMESPACE, _REC, _PRIVATE = 0x20000, 0x4000, 1 << 18  # <linux/sched.h>, <linux/mount.h>
_NOT_PERMITTED = 77


@pytest.fixture
def plain_storage(monkeypatch) -> None:
    """What a memory stick, a mounted bucket or a Windows share refuses."""

    def refuse(number: int):
        def refused(*arguments: object, **options: object) -> None:
            raise OSError(number, os.strerror(number))

        return refused

    sync = os.fsync

    def sync_files(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        sync(descriptor)

    for name in ("symlink", "link", "chmod"):
        monkeypatch.setattr(os, name, refuse(errno.EPERM))
    for name in ("flock", "lockf"):
        monkeypatch.setattr(fcntl, name, refuse(errno.ENOLCK))
    monkeypatch.setattr(os, "fsync", sync_files)


def test_a_run_without_links_locks_and_modes_is_the_same_run(tmp_path: Path, plain_storage) -> None:
    run, kept = tmp_path / "run", f"{NO_PREVIEW} --log.checkpoint_every 2 --log.keep 1"
    run_tiny(run, f"{kept} {SCORED} --training.steps 4")
    run_tiny(run, kept)
    checkpoints = run / "checkpoints"
    latest, best = checkpoints / "latest", checkpoints / "best"
    assert latest.is_file() and latest.read_text() == "step-0000006\n"
    wanted = json.loads((latest.parent / "step-0000006" / "position.json").read_text())["best"][0]
    assert best.is_file() and best.read_text() == f"step-{wanted:07d}\n"
    assert {path.name for path in checkpoints.iterdir()} == {"latest", "best", f"step-{wanted:07d}", "step-0000006"}

    assert SiT.from_pretrained(latest / "model").config.depth == 2
    assert SiTPipeline.from_pretrained(latest).recipe == (run / "config.yaml").read_text()
    fresh_accelerate()
    words = "--num-samples 4 --solver euler --steps 1"
    sample.main([*f"--checkpoint {latest}/model --out {tmp_path / 'out'}".split(), *words.split()])
    assert Image.open(tmp_path / "out" / "grid.png").size


def test_the_weights_do_not_depend_on_it(tmp_path: Path, request) -> None:
    run_tiny(tmp_path / "disk", f"{NO_PREVIEW} --training.steps 2")
    request.getfixturevalue("plain_storage")
    run_tiny(tmp_path / "stick", f"{NO_PREVIEW} --training.steps 2")
    assert_same_checkpoint(*(tmp_path / run / "checkpoints" / "step-0000002" for run in ("disk", "stick")))


def test_data_are_prepared_without_links_locks_and_modes(tmp_path: Path, plain_storage) -> None:
    options = PrepareOptions("digits:heldout@8", str(tmp_path / "data"), (8, 8), "identity", channels=1)
    assert prepare(options).complete and prepare(options).complete


def test_a_file_that_stands_for_a_link_gives_way_to_one(tmp_path: Path, request) -> None:
    """A run that was copied from a stick to a disk."""
    for name in ("step-0000001", "step-0000002"):
        (tmp_path / name / "model").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "symlink", lambda *arguments, **options: (_ for _ in ()).throw(OSError(errno.EPERM, "no")))
        point_link(tmp_path / "latest", "step-0000001")
    assert followed(tmp_path / "latest" / "model") == tmp_path / "step-0000001" / "model"
    point_link(tmp_path / "latest", "step-0000002")
    assert (tmp_path / "latest").is_symlink() and pointed(tmp_path / "latest") == "step-0000002"
    assert followed(tmp_path / "latest" / "model") == tmp_path / "latest" / "model"


@pytest.mark.parametrize("content", [b"", b"../elsewhere\n", b"step-0000009\n", b"\xff\x00", b"x" * 5000])
def test_a_file_that_names_no_checkpoint_is_not_followed(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "latest").write_bytes(content)
    path = tmp_path / "run" / "latest" / "model"
    assert followed(path) == path


def with_little_shared_memory(kibibytes: int) -> None:
    """Give this process, and those it starts, a /dev/shm of that size, as `docker run --shm-size` does."""
    libc = ctypes.CDLL(None)
    if libc.unshare(_NEW_NAMESPACE) or libc.mount(b"none", b"/", None, _REC | _PRIVATE, None):
        os._exit(_NOT_PERMITTED)
    if libc.mount(b"none", b"/dev/shm", b"tmpfs", 0, f"size={kibibytes}k".encode()):
        os._exit(_NOT_PERMITTED)


@pytest.mark.skipif(sys.platform != "linux", reason="mounts /dev/shm")
def test_too_little_shared_memory_is_a_paragraph_with_advice(tmp_path: Path) -> None:
    extra = f"--data.workers 2 --training.batch_size 512 {NO_PREVIEW}"
    process = start_run(tmp_path / "run", extra, with_little_shared_memory, 64)
    process.join(60)
    if process.exitcode == _NOT_PERMITTED:
        pytest.skip("mounting is not permitted here")
    told = Path(f"{tmp_path / 'run'}.stderr").read_text()
    assert process.exitcode == 1 and "Traceback" not in told
    assert "--shm-size" in told and "--ipc=host" in told and "workers (0 needs no shared memory)" in told
