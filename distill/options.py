"""Configuration of how a run trains: the teacher's cache, ZeRO, LoRA."""

from typing import Literal

from pydantic import Field, model_validator

from vlm.config import Config, Count


class Cache(Config):
    """The teacher's outputs, kept in files before the training, which then needs no teacher in memory.

    Attributes:
        kind: `exact` holds all that the terms read, in float16; `compact` the likeliest tokens of each answer position.
        folder: where; made if it is not there, shared by runs with the same teacher, data and terms.
        top_k: for compact, how many tokens.
        shard_records: records in a file: what an interrupted process has to do again.
        check_batches: batches that are computed again with the live teacher when all is written.
        force: write even when the disk will not hold it.
    """

    kind: Literal["exact", "compact"]
    folder: str
    top_k: Count = 32
    shard_records: Count = 256
    check_batches: Count = 4
    force: bool = False


class Zero(Config):
    """DeepSpeed's ZeRO.

    Attributes:
        stage: 1 splits the optimizer's state over the processes, 2 the gradients too, 3 the weights too.
        offload: what lies in the CPU's memory instead of the GPU's; `all` (with the weights) needs stage 3.
        settings: more of DeepSpeed's `zero_optimization`, by DeepSpeed's names: sizes of buckets, thresholds.
    """

    stage: Literal[1, 2, 3] = 2
    offload: Literal["none", "optimizer", "all"] = "none"
    settings: dict[str, bool | int | float] = {}

    @model_validator(mode="after")
    def _weights_that_are_split(self) -> "Zero":
        if self.offload == "all" and self.stage != 3:
            raise ValueError(f"offload: all needs stage 3, which splits the weights; {self.stage} found")
        if own := sorted({"stage", "offload_optimizer", "offload_param"} & set(self.settings)):
            raise ValueError(f"settings: {own[0]} has a key of its own: use zero.stage and zero.offload")
        return self


class Lora(Config):
    """Low-rank updates of the decoder's linear layers instead of its weights; merged into them at the end.

    Attributes:
        rank: of the updates.
        alpha: they are scaled by alpha / rank.
        targets: names of the linear layers.
    """

    rank: Count = 16
    alpha: Count = 32
    targets: list[str] = Field(
        default=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], min_length=1
    )
