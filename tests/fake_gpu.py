"""Tests that make models on a fake GPU where there is no real one."""

import pytest
import torch
from packaging.version import Version

needs_fake_gpu = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.10") and not torch.cuda.is_available(),
    reason="before torch 2.10, random numbers of a fake GPU need a real one",
)
