"""How processes leave one another."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from sit_atconv.errors import InputError
from sit_atconv.processes import leaving_in_order


@pytest.fixture
def join(tmp_path: Path) -> Iterator[Callable[[str], None]]:
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
def test_no_thread_of_gloo_is_left(join) -> None:
    join("gloo")
    with leaving_in_order():
        torch.distributed.all_reduce(torch.ones(2))
        assert "pt_gloo_runloop" in threads()
    assert "pt_gloo_runloop" not in threads()


@pytest.mark.parametrize("error", [InputError("no such solver"), OSError(), SystemExit(1)])
def test_a_message_for_the_user_is_not_followed_by_an_abort(join, error: BaseException) -> None:
    join("gloo")
    with pytest.raises(type(error)), leaving_in_order():
        raise error
    assert not torch.distributed.is_initialized()


def test_an_exchange_that_may_be_under_way_is_not_waited_for(join) -> None:
    join("gloo")
    with pytest.raises(RuntimeError), leaving_in_order():
        raise RuntimeError
    assert torch.distributed.is_initialized()


def test_other_backends_are_left_only_where_nothing_went_wrong(join) -> None:
    join("fake")
    with pytest.raises(InputError), leaving_in_order():
        raise InputError
    assert torch.distributed.is_initialized()
    with leaving_in_order():
        pass
    assert not torch.distributed.is_initialized()


def test_one_process_alone_has_nothing_to_leave() -> None:
    with leaving_in_order():
        pass
