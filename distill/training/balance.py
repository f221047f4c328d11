"""How the terms stand against each other: gradient norms, automatic weights, and terms that do nothing or collapsed."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from distill.model import SUPERVISED, AlignKD
from vlm.errors import CheckFailed

SMOOTHING = 0.5  # of an automatic weight: half old, half new
USELESS_SHARE = 0.01  # a term below 1 % of the cross-entropy's gradient does nothing
COLLAPSED = 1e-6  # a term's value that fell below this share of its first one
DEAD = 1e-12  # a gradient below this share of the cross-entropy's is none
DEAD_PROBES = 3  # so many in a row stop the run
# Terms whose distance can be chosen.
OTHER_DISTANCE = {"attention": "cosine or kl", "logits": "forward_kl", "switch": "forward_kl"}

Again = Callable[[], dict[str, Tensor]]
Row = dict[str, dict[str, float]]  # term -> value, grad_norm, weight


def gradient_norms(
    terms: dict[str, Tensor], parameters: list[nn.Parameter], again: Again | None = None
) -> dict[str, float]:
    """Norm of each term's gradient on the parameters; over several processes that of the mean gradient.

    Args:
        terms: their graph is kept, so that the loss can still be differentiated.
        parameters: of the student.
        again: computes the terms once more; then each is differentiated in a graph of its own.
    """
    return {name: _norm(again()[name] if again else value, parameters) for name, value in terms.items()}


def connected(outputs: dict[str, Any]) -> dict[str, Tensor]:
    """The terms, each with a path to all that the loss depends on.

    With ZeRO-3 the processes gather weights together while they differentiate: they must go through the same modules,
    also those whose batch has no image, where a term depends on less.
    """
    return {name: value + 0.0 * outputs["loss"] for name, value in outputs["terms"].items()}


def _norm(value: Tensor, parameters: list[nn.Parameter]) -> float:
    gradients: list[Tensor | None] = [None] * len(parameters)
    if value.requires_grad:
        gradients = list(torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True))
    if processes() == 1:
        squares = [g.float().square().sum() for g in gradients if g is not None]
        return float(torch.stack(squares).sum().sqrt()) if squares else 0.0
    total = torch.zeros((), device=value.device)
    for index, parameter in enumerate(parameters):  # in the parameters' order, the same in every process
        gradient = gradients[index]
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 holds the parameter itself in parts
        mean = torch.zeros(shape, device=value.device) if gradient is None else gradient.float()
        gradients[index] = None
        torch.distributed.all_reduce(mean)
        total += (mean / processes()).square().sum()
    return float(total.sqrt())


def processes() -> int:
    """How many processes train together."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if there else 1


def probe(module: AlignKD, outputs: dict[str, Any], first: bool, again: Again | None = None) -> dict[str, float]:
    """Measure the terms of a batch, set the automatic weights from it, and return what is logged.

    Args:
        module: what is trained.
        outputs: of its forward pass.
        first: the stage's first step: an automatic weight is taken as it is measured, not smoothed.
        again: as in `gradient_norms`.
    Returns:
        probe_loss, and <term>_value, <term>_grad_norm, <term>_weight of each term that has something to say.
    """
    terms = outputs["terms"]
    norms = gradient_norms(terms, module.student_parameters(), again)
    silent = _silent_everywhere(terms, outputs["silent"])
    row = {"probe_loss": _mean(outputs["loss"])}
    for name, value in terms.items():
        if name in silent:
            continue
        weight = 1.0 if name == SUPERVISED else float(outputs["weights"][name].detach())
        row |= {f"{name}_value": _mean(value), f"{name}_grad_norm": norms[name], f"{name}_weight": weight}
        if name != SUPERVISED and norms[name] > 0:
            rebalance(module, name, norms, first)
    return row


