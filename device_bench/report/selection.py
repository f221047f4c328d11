"""Which artifacts and results of a folder belong to its run: those of its configuration's targets and of its student.

A target that was taken out of the configuration, an artifact of an earlier student and a result of an artifact that was
exported anew since stay in the folder until somebody deletes them; a report that mixed them in would lie.
"""

from dataclasses import dataclass, field
from pathlib import Path

from device_bench.report.sources import Tree, read_config, read_json, result_files
from vlm.folders import sha256, tree_sha256
from vlm.manifest import MANIFEST, artifact_folder

NO_TARGET = "not among export.targets of config.yaml"
OTHER_STUDENT = "exported from another student than the one in student/"
REPLACED = "measured before the artifact was exported anew"


@dataclass(frozen=True)
class Selection:
    """What a report of the folder is about, and what it leaves out: name -> why.

    Attributes:
        manifests: of the artifacts, by name.
        results: bench results with their files.
        left_out: names of artifacts, and "<device>/<artifact>" of results that are left out on their own.
    """

    manifests: dict[str, Tree] = field(default_factory=dict)
    results: list[tuple[Path, Tree]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def select(run: Path) -> Selection:
    """Sort the artifacts and results of a run folder, or of a plain bench folder, whose results all belong to it.

    Raises:
        UserError: a file in it is broken.
    """
    targets, student = _targets(run), _student(run)
    selection = Selection()
    for path in sorted(run.glob(f"artifacts/*/{MANIFEST}")):
        name, manifest = path.parent.name, read_json(path)
        if path.parent.suffix == ".partial":
            continue
        if targets is not None and name not in targets:
            selection.left_out[name] = NO_TARGET
        elif student is not None and manifest["source_sha256"] != student:
            selection.left_out[name] = OTHER_STUDENT
        else:
            selection.manifests[name] = manifest
    for path in result_files(run):
        _sort_result(run, path, targets, selection)
    return selection


def _sort_result(run: Path, path: Path, targets: set[str] | None, selection: Selection) -> None:
    result = read_json(path)
    measured = result["artifact"]
    name, checkpoint = measured["name"], measured.get("format") == "torch"
    if targets is not None and name not in targets and not checkpoint:
        selection.left_out[name] = NO_TARGET
    elif name in selection.manifests and measured["manifest_sha256"] != sha256(run / "artifacts" / name / MANIFEST):
        selection.left_out[f"{path.parent.name}/{name}"] = REPLACED
    elif name not in selection.left_out:
        selection.results.append((path, result))


def _targets(run: Path) -> set[str] | None:
    """Names of the artifacts that the run's configuration asks for; None where it does not say."""
    export = read_config(run).get("export")
    targets = export.get("targets") if isinstance(export, dict) else None
    return None if targets is None else {artifact_folder(target) for target in targets}


def _student(run: Path) -> str | None:
    """SHA-256 of the run's student, as manifests name their source."""
    return tree_sha256(run / "student") if (run / "student").is_dir() else None
