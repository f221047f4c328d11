"""The road as a list of steps: what each makes, from what, and the one stage call that makes it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from distill.data.config import missing, refuse
from pocketvlm import accuracy
from pocketvlm.ledger import OnProgress, Product, Step
from pocketvlm.sources import code_version, constant, entries_of
from pocketvlm.stamps import input_files, text_hash
from vlm.manifest import artifact_folder

if TYPE_CHECKING:
    from distill.config import DistillConfig
    from pocketvlm.pipeline import RunConfig

# Seconds on two cores, for the remaining time of a first run; afterwards the stamps know better.
EXPECTED_S = {"distill": 330, "evaluate": 30, "bench": 25, "check": 2, "report": 8}
EXPORT_S = {"onnx": 15, "executorch": 35, "coreml": 25, "gguf": 10}


def road(config: RunConfig, run_dir: Path) -> list[Step]:
    """Return the steps of a run in the order in which they are made."""
    targets = config.export.targets
    names = [artifact_folder(target) for target in targets]
    results = tuple(f"bench-{name}" for name in names)
    return [
        distill(config.distill, run_dir),
        *(evaluate(config, run_dir, student) for student in students(config.distill)),
        *(export(config, run_dir, target) for target in targets),
        *(bench(config, run_dir, target) for target in targets),
        check(config, run_dir, results),
        report(config, run_dir, ("check", *(f"export-{name}" for name in names), *results)),
    ]


def distill(config: DistillConfig, run_dir: Path) -> Step:
    """The student, and beside it the same student trained without distillation."""
    inputs = {
        "configuration": text_hash(config.model_dump(mode="json")),
        "input files": input_files(named_paths(config)),
        "code": code_version(["distill.run", "distill.training.worker", *entries_of("distill.losses")]),
    }
    names = students(config)

    def build(on_progress: OnProgress) -> list[Path]:
        from distill.run import run

        run(config, run_dir, on_progress)
        return [run_dir / name for name in names]

    products = tuple(Product(name, inputs, path=run_dir / name) for name in names)
    return Step("distill", products, build, EXPECTED_S["distill"])


def students(config: DistillConfig) -> tuple[str, ...]:
    """Names of the checkpoints that distillation leaves."""
    return ("student", "undistilled") if config.undistilled else ("student",)


def named_paths(config: DistillConfig) -> dict[str, str | None]:
    """Configuration key -> file or folder that distillation reads.

    Raises:
        UserError: lists every file and folder of a stage's data that is missing.
    """
    paths = {"distill.teacher": config.teacher, "distill.vision": config.vision}
    if isinstance(config.student, str):
        paths["distill.student"] = config.student
    refuse({stage.name: missing(stage.data) for stage in config.stages})
    for number, stage in enumerate(config.stages):
        for part in stage.data.all_parts():
            place = f"distill.stages.{number}.data.{part.name}"
            paths[f"{place}.records"] = part.records
            paths |= {f"{place}.{folder}": f"{part.images}/{folder}" for folder in part.folders or ["."]}
    return paths


def evaluate(config: RunConfig, run_dir: Path, student: str, split: str = "test") -> Step:
    """A student's answers in torch: what its artifacts are held against; on validation, what choices are made by."""
    settings = config.bench.model_dump(mode="json", include={"tasks", "scenes", "max_new_tokens", "threads"})
    name = student if split == "test" else f"{student}-{split}"
    inputs = {
        "configuration": text_hash(settings),
        "code": code_version(["pocketvlm.evaluation", "vlm.runtimes.torch", *entries_of("device_bench.tasks")]),
    }
    folder = run_dir / "evaluations" / name

    def build(on_progress: OnProgress) -> list[Path]:
        from pocketvlm.evaluation import evaluate_checkpoint

        return [evaluate_checkpoint(run_dir / student, folder, config.bench, on_progress, split)]

    products = (Product(f"evaluate-{name}", inputs, (student,), folder),)
    return Step(f"evaluate {name}", products, build, EXPECTED_S["evaluate"])


def export(config: RunConfig, run_dir: Path, target: str) -> Step:
    """One artifact with its proof."""
    format_, name = target.partition(":")[0], artifact_folder(target)
    settings = config.export.model_dump(mode="json", exclude={"targets"})
    calibration = {key: settings[key] for key in ("calibration_records", "calibration_images")}
    inputs = {
        "configuration": text_hash(settings),
        "input files": input_files({f"export.{key}": path for key, path in calibration.items()}),
        "code": code_version(["export.run", f"export.formats.{format_}", engine(format_), "vlm.runtimes.torch"]),
    }

    def build(on_progress: OnProgress) -> list[Path]:
        from export.run import export_one

        return [export_one(run_dir / "student", target, run_dir / "artifacts", config.export, on_progress)]

    product = Product(f"export-{name}", inputs, ("student",), run_dir / "artifacts" / name)
    return Step(f"export {target}", (product,), build, EXPORT_S.get(format_, max(EXPORT_S.values())))


def bench(config: RunConfig, run_dir: Path, target: str) -> Step:
    """One artifact's measurement."""
    format_, name = target.partition(":")[0], artifact_folder(target)
    plug_ins = [*entries_of("device_bench.tasks"), *entries_of("device_bench.devices")]
    inputs = {
        "configuration": text_hash(config.bench.model_dump(mode="json")),
        "code": code_version(["device_bench.run", "device_bench.worker", *plug_ins, engine(format_)]),
    }

    def build(on_progress: OnProgress) -> list[Path]:
        from device_bench.run import bench_one

        return [bench_one(run_dir / "artifacts" / name, config.bench, run_dir / "results", on_progress)]

    product = Product(f"bench-{name}", inputs, (f"export-{name}",))
    return Step(f"measure {target}", (product,), build, EXPECTED_S["bench"])


def check(config: RunConfig, run_dir: Path, needs: tuple[str, ...]) -> Step:
    """The last rung of the parity ladder: each artifact's accuracy against the student's."""
    verdict = run_dir / "stages" / "accuracy.json"
    inputs = {
        "configuration": text_hash({"allow_drift": config.export.allow_drift}),
        "code": code_version(["pocketvlm.accuracy"]),
    }

    def build(on_progress: OnProgress) -> list[Path]:
        return [accuracy.write(run_dir, verdict, config.export.allow_drift)]

    products = (Product("check", inputs, ("evaluate-student", *needs), verdict),)
    return Step("check accuracy", products, build, EXPECTED_S["check"], tolerant=True)


def report(config: RunConfig, run_dir: Path, needs: tuple[str, ...]) -> Step:
    """The report on everything above."""
    names = students(config.distill)
    models = (*names, *(f"evaluate-{name}" for name in names))
    inputs = {
        "configuration": text_hash(config.model_dump(mode="json")),
        "code": code_version(["device_bench.report", *entries_of("device_bench.report")]),
    }

    def build(on_progress: OnProgress) -> list[Path]:
        from device_bench.report.write import write

        return [write(run_dir, run_dir / "report")]

    products = (Product("report", inputs, (*models, *needs), run_dir / "report"),)
    return Step("report", products, build, EXPECTED_S["report"], tolerant=True)


def engine(format_: str) -> str:
    """Module of the runtime that opens artifacts of a format, read from the format's source."""
    return f"vlm.runtimes.{constant(f'export.formats.{format_}', 'ENGINE') or format_}"
