"""The pipeline with stages that only leave files behind: `python -m tests.road RUN_DIR` runs it in a process to kill.

Every building is noted in RUN_DIR/../calls. In the process of BLOCK=<product> that product's building says so on
standard output and waits for ever; BLOCK=<product>! waits when its folder is finished but not stamped.
"""

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace

from distill.config import DistillConfig
from pocketvlm import steps
from pocketvlm.console import exit_codes
from pocketvlm.ledger import OnProgress
from pocketvlm.pipeline import Outcome, RunConfig, run
from pocketvlm.progress import Progress
from vlm.errors import CheckFailed, UserError
from vlm.folders import finished_folder
from vlm.manifest import artifact_folder

STDOUT = os.dup(1)  # the pipeline sends what stages print to a file
TARGETS = ["onnx:fp32", "gguf:q4_0"]
STAGES = ("distill.run", "pocketvlm.evaluation", "export.run", "device_bench.run", "device_bench.report.write")


def config(**changes: object) -> RunConfig:
    """A run with two artifacts and both students; `changes` replace sections."""
    stage = {
        "name": "s",
        "data": {"kind": "scene_captions", "count": 1},
        "steps": 1,
        "batch_size": 1,
        "learning_rate": 1,
    }
    tree = {
        "name": "road",
        "distill": {"student": __file__, "stages": [stage], "undistilled": True},
        "export": {"targets": TARGETS},
        **changes,
    }
    return RunConfig.parse(tree, "tests/road.py")


def version(entries: Iterable[str]) -> str:
    """A code version by names alone: sources that change while the tests run do not disturb them."""
    return " ".join(entries)


def install(run_dir: Path, fail: str = "") -> None:
    """Put the fake stages where the pipeline imports the real ones; building `fail` fails its check."""
    fakes = Fakes(run_dir, fail)
    contents = (
        SimpleNamespace(run=fakes.distill),
        SimpleNamespace(evaluate_checkpoint=fakes.evaluate),
        SimpleNamespace(export_one=fakes.export, parse_target=fakes.parse_target),
        SimpleNamespace(bench_one=fakes.bench),
        SimpleNamespace(write=fakes.report),
    )
    for name, content in zip(STAGES, contents, strict=True):
        module = ModuleType(name)
        vars(module).update(vars(content))
        sys.modules[name] = module


class Fakes:
    """The four stages."""

    def __init__(self, run_dir: Path, fail: str) -> None:
        self.calls = run_dir.parent / "calls"
        self.fail = fail

    def make(self, name: str, folder: Path) -> Path:
        """Leave a finished folder with one file."""
        with finished_folder(folder, resume=True) as partial:
            (partial / "begun").touch()
            print(f"{name} talks")
            self.note(name)
            if name == self.fail:
                raise CheckFailed(f"{name} is wrong")
            (partial / "content").write_text(name)
        self.block(f"{name}!")
        return folder

    def note(self, name: str) -> None:
        """Record that `name` is being built, and wait if the environment says so."""
        with self.calls.open("a") as file:
            file.write(name + "\n")
        self.block(name)

    def block(self, name: str) -> None:
        """Wait to be killed."""
        if os.environ.get("BLOCK") == name:
            os.write(STDOUT, b"blocked\n")
            sys.stdin.read()

    def distill(self, config: DistillConfig, run_dir: Path, on_progress: OnProgress) -> Path:
        """Build what is missing of both students, as the real stage promises."""
        for name in ("student", "undistilled"):
            if not (run_dir / name).exists():
                self.make(name, run_dir / name)
        return run_dir / "student"

    def evaluate(self, checkpoint: Path, out: Path, config: object, on_progress: OnProgress, split: str) -> Path:
        """One student's answers."""
        assert (checkpoint / "content").is_file()
        return self.make(f"evaluate-{checkpoint.name}", out)

    def parse_target(self, target: str) -> None:
        """Refuse an unknown precision."""
        if target.endswith(":int5"):
            raise UserError(f"target {target!r}")

    def export(self, checkpoint: Path, target: str, out: Path, config: object, on_progress: object) -> Path:
        """One artifact."""
        assert (checkpoint / "content").is_file()
        name = artifact_folder(target)
        return self.make(f"export-{name}", out / name)

    def bench(self, artifact: Path, config: object, out: Path, on_progress: OnProgress) -> Path:
        """One result with its raw samples."""
        assert (artifact / "content").is_file()
        self.note(f"bench-{artifact.name}")
        result = out / "local" / f"{artifact.name}.json"
        result.parent.mkdir(parents=True, exist_ok=True)
        about = {"name": artifact.name, "precision": artifact.name.partition("-")[2]}
        tree = {"artifact": about, "device": {}, "valid": True, "answers": None, "reasons": {}}
        result.with_name(f"{artifact.name}.samples.json").write_text("{}")
        result.write_text(json.dumps(tree))
        return result

    def report(self, run_dir: Path, out: Path) -> Path:
        """One folder."""
        return self.make("report", out)


def walk(
    run_dir: Path, settings: RunConfig | None = None, fail: str = ""
) -> tuple[list[str], list[Outcome], list[str]]:
    """Run the road; returns the products built in this call, the outcomes and the problems."""
    calls = run_dir.parent / "calls"
    before = calls.read_text().splitlines() if calls.exists() else []
    install(run_dir, fail)
    outcomes, problems = run(settings or config(), run_dir, Progress(quiet=True))
    return calls.read_text().splitlines()[len(before) :], outcomes, problems


if __name__ == "__main__":
    steps.code_version = version
    with exit_codes():
        walk(Path(sys.argv[1]))
