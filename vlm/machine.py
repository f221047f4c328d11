"""What this machine has left for a program, cores, memory and disk, and how a program keeps memory it has had."""

import ctypes
import os
import platform
import shutil
from pathlib import Path

# Parameters of glibc's mallopt (<malloc.h>) -> bytes
KEEP = {-1: 2**31 - 1, -2: 2**26, -3: 2**30}  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """Name of the processor and how many cores of it there are."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0]}, {len(models)} cores" if models else platform.processor()


def available_memory() -> int | None:
    """Bytes that programs can still get, by /proc/meminfo; None elsewhere."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def free_disk(folder: Path) -> int:
    """Free bytes where `folder` is or will be."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def keep_freed_memory() -> None:
    """Keep freed blocks in this process for the next allocation, where the C library is glibc.

    By itself it returns what is freed at the end of a training step to the kernel, and is given it back in the next
    one, page by page, each one cleared.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, size in KEEP.items():
            mallopt(parameter, size)
