"""The processes that `accelerate launch` started together."""

import os

from device_bench.session import Team


def team() -> Team:
    """This process's place among those started together; one alone needs no accelerate."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Team()
    from accelerate import PartialState

    state = PartialState()  # also gives this process its GPU
    return Team(state.process_index, size, state.wait_for_everyone)
