"""What to measure and how often."""

from typing import Self

from pydantic import Field, field_validator, model_validator

from vlm.config import Config
from vlm.data.scenes.question import FAMILIES
from vlm.registry import require


class BenchConfig(Config):
    """One measurement of one or more artifacts on one device."""

    device: str = "local"  # local | adb[:SERIAL] | ssh:USER@HOST[:PORT]
    tasks: list[str] = ["scenes"]
    data: str | None = None  # folder with the questions of real benchmarks (docs/benchmarks.md)
    limit: int | None = Field(None, ge=1)  # ask about so many questions of each benchmark, drawn with seed 0
    part: tuple[int, int] = (0, 1)  # which part of the pictures this device is asked about, of how many; run_on sets it
    scenes: int = Field(150, ge=1)  # test images of the built-in benchmark
    iterations: int = Field(20, ge=1)
    warmup: int = Field(5, ge=0)
    threads: int = Field(2, ge=1)  # of an engine while its speed and memory are measured
    accuracy_threads: int = Field(1, ge=1)  # while it answers the benchmark; a small model gains nothing from a second
    max_new_tokens: int = Field(24, ge=1)  # of an answer of the accuracy pass
    decode_tokens: int = Field(32, ge=1)  # decode steps per iteration of the latency pass, end token or not
    cold_loads: int = Field(3, ge=1)  # processes that only load, for load_ms
    timeout_s: float = Field(900, gt=0)  # of one pass; a process that takes longer is killed
    min_seconds: float = Field(10, ge=0)  # of the latency pass, besides `iterations`
    # On phones and boards only:
    sustained_s: float = Field(0, ge=0)  # of answering without a pause, to see the device throttle; 0: not done
    idle_s: float = Field(10, ge=0)  # of doing nothing, before the latency pass, for the idle device's power
    cool_s: float = Field(1200, ge=0)  # of waiting for a device that is too warm

    @field_validator("device")
    @classmethod
    def _device_exists(cls, device: str) -> str:
        require("device_bench.devices", device.partition(":")[0])
        return device

    @model_validator(mode="after")
    def _tasks_bring_questions(self) -> Self:
        from device_bench.evaluate import asking

        for task in self.tasks:
            if self.data is None or task not in FAMILIES:
                asking(task)
        return self
