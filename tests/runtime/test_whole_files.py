"""Files and folders that are there whole or not at all, with the mode that the umask gives."""

import errno
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from sit_atconv.errors import InputError
from sit_atconv.runtime import whole_files
from sit_atconv.runtime.whole_files import (
    apply_umask,
    make_folder_of,
    point_link,
    remove_leftovers,
    whole_file,
    whole_folder,
    write_json,
)

DIGITS = "import sys; from sit_atconv.runtime.whole_files import write_json; write_json(sys.argv[1], {'fd': 1})"


@pytest.fixture
def umask() -> Iterator[None]:
    """Group may read, others may not: neither the usual umask nor what a library fixes."""
    before = os.umask(0o027)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def fill(path: Path, content: bytes = b"new") -> None:
    with whole_file(path) as file:
        file.write(content)


def test_what_is_not_whole_yet_is_found_by_no_search_for_its_kind(tmp_path):
    with whole_file(tmp_path / "a.safetensors"):
        assert not list(tmp_path.glob("*.safetensors")) and len(list(tmp_path.iterdir())) == 1


class Order:
    """The order in which files were forced to disk and renamed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, Path]] = []
        sync, rename = os.fsync, os.rename
        replace = os.replace

        def noted_sync(descriptor: int) -> None:
            self.calls.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
            sync(descriptor)

        def noted_rename(source: Path, target: Path) -> None:
            self.calls.append(("rename", Path(target)))
            rename(source, target)

        def noted_replace(source: Path, target: Path) -> None:
            self.calls.append(("rename", Path(target)))
            replace(source, target)

        monkeypatch.setattr(os, "fsync", noted_sync)
        monkeypatch.setattr(os, "rename", noted_rename)
        monkeypatch.setattr(os, "replace", noted_replace)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_file_is_on_disk_before_it_has_its_name_and_the_name_after(tmp_path, monkeypatch):
    order = Order(monkeypatch)
    fill(tmp_path / "a.json")
    assert order.calls == [
        ("sync", tmp_path / ".unfinished-a.json.partial"),
        ("rename", tmp_path / "a.json"),
        ("sync", tmp_path),
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_so_is_all_that_is_in_a_folder(tmp_path, monkeypatch):
    order = Order(monkeypatch)
    with whole_folder(tmp_path / "a") as folder:
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text("{}")
    unfinished = tmp_path / ".unfinished-a"
    assert {path for _, path in order.calls[:-2]} == {
        unfinished,
        unfinished / "model",
        unfinished / "model" / "config.json",
    }
    assert order.calls[-2:] == [("rename", tmp_path / "a"), ("sync", tmp_path)]


@pytest.mark.parametrize("stopped", [KeyboardInterrupt(), ValueError("half"), OSError(errno.EIO, "broken")])
def test_what_was_there_stays_when_writing_fails(tmp_path, stopped):
    fill(tmp_path / "a", b"old")
    with pytest.raises(type(stopped)), whole_file(tmp_path / "a") as file:
        file.write(b"half")
        raise stopped
    with pytest.raises(type(stopped)), whole_folder(tmp_path / "b") as folder:
        (folder / "half").write_text("")
        raise stopped
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == b"old"


def test_a_full_disk_names_the_file(tmp_path):
    with pytest.raises(OSError, match=r"No space left.*a\.npz"), whole_file(tmp_path / "a.npz"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match=r"No space left.*model") as full, whole_folder(tmp_path / "model"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert full.value.errno == errno.ENOSPC


def test_an_error_names_the_file_that_was_asked_for(tmp_path):
    with pytest.raises(FileNotFoundError) as missing:
        fill(tmp_path / "absent" / "a.json")
    assert missing.value.filename == str(tmp_path / "absent" / "a.json")


def test_a_folder_takes_the_place_of_an_empty_one_and_of_no_other(tmp_path):
    for _ in range(2):
        (tmp_path / "a").mkdir(exist_ok=True)
        if any((tmp_path / "a").iterdir()):
            with pytest.raises(InputError, match="exists already"), whole_folder(tmp_path / "a"):
                pass
        else:
            with whole_folder(tmp_path / "a") as folder:
                (folder / "full").write_text("")
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "full"]


def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link, target = tmp_path / "scores.json", tmp_path / "elsewhere" / "real.json"
    for _ in range(2):  # a link to nothing, and to a file
        link.unlink(missing_ok=True)
        link.symlink_to("elsewhere/real.json")
        make_folder_of(link)
        write_json(link, [1])
        assert link.is_symlink() and target.read_text() == "[\n 1\n]\n"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["elsewhere", "real.json", "scores.json"]


def test_a_pipe_is_written_into(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()), daemon=True)
    reader.start()
    make_folder_of(pipe)
    with whole_file(pipe) as file:
        np.savez(file, a=np.arange(3))  # an archive needs no seeking either
    reader.join(60)
    assert read[0].startswith(b"PK") and stat.S_ISFIFO(pipe.stat().st_mode)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_device_is_written_into(tmp_path, monkeypatch):
    terminal, device = os.openpty()
    path = Path(os.ttyname(device))  # a device of our own
    for refused in ("rename", "replace", "unlink"):
        monkeypatch.setattr(os, refused, None)
    make_folder_of(path)
    write_json(path, {"fd": 1})
    assert os.read(terminal, 100).split() == [b"{", b'"fd":', b"1", b"}"] and path.is_char_device()
    os.close(device)
    os.close(terminal)


def test_the_null_device_is_none_of_the_files_that_are_replaced(monkeypatch):
    assert whole_files._is_stream(os.devnull)
    for refused in ("rename", "replace", "unlink"):  # a mistake here would cost the machine its /dev/null
        monkeypatch.setattr(os, refused, None)
    make_folder_of(os.devnull)
    write_json(os.devnull, {"fd": 1})
    assert Path(os.devnull).is_char_device()


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs /dev/full")
def test_a_full_device_is_named(monkeypatch):
    for refused in ("rename", "replace", "unlink"):
        monkeypatch.setattr(os, refused, None)
    with pytest.raises(OSError, match=r"No space left.*/dev/full"):
        write_json("/dev/full", {"fd": 1})


@pytest.mark.parametrize("redirected", [False, True])
def test_standard_output_is_written_into_whatever_it_is(tmp_path, redirected):
    program = f"print('before', flush=True); {DIGITS}; print('after')"
    command = [sys.executable, "-c", program, "/dev/stdout"]
    if redirected:  # to a file, which must be neither replaced nor truncated
        with (tmp_path / "out").open("wb") as out:
            subprocess.run(command, check=True, stdout=out)
        text = (tmp_path / "out").read_text()
    else:
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert text == 'before\n{\n "fd": 1\n}\nafter\n'


def test_files_have_the_mode_that_the_umask_gives(tmp_path, umask):
    fill(tmp_path / "a")
    with whole_folder(tmp_path / "folder") as folder:
        (folder / "model").mkdir()
        save_file({"a": torch.zeros(1)}, folder / "model" / "weights.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "folder" / "model" / "more.safetensors")
    apply_umask(tmp_path / "folder", "more.*")
    assert [mode(path) for path in (tmp_path / "folder", tmp_path / "folder" / "model")] == [0o750] * 2
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 3 and {mode(path) for path in files} == {0o640}


def test_leftovers_of_this_and_earlier_versions_are_removed(tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / ".unfinished-step-0000001.png.partial").write_text("")
    ours = [".unfinished-config.yaml", ".unfinished-latest", ".shard-00000.json.partial", "settings.unfinished"]
    for name in ours[:1] + ours[2:]:
        (tmp_path / name).write_text("")
    (tmp_path / ours[1]).symlink_to("step-0000001")
    (tmp_path / ".unfinished-step-0000001" / "model").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text("")
    point_link(tmp_path / "latest", "config.yaml")
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["config.yaml", "latest", "samples"]


def test_where_no_file_can_be_is_found_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "a.json", tmp_path / "file" / "b" / "a.json", tmp_path):
        with pytest.raises(InputError, match="Cannot write"):
            make_folder_of(path)
    make_folder_of(tmp_path / "new" / "a.json")
    assert (tmp_path / "new").is_dir()
