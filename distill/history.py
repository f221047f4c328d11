"""history.json: every term's value, gradient norm and weight over the run, and what a reader must be told of them."""

from typing import Any

USELESS_SHARE = 0.01  # a term below 1 % of the cross-entropy's gradient does nothing
COLLAPSED = 1e-6  # a term's value that fell below this share of its first one
OTHER_DISTANCE = {"attention": "cosine or kl", "logits": "forward_kl"}  # terms whose distance can be chosen


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


def reports(rows: list[dict[str, Any]]) -> list[str]:
    """Say in plain sentences which term did nothing and which collapsed."""
    found = []
    for name in sorted({n for row in rows for n in row["terms"]} - {"sup"}):
        seen = [row["terms"] for row in rows if name in row["terms"]]
        shares = [t[name]["weight"] * t[name]["grad_norm"] / max(t["sup"]["grad_norm"], 1e-12) for t in seen]
        median = sorted(shares)[len(shares) // 2]
        if median < USELESS_SHARE:
            found.append(
                f"The {name} term does nothing: its weighted gradient is {median:.2%} of the cross-entropy's (median "
                f"over {len(seen)} probes). Raise its weight{_or_distance(name)}."
            )
        first, last = seen[0][name]["value"], seen[-1][name]["value"]
        if first > 0 and last < COLLAPSED * first:
            found.append(
                f"The {name} term collapsed: its value fell from {first:.2e} to {last:.2e}, which a free adapter "
                f"reaches by making both sides vanish. Lower its weight{_or_distance(name)}."
            )
    return found


def _or_distance(name: str) -> str:
    return f" or use distance {OTHER_DISTANCE[name]}" if name in OTHER_DISTANCE else ""
