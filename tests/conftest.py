"""What all tests share."""

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # as in the processes that tests start: the last bits of sums depend on it

SHARED = Path(__file__).resolve().parents[1].parent / "shared"


@pytest.fixture
def shared() -> Path:
    """The folder of real data and reference values beside the project; tests that need it skip without."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared")
    return SHARED


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
