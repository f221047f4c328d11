"""How a verdict is shown: terminal table, Markdown for a pull request, JUnit XML for CI, page with flipped answers."""

from collections.abc import Sequence
from functools import cache
from html import escape
from pathlib import Path
from xml.etree import ElementTree

from rich.table import Table

from device_bench.gate import SEVERITY, Verdict
from device_bench.judge import Check
from device_bench.judge_accuracy import Flip
from device_bench.pictures import thumbnail
from device_bench.templates import template
from vlm.errors import UserError

_HERE = Path(__file__).parent
COLUMNS = ("what", "metric", "baseline", "new", "change", "allowed", "verdict")
COLOURS = {"pass": "green", "regression": "red", "cannot judge": "yellow"}
FLIP_COLUMNS = ("question", "prompt", "truth", "before", "now")
SHOWN = 12  # flipped answers of each artifact in Markdown
PICTURED = 60  # and on the page


def markdown(verdict: Verdict) -> str:
    """The verdict as Markdown for a pull request: the reasons, and every check folded away."""
    lines = [f"### Gate: {verdict.state}", "", *(f"* {reason}" for reason in verdict.reasons)]
    lines += [f"* not judged: {', '.join(verdict.ignored)}"] if verdict.ignored else []
    lines += [f"* {note}" for note in verdict.notes]
    lines += ["", f"<details><summary>{len(verdict.checks)} checks</summary>", ""]
    lines += [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    lines += [_row(_cells(check)) for check in _by_severity(verdict)]
    return "\n".join([*lines, "", "</details>", "", *_flip_lines(verdict)])


def _flip_lines(verdict: Verdict) -> list[str]:
    lines = []
    for each in verdict.compared:
        lost = [flip for flip in each.flips if flip.points < 0]
        if each.flips:
            head = f"{each.where}: {len(lost)} answers lost, {len(each.flips) - len(lost)} won"
            lines += [f"<details><summary>{head}</summary>", "", _row(FLIP_COLUMNS), f"|{'---|' * len(FLIP_COLUMNS)}"]
            lines += [_row(_flip_cells(flip)) for flip in each.flips[:SHOWN]]
            lines += ["", "</details>", ""]
    return lines


def _flip_cells(flip: Flip) -> list[str]:
    return [f"{flip.family} {flip.id}", flip.prompt, flip.truth, flip.before, flip.after]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(escape(' '.join(cell.split())).replace('|', '/') for cell in cells)} |"


def table(verdict: Verdict) -> Table:
    """The verdict as a terminal table, regressions first, passes last."""
    drawn = Table(title=f"Gate: {verdict.state}", title_style=COLOURS[verdict.state])
    for column in COLUMNS:
        drawn.add_column(column, justify="right" if column in ("baseline", "new", "change", "allowed") else "left")
    for check in _by_severity(verdict):
        drawn.add_row(*_cells(check), style=None if check.state == "pass" else COLOURS[check.state])
    return drawn


def _cells(check: Check) -> list[str]:
    change = "" if check.change is None else f"{check.change:+g} {check.unit}"
    allowed = "" if check.allowed is None else f"{check.allowed:g}"
    state = f"{check.state}: {check.why}" if check.state != "pass" and check.why else check.state
    return [check.where, check.metric, _number(check.baseline), _number(check.new), change, allowed, state]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def junit(verdict: Verdict) -> str:
    """The verdict as JUnit XML: a check is a test case, a regression a failure, what cannot be judged an error."""
    failures, errors = (sum(check.state == state for check in verdict.checks) for state in SEVERITY[:2])
    counts = {"tests": len(verdict.checks), "failures": failures, "errors": errors}
    suite = ElementTree.Element("testsuite", {"name": "pocketvlm gate"} | {key: str(n) for key, n in counts.items()})
    for check in verdict.checks:
        case = ElementTree.SubElement(suite, "testcase", classname=_clean(check.where), name=check.metric)
        if check.state != "pass":
            kind = "failure" if check.state == "regression" else "error"
            before, after, change, allowed, why = _cells(check)[2:]
            text = f"baseline {before}, new {after}, change {change}, allowed {allowed}; {why}"
            ElementTree.SubElement(case, kind, message=_clean(why)).text = _clean(text)
    if not verdict.checks:
        case = ElementTree.SubElement(suite, "testcase", classname="gate", name="presence")
        ElementTree.SubElement(case, "error", message=verdict.reasons[0])
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def _clean(text: str) -> str:
    """XML knows no control characters."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def page(verdict: Verdict) -> str:
    """The verdict as one self-contained page: every check, and the flipped answers with their pictures."""
    rows = [(check.state, _cells(check)) for check in _by_severity(verdict)]
    groups = [(each.where, each.flips[:PICTURED], len(each.flips)) for each in verdict.compared if each.flips]
    return template(_HERE, "gate.html.j2").render(
        verdict=verdict, columns=COLUMNS, rows=rows, groups=groups, picture=_picture
    )


def _by_severity(verdict: Verdict) -> list[Check]:
    return sorted(verdict.checks, key=lambda check: SEVERITY.index(check.state))


@cache
def _picture(image: str) -> str | None:
    """The picture as a data URI, None where it is not on this machine."""
    try:
        return thumbnail(image) if image else None
    except UserError:
        return None
