"""Builds report.json (schema 1): everything a run measured, and for everything it did not, null with the reason."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from device_bench.gate import GATE
from device_bench.report.artifacts import artifact_records
from device_bench.report.compare import beside_host
from device_bench.report.models import distillation_worth, model_records
from device_bench.report.selection import Selection, select
from device_bench.report.sources import Tree, git_state, read_config, read_json, run_names
from device_bench.report.training import training_record
from device_bench.report.verdicts import verdicts
from vlm.errors import UserError

SCHEMA = 1
NO_GATE = "no baseline was compared: pocketvlm gate NEW --baseline OLD"
OLD_GATE = "the last verdict was about older results: compare again with pocketvlm gate NEW --baseline OLD"


def build(runs: Path | Sequence[Path]) -> Tree:
    """Assemble the report of one run folder, or of several: models from the first that has them, artifacts of all.

    Args:
        runs: runs/<name> as the pipeline leaves it, or the output folder of `pocketvlm bench`.
    Returns:
        The tree of report.json. Whatever could not be read stands as None, and `reasons` beside it says why.
    Raises:
        UserError: a folder does not exist, holds neither artifacts nor results, or a file in it is broken.
    """
    folders = [runs] if isinstance(runs, Path) else list(runs)
    _check(folders)
    named = run_names(folders)
    main = next((folder for folder in folders if (folder / "student").is_dir()), folders[0])
    selected = {folder: select(folder) for folder in folders}
    artifacts = [record for folder in folders for record in artifact_records(folder, named[folder], selected[folder])]
    beside_host(artifacts, {name: folder for folder, name in named.items()})
    if not artifacts and not (main / "student").is_dir():
        raise UserError(f"{folders[0]}: neither artifacts nor results in it. Run pocketvlm export or bench first.")
    report: Tree = {
        "schema": SCHEMA,
        "run": _run(main, artifacts),
        "models": model_records(main),
        "distillation": distillation_worth(main),
        "training": training_record(main),
        "artifacts": artifacts,
        "left_out": [entry for folder in folders for entry in _left_out(named[folder], selected[folder])],
        "stages": [stage for folder in folders for stage in _stages(folder, named[folder], selected[folder])],
    }
    report |= _gate(main, report["run"]["created"])
    report["verdicts"] = verdicts(report)
    return report


def _check(folders: Sequence[Path]) -> None:
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder. Expected runs/<name> or the output folder of pocketvlm bench.")


def _gate(folder: Path, created: str | None) -> Tree:
    """The verdict that device_bench.gate.save left in the run folder, unless something was measured since."""
    kept = read_json(folder / GATE)
    if not isinstance(kept, dict):
        return {"gate": None, "reasons": {"gate": NO_GATE}}
    if kept["judged"] != created:
        return {"gate": None, "reasons": {"gate": OLD_GATE}}
    return {"gate": kept["gate"], "reasons": {}}


def _run(folder: Path, artifacts: list[Tree]) -> Tree:
    config = read_config(folder)
    benches = [bench for artifact in artifacts for bench in artifact["benches"]]
    versions: Tree = {}
    for artifact in artifacts:
        versions |= artifact["versions"]
    hosts = [bench["device"] for bench in benches if bench["device"].get("kind") == "host"]
    seeds = dict(_seeds(config))
    record: Tree = {
        "name": str(config.get("name") or folder.resolve().name),
        "created": max((bench["created"] for bench in benches if bench.get("created")), default=None),
        "git": git_state(Path(__file__).parent),
        "host": hosts[0] if hosts else None,
        "versions": versions or None,
        "seeds": seeds or None,
    }
    why = {
        "created": "nothing was measured yet",
        "git": "the installed program is not a git checkout",
        "host": "no result was measured on this machine",
        "versions": "no artifact's manifest names them",
        "seeds": "the run's config.yaml names none",
    }
    return {**record, "reasons": {key: reason for key, reason in why.items() if record[key] is None}}


def _seeds(tree: Any, path: str = "") -> list[tuple[str, Any]]:
    """Every value of the configuration whose key is seed or seeds, with the dotted path to it."""
    if not isinstance(tree, dict):
        return []
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        here = f"{path}.{key}" if path else str(key)
        found += [(here, value)] if key in ("seed", "seeds") else _seeds(value, here)
    return found


def _left_out(run: str, selection: Selection) -> list[Tree]:
    return [{"run": run, "name": name, "why": why} for name, why in selection.left_out.items()]


def _stages(folder: Path, run: str, selection: Selection) -> list[Tree]:
    """What each call of a stage took, in the order in which they ended; things made by one call share a record."""
    others = {f"{stage}-{name}" for name in selection.left_out for stage in ("export", "bench")}
    files = [path for path in sorted((folder / "stages").glob("*.json")) if path.stem not in others]
    stamps = [(path, read_json(path)) for path in files]
    ended = [(path.stem, stamp) for path, stamp in stamps if isinstance(stamp, dict) and stamp.get("finished")]
    calls: dict[str, Tree] = {}
    for name, stamp in sorted(ended, key=lambda pair: (pair[1]["finished"], pair[0])):
        call = calls.setdefault(f"{stamp['inputs']} {stamp['seconds']}", {"names": [], "seconds": stamp["seconds"]})
        call["names"].append(name)
    return [_stage(run, call) for call in calls.values()]


def _stage(run: str, call: Tree) -> Tree:
    reasons = {"seconds": "found finished after an interrupted run"} if call["seconds"] is None else {}
    return {"run": run, "name": " + ".join(call["names"]), "seconds": call["seconds"], "reasons": reasons}
