"""`pocketvlm convert`: a checkpoint from upstream's layout to transformers', and back."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Layout(StrEnum):
    """The layouts that checkpoints have."""

    hf = "hf"
    upstream = "upstream"


def convert(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Folder or hub name of the checkpoint.")],
    to: Annotated[Layout, typer.Option(help="hf: as transformers has it; upstream: as MobileVLM and LLaVA have it.")],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    vision: Annotated[
        Path | None, typer.Option(help="CLIP folder or hub name, for a checkpoint that does not say or hold its own.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the folder and the seconds as JSON.")] = False,
) -> None:
    """Convert a checkpoint between upstream's layout and transformers', bit for bit."""
    import time

    from pocketvlm.console import print_json, quietly
    from pocketvlm.progress import Progress

    start = time.perf_counter()
    with Progress(quiet=as_json) as progress, quietly():
        progress.single("convert", 60.0)
        from vlm.models.from_upstream import to_hf
        from vlm.models.to_upstream import to_upstream

        (to_hf if to is Layout.hf else to_upstream)(checkpoint, out, vision, progress.update)
    if as_json:
        print_json({"checkpoint": str(out), "layout": to.value, "seconds": round(time.perf_counter() - start, 1)})
        return
    print(out)
