"""history.json: every term's value, gradient norm and weight over the run."""

from typing import Any


def rows_of(log: list[dict[str, Any]], stage: str, offset: int) -> list[dict[str, Any]]:
    """Turn the Trainer's log of one stage into history rows; steps go on from `offset`."""
    rows = []
    for entry in log:
        if "probe_loss" not in entry:
            continue
        names = [key.removesuffix("_grad_norm") for key in entry if key.endswith("_grad_norm") and key != "grad_norm"]
        terms = {n: {part: entry[f"{n}_{part}"] for part in ("value", "grad_norm", "weight")} for n in names}
        rows.append(
            {
                "step": offset + entry["step"],
                "stage": stage,
                "loss": entry["probe_loss"],
                "lr": entry["probe_rate"],
                "terms": terms,
            }
        )
    return rows


def curve_of(log: list[dict[str, Any]], offset: int) -> list[list[float]]:
    """[step, loss] of the Trainer's log of one stage: means over the steps since the last."""
    return [[offset + entry["step"], entry["loss"]] for entry in log if "loss" in entry]
