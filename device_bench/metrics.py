"""What the bench measures besides accuracy: name in result files, label, unit and direction of each number, once."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One number of a result.

    Attributes:
        name: its key in result files and reports.
        label: what tables call it.
        unit: of the value.
        more_is_better: which direction is an improvement.
        repeated: measured in every iteration of the latency pass, so that the result holds statistics.
    """

    name: str
    label: str
    unit: str
    more_is_better: bool = False
    repeated: bool = False


METRICS = (
    Metric("load_ms", "Load", "ms"),
    Metric("vision_ms", "Vision", "ms", repeated=True),
    Metric("ttft_ms", "First token", "ms", repeated=True),
    Metric("prefill_tok_s", "Prefill", "tokens/s", more_is_better=True, repeated=True),
    Metric("decode_tok_s", "Decode", "tokens/s", more_is_better=True, repeated=True),
    Metric("peak_rss_mb", "Peak RSS", "MiB"),
)
ENERGY = Metric("energy_j", "Energy", "J per answer")
PSS = Metric("pss_mb", "PSS", "MiB")  # of a phone's runner: memory that several processes share counts in parts
NAMES = tuple(metric.name for metric in METRICS)
LATENCIES = tuple(metric for metric in METRICS if metric.repeated)
LATENCY_NAMES = tuple(metric.name for metric in LATENCIES)
# Everything that a result holds, as a value or as null with a reason.
MEASURED = (*NAMES, PSS.name, ENERGY.name, "thermal", "accuracy")
