"""The processes that train together, started by torch's or DeepSpeed's launcher or alone."""

import os
from dataclasses import dataclass

import torch


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
