"""How processes leave one another."""

import sys
from pathlib import Path

import pytest
import torch

from sit_atconv.errors import InputError
from sit_atconv.processes import leaving_together


@pytest.fixture
def group(tmp_path: Path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def threads() -> list[str]:
    return [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_thread_of_gloo_is_left(group) -> None:
    with leaving_together():
        torch.distributed.all_reduce(torch.ones(2))
        assert "pt_gloo_runloop" in threads()
    assert not torch.distributed.is_initialized()
    assert "pt_gloo_runloop" not in threads()


@pytest.mark.parametrize("error", [InputError("no such solver"), OSError(), SystemExit(1)])
def test_a_message_for_the_user_is_not_followed_by_an_abort(group, error: BaseException) -> None:
    with pytest.raises(type(error)), leaving_together():
        raise error
    assert not torch.distributed.is_initialized()


def test_other_errors_may_leave_exchanges_under_way_and_wait_for_none(group) -> None:
    with pytest.raises(RuntimeError), leaving_together():
        raise RuntimeError
    assert torch.distributed.is_initialized()


def test_one_process_alone_has_nothing_to_leave() -> None:
    with leaving_together():
        pass
