"""Freed memory stays in the process, so that large tensors made anew cost no page faults."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
import torch
from sit_atconv.runtime.cpu import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(2**24)  # 64 MiB, more than glibc keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

without = faults()
keep_freed_memory()
faults()  # the first time memory is new
print(without, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="elsewhere nothing is changed")
def test_large_tensors_cost_page_faults_once() -> None:
    out = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True).stdout
    without, with_memory_kept = map(int, out.split())
    assert without > 8  # of pages that may be large themselves
    assert with_memory_kept < without / 4
