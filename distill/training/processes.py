"""The processes that train together, started by torch's or DeepSpeed's launcher or alone."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch

from vlm.errors import UserError

PATIENCE = timedelta(hours=6)  # for the slowest process; of one that died the launcher knows at once


@dataclass(frozen=True)
class Processes:
    """Which of how many this is.

    Attributes:
        rank: from 0, over all machines; local: from 0, on this machine.
        count: over all machines; here: on this machine.
    """

    rank: int = 0
    local: int = 0
    count: int = 1
    here: int = 1

    @classmethod
    def from_launcher(cls) -> "Processes":
        """What the launcher says in the environment."""
        values = {"rank": "RANK", "local": "LOCAL_RANK", "count": "WORLD_SIZE", "here": "LOCAL_WORLD_SIZE"}
        given = {name: int(os.environ[key]) for name, key in values.items() if key in os.environ}
        return cls(**given)

    @property
    def first(self) -> bool:
        """Whether this one writes what is written once."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until all are here."""
        if self.count > 1:
            torch.distributed.barrier()


@contextmanager
def joined(who: Processes) -> Iterator[Processes]:
    """Connect the processes for as long as the block runs; nothing happens with one.

    Raises:
        UserError: there are more processes than GPUs on this machine.
    """
    gpus = torch.cuda.device_count()
    if gpus and who.here > gpus:
        raise UserError(f"processes: {who.here} found, but this machine has {gpus} GPUs: give at most so many.")
    if who.count == 1:
        yield who
        return
    if gpus:
        torch.cuda.set_device(who.local)
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=PATIENCE)
    try:
        yield who
    finally:
        torch.distributed.destroy_process_group()
