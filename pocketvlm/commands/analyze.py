"""`pocketvlm analyze`: similarity of features per layer, and where text looks in the picture."""

from pathlib import Path
from typing import Annotated

import typer


def analyze(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Checkpoint: folder or hub name.")],
    out: Annotated[Path, typer.Option(help="Folder of analysis.json and index.html.")],
    scenes: Annotated[int, typer.Option(min=1, help="Built-in pictures, three questions each.")] = 4,
    images: Annotated[Path | None, typer.Option(help="Folder of pictures, instead of built-in ones.")] = None,
    question: Annotated[
        list[str] | None, typer.Option("--question", help="Asked about each picture of --images; may be repeated.")
    ] = None,
    layer: Annotated[int, typer.Option(help="Whose attention is drawn, from 0; -1 is the last.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print analysis.json.")] = False,
) -> None:
    """Draw how features change from layer to layer and which parts of a picture the text attends to."""
    from pocketvlm.analysis.run import about_images, about_scenes
    from pocketvlm.analysis.run import analyze as look
    from pocketvlm.commands._options import ready
    from pocketvlm.console import print_json, quietly
    from pocketvlm.progress import Progress
    from vlm.data.scenes.question import DESCRIBE
    from vlm.errors import UserError

    if question and images is None:
        raise UserError("--question: belongs to --images; the built-in pictures bring their own questions.")
    asked = about_images(images, question or [DESCRIBE]) if images else about_scenes(scenes)
    ready(checkpoint, as_json)
    with Progress(quiet=as_json) as progress, quietly():

        def say(done: int, count: int) -> None:
            progress.update(done / count, f"question {done} of {count}")

        progress.single(f"{len(asked)} questions to {checkpoint.name}", 0.1 * len(asked))
        result = look(checkpoint, asked, layer, threads, out, say)
    if as_json:
        print_json(result)
    else:
        print(f"Analysis: {out / 'index.html'}")
