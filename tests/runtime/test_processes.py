"""How processes leave one another."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from packaging.version import Version

import evaluate_fid
import sample
import sit_atconv.training
import train
from sit_atconv.data.prepare import __main__ as prepare
from sit_atconv.runtime.processes import leaving_in_order

Join = Callable[[str], None]


@pytest.fixture
def join(tmp_path: Path) -> Iterator[Join]:
    """Make this process the only one of a group of a backend."""

    def join(backend: str) -> None:
        store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)

    yield join
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def threads() -> list[str]:
    return [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_thread_of_gloo_is_left(join: Join) -> None:
    join("gloo")
    with leaving_in_order():
        torch.distributed.all_reduce(torch.ones(2))
        if Version(torch.__version__) >= Version("2.10"):  # earlier ones do not name it
            assert "pt_gloo_runloop" in threads()
    assert "pt_gloo_runloop" not in threads()


@pytest.mark.parametrize("backend", ["gloo", "fake"])
def test_all_wait_for_one_another_at_the_end(join: Join, monkeypatch, backend: str) -> None:
    waited = []
    monkeypatch.setattr(PartialState, "wait_for_everyone", lambda self: waited.append(torch.distributed.get_rank()))
    join(backend)
    with leaving_in_order():
        pass
    assert not torch.distributed.is_initialized()
    assert len(waited) == 1


@pytest.mark.parametrize("backend", ["gloo", "fake"])
def test_after_an_error_nobody_waits_for_exchanges_under_way(join: Join, backend: str) -> None:
    join(backend)
    with pytest.raises(RuntimeError), leaving_in_order():
        raise RuntimeError
    assert torch.distributed.is_initialized()


def test_one_process_alone_has_nothing_to_leave() -> None:
    with leaving_in_order():
        pass


@pytest.mark.parametrize(
    ("command", "work", "name", "words"),
    [
        (train, sit_atconv.training, "train", "--run RUN"),
        (sample, sample, "sample_to_directory", "--checkpoint MODEL --out OUT"),
        (evaluate_fid, evaluate_fid, "run", "--samples A --reference B"),
        (prepare, prepare, "prepare", "PICTURES OUT --resolution 64 --vae VAE"),
    ],
)
def test_every_command_of_several_processes_leaves_its_group(
    join: Join, monkeypatch, command: object, work: object, name: str, words: str
) -> None:
    monkeypatch.setattr(work, name, lambda *arguments, **options: None)
    monkeypatch.setattr("sys.argv", [command.__name__, *words.split()])
    join("gloo")
    command.main()
    assert not torch.distributed.is_initialized()
