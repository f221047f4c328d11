"""The headline table: a row per artifact and device, every cell a number or a footnote that says why there is none."""

from collections.abc import Callable
from dataclasses import dataclass, field

from device_bench.metrics import ENERGY, METRICS
from device_bench.report import wording
from device_bench.report.sources import Tree


@dataclass(frozen=True)
class Cell:
    """What stands in a cell: the number and a smaller second line, or the footnote that explains its absence."""

    main: str = ""
    below: str = ""
    note: int | None = None


@dataclass
class Footnotes:
    """Reasons in the order in which they are first needed, each once."""

    texts: list[str] = field(default_factory=list)

    def __call__(self, reason: str) -> int:
        """Number of a reason, from 1."""
        if reason not in self.texts:
            self.texts.append(reason)
        return self.texts.index(reason) + 1


@dataclass(frozen=True)
class Row:
    """One artifact on one device."""

    artifact: Tree
    name: str
    device: str
    badges: list[str]
    state: str  # of the parity ladder: pass | fail | unknown
    cells: list[Cell]


Measures = dict[str, Callable[..., Cell]]
COLUMNS = (
    ("Size", "MB"),
    ("Parity", "logits cosine"),
    ("Accuracy", "%"),
    ("Difference", "points"),
    *((metric.label, metric.unit) for metric in METRICS),
)


def table(report: Tree) -> tuple[list[tuple[str, str]], list[Row], list[str]]:
    """Columns, rows and footnotes of the headline table; energy has a column where some device measured it."""
    notes = Footnotes()
    pairs = [(artifact, bench) for artifact in report["artifacts"] for bench in artifact["benches"] or [None]]
    devices = {bench["device"].get("name") for _, bench in pairs if bench}
    energy = any(bench[ENERGY.name] for _, bench in pairs if bench)
    measures = {**_MEASURES, ENERGY.name: _energy} if energy else _MEASURES
    columns = [*COLUMNS, (ENERGY.label, ENERGY.unit)] if energy else [*COLUMNS]
    rows = [_row(artifact, bench, measures, notes, named=len(devices) > 1) for artifact, bench in pairs]
    return columns, rows, notes.texts


def _row(artifact: Tree, bench: Tree | None, measures: Measures, notes: Footnotes, named: bool) -> Row:
    parity = artifact["parity"]
    device = str(bench["device"].get("name") or "") if bench and named else ""  # said only where there are several
    cells = [
        _cell(artifact, "bytes", notes, lambda size: Cell(wording.megabytes(size))),
        _cell(artifact, "parity", notes, _parity),
        *(_cell(bench, key, notes, show) for key, show in measures.items()),
    ]
    state = "unknown" if parity is None else "pass" if parity["passed"] else "fail"
    return Row(artifact, wording.display_name(artifact), device, wording.badges(artifact, bench), state, cells)


def _cell(source: Tree | None, key: str, notes: Footnotes, show: Callable[..., Cell]) -> Cell:
    if source is None:
        return Cell(note=notes("not measured on any device"))
    if source.get("invalid_because"):
        return Cell(note=notes(f"invalid: {source['invalid_because']}"))
    value = source.get(key)
    return Cell(note=notes(source["reasons"].get(key, "no reason given"))) if value is None else show(value)


def _parity(parity: Tree) -> Cell:
    cosine = parity["logits_cos"]
    below = (
        f"{wording.rung_value('agreement', parity['token_agreement'])} tokens"
        if parity["token_agreement"] is not None
        else ""
    )
    return Cell("not compared" if cosine is None else wording.rung_value("cosine", cosine), below)


def _accuracy(accuracy: Tree) -> Cell:
    average = accuracy["avg"]
    return Cell(wording.percent(average["score"]), wording.percent_interval(average["ci95"]))


def _difference(difference: Tree) -> Cell:
    return Cell(wording.points(difference["points"]), wording.points_interval(difference["ci95"]))


def _time(stats: Tree) -> Cell:
    return Cell(wording.number(stats["p50"]), f"p95 {wording.number(stats['p95'])}")


def _rate(stats: Tree) -> Cell:
    return Cell(wording.number(stats["p50"]), f"min {wording.number(stats['min'])}")


def _plain(value: float) -> Cell:
    return Cell(wording.number(value))


def _energy(energy: Tree) -> Cell:
    return Cell(wording.number(energy["value"]), str(energy["source"]))


_MEASURES: Measures = {
    "accuracy": _accuracy,
    "difference": _difference,
    **{metric.name: _plain if not metric.repeated else _rate if metric.more_is_better else _time for metric in METRICS},
}
