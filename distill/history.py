"""history.json: every term's value, gradient norm and weight over the run."""

from typing import Any


def rows_of(log: list[dict[str, Any]], stage: str, offset: int) -> list[dict[str, Any]]:
    """Turn the Trainer's log of one stage into history rows; steps go on from `offset`."""
    rates = {entry["step"]: entry["learning_rate"] for entry in log if "learning_rate" in entry}
    rows = []
    for entry in log:
        if "probe_loss" not in entry:
            continue
        names = [key.removesuffix("_grad_norm") for key in entry if key.endswith("_grad_norm") and key != "grad_norm"]
        terms = {n: {part: entry[f"{n}_{part}"] for part in ("value", "grad_norm", "weight")} for n in names}
        later = [step for step in rates if step >= entry["step"]]
        rows.append(
            {
                "step": offset + entry["step"],
                "stage": stage,
                "loss": entry["probe_loss"],
                "lr": rates[min(later)] if later else None,
                "terms": terms,
            }
        )
    return rows
