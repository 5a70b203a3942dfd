"""Data at addresses: fsspec's memory and local file systems, and a real S3 server on the loopback address."""

import multiprocessing
import os
import socket
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image
from training_runs import NO_PREVIEW, losses, run_tiny

from sit_atconv.data.dataset import open_dataset
from sit_atconv.data.prepare import preparation, uploading
from sit_atconv.data.prepare.__main__ import main
from sit_atconv.data.remote import cache, fetching
from sit_atconv.data.remote.storage import Storage
from sit_atconv.data.sources import open_source
from sit_atconv.errors import InputError

PREPARE = "--resolution 8 --vae identity --channels 1 --shard-size 256 --workers 0"
SHARDS = 4  # of digits:heldout


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A bucket of a server of moto's."""
    pytest.importorskip("s3fs")
    server_module = pytest.importorskip("moto.server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        patched.setenv("AWS_ACCESS_KEY_ID", "key")
        patched.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patched.setenv("AWS_EC2_METADATA_DISABLED", "true")
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        fsspec.filesystem("s3").mkdir("bucket")
        yield "s3://bucket"
    server.stop()


@pytest.fixture(autouse=True)
def room(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv(cache.DIRECTORY, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(params=["memory", "file", "s3"])
def address(request, tmp_path: Path) -> str:
    """A place that does not exist yet."""
    base = request.getfixturevalue("s3") if request.param == "s3" else f"{request.param}://{tmp_path}"
    return f"{base}/{tmp_path.name}/data"


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    """Digits, prepared here."""
    out = tmp_path_factory.mktemp("local") / "data"
    main(["digits:heldout", str(out), *PREPARE.split()])
    return out


@pytest.fixture
def far(local: Path, tmp_path: Path) -> str:
    """A copy of them at an address."""
    fsspec.filesystem("memory").put(f"{local}/", f"/{tmp_path.name}/", recursive=True)
    return f"memory://{tmp_path.name}"


def refused(words: list[str], capsys) -> str:
    """The paragraph that the command ends with."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    told = capsys.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in told
    return [line for line in told.splitlines() if line.startswith("error: ")][-1]


def noting(monkeypatch, owner: object, name: str, stop_at: int | None = None) -> list:
    """The arguments of all calls of a method; call number `stop_at` is interrupted instead."""
    original, calls = getattr(owner, name), []

    def noted(*arguments: object, **options: object) -> object:
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        calls.append(arguments)
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, noted)
    return calls


def test_data_prepared_into_an_address_are_trained_on_from_there(address: str, local: Path, tmp_path: Path) -> None:
    main(["digits:heldout", address, *PREPARE.split(), "--verify"])
    assert sorted(Storage(address).names()) == sorted(path.name for path in local.iterdir())
    near, far = open_dataset(str(local)), open_dataset(address)
    assert far.fingerprint() == near.fingerprint()
    rows = list(range(0, len(near), 7))
    for name, values in near.read(rows, [False] * len(rows), images=True).items():
        assert torch.equal(values, far.read(rows, [False] * len(rows), images=True)[name])
    run_tiny(tmp_path / "far_run", f"--data.path {address} --data.workers 2 {NO_PREVIEW}")
    run_tiny(tmp_path / "near_run", f"--data.path {local} --data.workers 0 {NO_PREVIEW}")
    assert losses(tmp_path / "far_run") == losses(tmp_path / "near_run")


def test_what_is_complete_is_not_prepared_again(address: str, monkeypatch, capsys) -> None:
    words = ["digits:heldout", address, *PREPARE.split()]
    main(words)
    for owner, name in ((Storage, "put"), (preparation, "write_shards")):
        monkeypatch.setattr(owner, name, None)
    main(words)
    told = refused(["digits:train", *words[1:]], capsys)
    assert f"{address} was begun with other settings (source: digits:heldout there, digits:train now" in told


def test_an_interrupted_upload_goes_on(address: str, room: Path, monkeypatch, capsys) -> None:
    words = ["digits:heldout", address, *PREPARE.split()]
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        noting(patched, Storage, "put", stop_at=2)  # as by Ctrl-C
        main(words)
    with pytest.raises(InputError, match="is not a prepared data set"):
        open_dataset(address)
    monkeypatch.setattr(preparation, "write_shards", None)
    puts = noting(monkeypatch, Storage, "put")
    main(words)
    assert [name for _, _, name in puts] == ["shard-00002.safetensors", "shard-00003.safetensors", "dataset.json"]
    assert len(open_dataset(address)) == 896 and list((room / "prepare").iterdir()) == []


def test_where_something_else_is_nothing_is_prepared(address: str, monkeypatch, capsys) -> None:
    Storage(address).put(Path(__file__), "notes.txt")
    monkeypatch.setattr(uploading, "prepare", None)
    assert "holds no data set of ours" in refused(["digits", address, *PREPARE.split()], capsys)


def test_where_nobody_may_write_nothing_is_prepared(monkeypatch, capsys) -> None:
    def forbidden(*arguments: object) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "pipe_file", forbidden)
    monkeypatch.setattr(uploading, "prepare", None)
    told = refused(["digits", "memory://out", *PREPARE.split()], capsys)
    assert told.startswith("error: Cannot write memory://out: PermissionError: Access Denied.")


def test_only_what_is_missing_is_fetched(far: str, room: Path, monkeypatch) -> None:
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(fetching, "_AT_A_TIME", 1)
        noting(patched, Storage, "fetch", stop_at=2)
        open_dataset(far)
    fetched = noting(monkeypatch, Storage, "fetch")
    assert open_dataset(far).labels().shape == (896,)
    assert sorted(name for _, name, _ in fetched) == ["shard-00002.safetensors", "shard-00003.safetensors"]
    shard = next(room.glob("*/shard-00001.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    open_dataset(far)
    assert len(fetched) == 3 and not list(room.rglob(".unfinished*"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "shard-00001.safetensors does not match its digest"),
        (lambda data: data[:-9], "shard-00001.safetensors has .* bytes instead of"),
        (None, "Cannot fetch memory://.*shard-00001.safetensors: it does not exist"),
    ],
)
def test_a_damaged_shard_is_not_trained_on(far: str, room: Path, damage: Callable | None, message: str) -> None:
    memory, path = fsspec.filesystem("memory"), f"/{far.removeprefix('memory://')}/shard-00001.safetensors"
    data = memory.cat_file(path)
    memory.rm_file(path)
    if damage:
        memory.pipe_file(path, damage(data))
    with pytest.raises(InputError, match=message):
        open_dataset(far)
    assert not list(room.rglob("shard-00001*")) and not list(room.rglob(".unfinished*"))
    memory.pipe_file(path, data)
    open_dataset(far)


def test_a_file_of_the_cache_that_changed_is_named(far: str, room: Path, tmp_path: Path) -> None:
    open_dataset(far)
    shard = next(room.glob("*/shard-00001.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(InputError, match=r"shard-00001.*checksum differs.*Remove it, and it is fetched again"):
        run_tiny(tmp_path / "run", f"--data.path {far} {NO_PREVIEW}")
    shard.unlink()
    run_tiny(tmp_path / "run", f"--data.path {far} {NO_PREVIEW} --training.steps 1")


def test_the_cache_keeps_what_is_in_use_and_what_was_used_last(
    local: Path, tmp_path: Path, room: Path, monkeypatch
) -> None:
    """Each data set has 117 kB; the cache holds two."""
    size = sum(path.stat().st_size for path in local.glob("*.safetensors"))
    monkeypatch.setenv(cache.LIMIT, str(2.5 * size / 2**30))
    addresses = [f"file://{tmp_path}/data{number}" for number in range(4)]
    for number, address in enumerate(addresses):
        main(
            [f"digits:{('heldout', 'train', 'all', 'heldout')[number]}@8", address, *PREPARE.split(), "--unconditional"]
        )
    monkeypatch.setenv(cache.LIMIT, "1")
    sizes = {address: sum(info.bytes for info in open_dataset(address)._shards) for address in addresses}
    for path in room.glob("*.lock"):
        os.utime(path, (0, 0))
    held = open_dataset(addresses[0])
    monkeypatch.setenv(cache.LIMIT, str((sizes[addresses[0]] + sizes[addresses[1]] + 1) / 2**30))
    open_dataset(addresses[1])
    assert len([path for path in room.glob("*/dataset.json")]) == 2, "the two that nobody uses are gone"
    with pytest.raises(InputError, match=r"does not fit into the cache .* that other programs are using"):
        open_dataset(addresses[2])
    assert held.labels().shape == (896,)
    del held
    with pytest.raises(InputError, match=r"needs .* GiB in the cache .*, which may have .*SITATCONV_CACHE_GIB"):
        monkeypatch.setenv(cache.LIMIT, "0.00001")
        open_dataset(addresses[2])


def open_slowly(address: str, folder: Path, number: int) -> None:
    """Open the data in a process of its own, noting what it fetches."""
    fetch = Storage.fetch

    def slow(self: Storage, name: str, path: Path) -> None:
        time.sleep(0.05)
        with open(folder / f"{number}.txt", "a") as file:
            file.write(f"{name}\n")
        fetch(self, name, path)

    Storage.fetch = slow
    assert len(open_dataset(address)) == 896


def test_processes_of_a_machine_fetch_each_file_once(local: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=open_slowly, args=(f"file://{local}", tmp_path, number)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    fetched = [name for path in tmp_path.glob("*.txt") for name in path.read_text().split()]
    assert sorted(fetched) == [f"shard-0000{number}.safetensors" for number in range(SHARDS)]


def test_after_a_kill_the_rest_is_fetched(local: Path, tmp_path: Path, room: Path, monkeypatch) -> None:
    monkeypatch.setattr(fetching, "_AT_A_TIME", 1)
    process = multiprocessing.get_context("fork").Process(target=open_slowly, args=(f"file://{local}", tmp_path, 0))
    process.start()
    deadline = time.monotonic() + 60
    while not list(room.glob("*/shard-00001*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.join()
    there = {path.name for path in room.glob("*/shard-*")}
    fetched = noting(monkeypatch, Storage, "fetch")
    assert len(open_dataset(f"file://{local}")) == 896
    assert {name for _, name, _ in fetched} == {f"shard-0000{number}.safetensors" for number in range(SHARDS)} - there
    assert 0 < len(fetched) < SHARDS and not list(room.rglob(".unfinished*"))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for number in range(6):
        path = tmp_path / "pictures" / f"class-{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(path)
    return tmp_path / "pictures"


@pytest.mark.parametrize("kind", ["folder", "zip", "npz", "prepared"])
def test_pictures_at_an_address_are_prepared_like_those_here(
    kind: str, pictures: Path, s3: str, tmp_path: Path
) -> None:
    here = pictures
    if kind == "zip":
        here = tmp_path / "pictures.zip"
        with zipfile.ZipFile(here, "w") as archive:
            for path in sorted(pictures.rglob("*.png")):
                archive.write(path, path.relative_to(pictures))
    elif kind == "npz":
        here = tmp_path / "pictures.npz"
        np.savez(here, arr_0=np.stack([np.array(Image.open(path)) for path in sorted(pictures.rglob("*.png"))]))
    elif kind == "prepared":
        here = tmp_path / "prepared"
        main([str(pictures), str(here), "--resolution", "12", "--vae", "identity", "--images"])
    there = f"{s3}/{tmp_path.name}/{here.name}"
    fsspec.filesystem("s3").put(f"{here}/" if here.is_dir() else str(here), there, recursive=here.is_dir())
    words = ["--resolution", "8", "--vae", "identity", "--workers", "2"]
    main([str(here), str(tmp_path / "near"), *words])
    main([there, str(tmp_path / "far"), *words])
    near, far = open_dataset(str(tmp_path / "near")), open_dataset(str(tmp_path / "far"))
    assert near.fingerprint() == far.fingerprint() and near.class_names == far.class_names


def test_a_file_that_changed_at_its_address_is_fetched_again(pictures: Path, s3: str, tmp_path: Path) -> None:
    there, grey = f"{s3}/{tmp_path.name}.npz", np.full((2, 8, 8, 3), 128, np.uint8)
    for shade in (0, 1, 1):
        np.savez(tmp_path / "a.npz", arr_0=grey + shade)
        fsspec.filesystem("s3").put(str(tmp_path / "a.npz"), there)
        assert open_source(there)[0].image.max() == 128 + shade


def test_what_cannot_be_read_is_one_paragraph(s3: str, tmp_path: Path, monkeypatch, capsys) -> None:
    def told(source: str) -> str:
        return refused([source, str(tmp_path / "out"), *PREPARE.split()], capsys)

    assert "Protocol not known: nowhere" in told("nowhere://a/b.zip")
    assert told(f"{s3}/none.zip").startswith(f"error: {s3}/none.zip does not exist. A source is a folder")
    assert "does not exist" in told(f"memory://{tmp_path.name}")
    fsspec.filesystem("memory").pipe_file(f"/{tmp_path.name}/vae-sd/dataset.json", b"{}")
    assert "was prepared for REPA: copy it to this machine" in told(f"memory://{tmp_path.name}")
    missing = {"class": "farfs.FarFileSystem", "err": "Install farfs to access Far"}
    monkeypatch.setitem(fsspec.available_protocols.__globals__["known_implementations"], "far", missing)
    assert told("far://a/b.zip").endswith("its protocol needs another package. Install farfs to access Far.")
    s3_class = fsspec.get_filesystem_class("s3")
    s3_class.clear_instance_cache()
    with monkeypatch.context() as patched:
        patched.delenv("AWS_ACCESS_KEY_ID")
        patched.delenv("AWS_SECRET_ACCESS_KEY")
        patched.setenv("HOME", str(tmp_path))
        assert "NoCredentialsError: Unable to locate credentials" in told(f"{s3}/b.zip")
    s3_class.clear_instance_cache()
    monkeypatch.setenv(cache.LIMIT, "much")
    fsspec.filesystem("memory").pipe_file("/a.zip", b"x")
    assert "SITATCONV_CACHE_GIB=much: expected a number of GiB above 0" in told("memory://a.zip")
    assert "copy it, add the teacher to the copy" in refused([f"{s3}/data", "--teacher", "test_vit"], capsys)
