"""How numbers and findings are worded, the same in the page and in the markdown."""

import math

from device_bench.report.sources import Tree

MINUS, THIN, DASH = "\N{MINUS SIGN}", "\N{NARROW NO-BREAK SPACE}", "\N{EN DASH}"
FAMILY_NAMES = {
    "gqa": "GQA",
    "scienceqa": "ScienceQA",
    "textvqa": "TextVQA",
    "mme": "MME",
    "mmbench": "MMBench",
    "pope": "POPE",
}
TERM_NAMES = {
    "sup": "Answers (cross-entropy)",
    "attention": "Attention, first layer",
    "vision": "Vision tokens",
    "logits": "Logits of the answers",
}
FORMAT_NAMES = {"onnx": "ONNX", "executorch": "ExecuTorch", "coreml": "Core ML", "gguf": "GGUF", "torch": "torch"}
_COUNTS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def number(value: float) -> str:
    """Three significant digits below a thousand, whole above, thousands apart: 0.482, 3.14, 27.9, 1 204."""
    size = abs(value)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:,.{digits}f}".replace(",", THIN).replace("-", MINUS)


def points(value: float) -> str:
    """A difference in percentage points, signed (with a real minus) unless it rounds to nothing: +1.3, 0.0."""
    rounded = round(value, 1)
    return "0.0" if rounded == 0 else f"{rounded:+.1f}".replace("-", MINUS)


def points_interval(ends: list[float]) -> str:
    """An interval of differences: 0.0 to +0.4."""
    return f"{points(ends[0])} to {points(ends[1])}"


def percent(value: float) -> str:
    """A score in percent: 61.9."""
    return f"{value:.1f}"


def percent_interval(ends: list[float]) -> str:
    """An interval of scores, its ends joined by a dash."""
    return f"{ends[0]:.1f}{DASH}{ends[1]:.1f}"


def megabytes(size: int) -> str:
    """Bytes as MB (10^6)."""
    return number(size / 1e6)


def parameters(count: int) -> str:
    """A number of parameters: 812 k, 4.9 M, 1.4 B."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{THIN}{letter}"
    return str(count)


def duration(seconds: float) -> str:
    """Seconds as 4.2 s, 48 s or 5 min 12 s."""
    if seconds < 9.95:
        return f"{seconds:.1f}{THIN}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}{THIN}min {rest}{THIN}s" if minutes else f"{rest}{THIN}s"


def rung_value(metric: str, value: float) -> str:
    """A value on the parity ladder in the digits that matter for its metric."""
    if metric == "cosine":  # cut, not rounded: 0.9999996 is not 1
        return f"{math.floor(value * 1e6) / 1e6:.6f}"
    if metric == "agreement":
        return f"{100 * value:.2f}{THIN}%"
    if metric == "points":
        return points(value)
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}".replace("-", MINUS) if value else "0"


def display_name(artifact: Tree) -> str:
    """Format as its makers write it, and precision: ONNX int4."""
    known = FORMAT_NAMES.get(artifact["format"])
    return f"{known} {artifact['precision']}" if known and artifact["precision"] else artifact["name"]


def family_name(task: str) -> str:
    """A benchmark as its makers write it."""
    return FAMILY_NAMES.get(task, task)


def count(n: int) -> str:
    """Small numbers as words."""
    return _COUNTS[n] if n < len(_COUNTS) else str(n)


def headline(report: Tree) -> str:
    """The report in one or two sentences: what failed or was proven, and what distillation was worth."""
    artifacts = report["artifacts"]
    climbed = [artifact for artifact in artifacts if artifact["parity"]]
    passed = sum(artifact["parity"]["passed"] for artifact in climbed)
    if not artifacts:
        first = "Nothing was exported yet."
    elif not climbed:
        first = f"{_artifacts(len(artifacts))} measured; parity with the trained model is not known.".capitalize()
    elif passed < len(climbed):
        failed = len(climbed) - passed
        verb = "is" if failed == 1 else "are"
        first = f"{count(failed)} of {count(len(climbed))} artifacts {verb} not proven equal to the trained model."
        first = first[0].upper() + first[1:]
    elif len(climbed) == 1:
        first = "One artifact, proven to be the trained model."
    else:
        first = f"{_artifacts(len(climbed))}, each proven to be the trained model.".capitalize()
    difference = report["distillation"]["difference"]
    if difference is None:
        return first
    low, high = difference["ci95"]
    if low <= 0 <= high:
        return f"{first} What distillation was worth is inside the noise."
    verb = "was worth" if difference["points"] > 0 else "cost"
    return f"{first} With this seed, distillation {verb} {abs(difference['points']):.1f} points."


def _artifacts(n: int) -> str:
    return f"{count(n)} artifact{'s' if n != 1 else ''}"


def measured_name(artifact: Tree, bench: Tree) -> str:
    """Name of an artifact in a chart of measurements: with the device if that is not this machine, and its badges."""
    device = bench["device"]
    where = [] if device.get("kind") == "host" else [str(device.get("name"))]
    said = [*where, *badges(artifact, bench)]
    return f"{display_name(artifact)} ({', '.join(said)})" if said else display_name(artifact)


def badges(artifact: Tree, bench: Tree | None) -> list[str]:
    """What must be said beside every figure of an artifact: emulated device, random weights, allowed drift, invalid."""
    found = []
    if bench and bench["device"].get("kind") == "emulated":
        found.append("emulated")
    if bench and not bench.get("valid", False):
        found.append("invalid")
    if any("random weights" in note.lower() for note in [*artifact["notes"], *((bench or {}).get("notes") or [])]):
        found.append("random weights")
    if artifact["parity"] and artifact["parity"].get("allowed_drift"):
        found.append("drift allowed")
    return found
