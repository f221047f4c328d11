"""`pocketvlm export`: a checkpoint becomes artifacts, each proven to be the same model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from export.outcome import Outcome


def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Checkpoint: folder or hub name.")],
    to: Annotated[list[str], typer.Option(help="FORMAT:PRECISION, for example onnx:int4; may be given several times.")],
    out: Annotated[Path, typer.Option(help="Folder in which each artifact gets a folder.")],
    context_length: Annotated[int | None, typer.Option(help="Longest sequence in tokens, prompt and answer.")] = None,
    probes: Annotated[int | None, typer.Option(help="Questions on which parity is measured.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads while parity is measured.")] = None,
    calibration_scenes: Annotated[
        int | None, typer.Option(help="Pictures that 4-bit weights are rounded for (GPTQ); 0: to the nearest.")
    ] = None,
    calibration_records: Annotated[
        Path | None, typer.Option(help="LLaVA-format file of pictures and questions to use instead of scenes.")
    ] = None,
    calibration_images: Annotated[Path | None, typer.Option(help="Folder of its pictures.")] = None,
    allow_drift: Annotated[bool, typer.Option("--allow-drift", help="Keep an artifact that fails parity.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Start also where memory or disk seem too small.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the artifacts' parity as JSON.")] = False,
) -> None:
    """Write artifacts of a checkpoint and climb the parity ladder with each."""
    from export.config import ExportConfig
    from pocketvlm.commands._options import given, ready
    from pocketvlm.console import quietly
    from pocketvlm.progress import Progress

    options = given(
        context_length=context_length,
        probes=probes,
        threads=threads,
        calibration_scenes=calibration_scenes,
        calibration_records=calibration_records and str(calibration_records),
        calibration_images=calibration_images and str(calibration_images),
    )
    config = ExportConfig.parse(
        {"targets": to, "allow_drift": allow_drift, "force": force, **options}, "pocketvlm export"
    )
    ready(checkpoint, as_json)
    with Progress(quiet=as_json) as progress, quietly():
        from export.run import expected, run

        needs = expected(config, checkpoint, out)
        progress.note(f"This export {needs.text()}.")
        progress.single("export", needs.seconds)
        outcome = run(config, checkpoint, out, progress.update)
    show(outcome, as_json)
    outcome.finished()


def show(outcome: Outcome, as_json: bool) -> None:
    """Print each artifact's size and parity; as JSON, what failed too."""
    from pocketvlm.console import print_json, print_table
    from vlm.manifest import read_manifest

    manifests = [(folder, read_manifest(folder)) for folder in outcome.artifacts]
    if as_json:
        keys = {"name", "format", "precision", "parity", "notes"}
        dumps = [{"path": p, "bytes": m.bytes, **m.model_dump(mode="json", include=keys)} for p, m in manifests]
        failed = [{"name": failure.name, "message": failure.message} for failure in outcome.failures]
        print_json({"artifacts": dumps, "failed": failed})
        return
    rows = []
    for folder, manifest in manifests:
        parity = manifest.parity
        verdict = "not measured" if parity is None else "passed" if parity.passed else "drift allowed"
        cosines = [None, None] if parity is None else [parity.vision_cos, parity.logits_cos]
        shown = ["-" if value is None else f"{value:.6f}" for value in cosines]
        rows.append([str(folder), f"{manifest.bytes / 1e6:.1f} MB", *shown, verdict])
    if rows:
        print_table("", ["artifact", "size", "vision cosine", "logits cosine", "parity"], rows)
