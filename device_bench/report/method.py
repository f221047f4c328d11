"""The method notes: how the numbers came about, and everything a stage said about its own work."""

from device_bench.report import wording
from device_bench.report.sources import Tree

INTERVALS = (
    "Intervals of accuracy are 95 % bootstrap intervals over images, families drawn together. Differences are paired: "
    "the same resampled images for both models. The average is the plain mean of the families."
)
LADDER = (
    "Parity is measured with teacher forcing: after the prompt, the reference's greedy answer is fed token by token "
    "through the artifact's own KV cache, and every position's logits are compared. Each rung shows its worst case "
    "over the probes."
)
ONE_SEED = (
    "What distillation was worth is measured with one training seed; its interval covers the choice of test images, "
    "not of seeds."
)


def method_notes(report: Tree) -> list[str]:
    """Sentences for the page's last section: settings, statistics, and the notes of artifacts and benches."""
    artifacts = report["artifacts"]
    benches = [(artifact, bench) for artifact in artifacts for bench in artifact["benches"]]
    notes = list(dict.fromkeys(_settings(bench) for _, bench in benches if bench.get("settings")))
    notes += [INTERVALS] if any(bench["accuracy"] for _, bench in benches) else []
    notes += [LADDER] if any(artifact["parity"] for artifact in artifacts) else []
    notes += [ONE_SEED] if report["distillation"]["difference"] else []
    said = [(artifact, note) for artifact in artifacts for note in artifact["notes"]]
    said += [(artifact, note) for artifact, bench in benches for note in bench.get("notes") or []]
    said += [
        (artifact, f"energy: {bench['energy_j']['source']}") for artifact, bench in benches if bench.get("energy_j")
    ]
    said += [
        (artifact, f"invalid: {bench['invalid_because']}")
        for artifact, bench in benches
        if bench.get("invalid_because")
    ]
    said += [
        (artifact, f"{what} not measured: {why}") for artifact, bench in benches for what, why in _unmeasured(bench)
    ]
    return notes + _together(said)


def _unmeasured(bench: Tree) -> list[tuple[str, str]]:
    """What has no column of its own in the headline table while nobody measured it."""
    titles = {"energy_j": "energy", "thermal": "temperature"}
    return [(title, bench["reasons"][key]) for key, title in titles.items() if bench[key] is None]


def _settings(bench: Tree) -> str:
    settings = bench["settings"]
    texts = {
        "iterations": "{} timed repetitions",
        "warmup": "{} before them discarded",
        "threads": "{} threads",
        "cold_loads": "load time over {} fresh processes",
        "scenes": "accuracy on {} images",
    }
    parts = [text.format(settings[key]) for key, text in texts.items() if settings.get(key) is not None]
    where = bench["device"].get("name") or bench["device"].get("kind")
    passes = "Loading, latency, memory and accuracy are separate passes in fresh processes."
    return f"Measured on {where}: {', '.join(parts)}. {passes}"


def _together(said: list[tuple[Tree, str]]) -> list[str]:
    """One sentence per note, with the names of all artifacts that carry it."""
    names: dict[str, list[str]] = {}
    for artifact, note in said:
        known = names.setdefault(note, [])
        name = wording.display_name(artifact)
        known += [] if name in known else [name]
    return [f"{', '.join(carriers)}: {note}" for note, carriers in names.items()]
