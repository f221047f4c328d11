"""How the processes of a training are started on this machine; docs/distributed.md says how on several."""

import os
import socket
import sys
from pathlib import Path

from distill.config import DistillConfig

FAILURE = ".failure.json"  # beside the student's folder: what a worker says of its end
PARENT = "POCKETVLM_PARENT"  # environment: the worker's stdin is a pipe from the process that started it
LOOPBACK = "127.0.0.1"


def command(config: DistillConfig, file: Path, out: Path) -> list[str]:
    """The arguments that start `distill.training.worker` once per process.

    Args:
        config: the run.
        file: its YAML file.
        out: the student's folder.
    """
    worker = ["-m", "distill.training.worker", str(file), str(out)]
    if config.processes == 1 and config.zero is None:  # DeepSpeed wants to be told of its processes even if it is one
        return [sys.executable, *worker]
    place = ["--master-addr" if config.launcher == "torch" else "--master_addr", LOOPBACK]
    place += ["--master-port" if config.launcher == "torch" else "--master_port", str(_free_port())]
    if config.launcher == "torch":
        count = ["--nproc-per-node", str(config.processes)]
        return [sys.executable, "-m", "torch.distributed.run", *count, *place, *worker]
    count = ["--num_gpus", str(config.processes), "--no_local_rank", "--module"]
    return [sys.executable, "-m", "deepspeed.launcher.runner", *place, *count, *worker[1:]]


def environment(config: DistillConfig) -> dict[str, str]:
    """The worker's environment: several processes speak to each other inside this machine alone."""
    several = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": str(config.threads)}
    return {**os.environ, PARENT: "stdin", **(several if config.processes > 1 else {})}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])
