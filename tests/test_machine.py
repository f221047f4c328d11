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
torch.ones(2**22)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(100):
    torch.ones(2**22)  # 16 MiB, freed at once
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keep: bool) -> int:
    """Pages that the kernel handed out for 100 tensors of 16 MiB, one after the other."""
    command = [sys.executable, "-c", FAULTS.format(keep=keep)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_freed_memory_is_used_again() -> None:
    """Of blocks like one that was freed the kernel hands out only those of the first few, until the heap has settled."""
    assert faults(keep=True) < 0.25 * faults(keep=False)