def rebalance(module: AlignKD, name: str, norms: dict[str, float], first: bool) -> None:
    """Move a term's automatic weight, if it has one, towards its share of the cross-entropy's gradient."""
    rule = module.rule(name)
    if rule.share is None:
        return
    buffer = module.get_buffer(f"weight_{name}")
    wanted = min(rule.share * norms[SUPERVISED] / norms[name], rule.cap)
    buffer.fill_(wanted if first else SMOOTHING * (float(buffer) + wanted))


def _mean(value: Tensor) -> float:
    """Mean over the processes."""
    mean = value.detach().float().clone()
    if processes() > 1:
        torch.distributed.all_reduce(mean)
    return float(mean / processes())


def _silent_everywhere(terms: dict[str, Tensor], silent: list[str]) -> set[str]:
    """Terms of which no process's batch says anything."""
    return {name for name, value in terms.items() if _mean(value.new_tensor(float(name in silent))) == 1}


def stop_if_dead(rows: list[Row]) -> None:
    """Stop a run of which a term does nothing at all any more.

    Args:
        rows: the stage's probes so far, in order.
    Raises:
        CheckFailed: a term's gradient stayed zero, or its value collapsed.
    """
    found = [sentence for name in _names(rows) for sentence in (_dead(name, rows), _collapsed(name, rows)) if sentence]
    if found:
        raise CheckFailed(
            "\n".join(found) + "\nThe run was stopped. To go on all the same: stop_dead_terms=false (below distill:)."
        )


def reports(rows: list[dict[str, Any]], terms: Iterable[str]) -> list[str]:
    """Say in plain sentences which term did nothing and which collapsed.

    Args:
        rows: of history.json.
        terms: names of the configuration's terms.
    """
    probes: list[Row] = [row["terms"] for row in rows]
    sentences = [check(name, probes) for name in _names(probes) for check in (_useless, _collapsed)]
    unheard = sorted(set(terms) - set(_names(probes)))
    said = [f"The {name} term never had anything to compare: no probed batch has an image." for name in unheard]
    return said + [sentence for sentence in sentences if sentence]


def _names(rows: list[Row]) -> list[str]:
    return sorted({name for row in rows for name in row} - {SUPERVISED})


def _of(name: str, rows: list[Row]) -> list[Row]:
    return [row for row in rows if name in row]


def _useless(name: str, rows: list[Row]) -> str | None:
    seen = _of(name, rows)
    shares = [_share(name, row) * row[name]["weight"] for row in seen]
    median = sorted(shares)[len(shares) // 2]
    if median >= USELESS_SHARE:
        return None
    return (
        f"The {name} term does nothing: its weighted gradient is {median:.2%} of the cross-entropy's (median "
        f"over {len(seen)} probes). Raise its weight{_or_distance(name)}."
    )


def _dead(name: str, rows: list[Row]) -> str | None:
    last = _of(name, rows)[-DEAD_PROBES:]
    if len(last) < DEAD_PROBES or any(_share(name, row) > DEAD for row in last):
        return None
    return (
        f"The {name} term has no gradient: it was zero in the last {DEAD_PROBES} probes, with the value "
        f"{last[-1][name]['value']:.2e}. Student and teacher are equal there, or nothing of the student reaches it."
    )


def _collapsed(name: str, rows: list[Row]) -> str | None:
    seen = _of(name, rows)
    first, last = seen[0][name]["value"], seen[-1][name]["value"]
    if not (first > 0 and last < COLLAPSED * first):
        return None
    return (
        f"The {name} term collapsed: its value fell from {first:.2e} to {last:.2e}, which a free adapter "
        f"reaches by making both sides vanish. Lower its weight{_or_distance(name)}."
    )


def _share(name: str, row: Row) -> float:
    return row[name]["grad_norm"] / max(row[SUPERVISED]["grad_norm"], 1e-12)


def _or_distance(name: str) -> str:
    return f" or use distance {OTHER_DISTANCE[name]}" if name in OTHER_DISTANCE else ""
