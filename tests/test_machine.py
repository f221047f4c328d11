"""vlm.machine: what a process does with memory."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from vlm.machine import keep_freed_memory
if {keep}:
    keep_freed_memory()
def step():
    return [torch.ones(2**21) for _ in range(32)]
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keep: bool) -> int:
    """Pages that the kernel hands out while ten times 32 tensors of 8 MiB are made and freed."""
    command = [sys.executable, "-c", FAULTS.format(keep=keep)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_freed_memory_is_used_again() -> None:
    """The kernel hands out pages once; without it, again at every step."""
    assert faults(keep=True) < 0.25 * faults(keep=False)
