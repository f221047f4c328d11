"""`pocketvlm ask`: one answer, shown as it is generated, with its timings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from vlm.runtimes.base import Answer


def ask(
    model: Annotated[
        Path,
        typer.Argument(metavar="ARTIFACT_OR_CHECKPOINT", help="Artifact folder; or checkpoint: folder or hub name."),
    ],
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="Picture.")],
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to ask about it.")],
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print answer and timings as JSON.")] = False,
) -> None:
    """Answer one question about one picture, word by word as it is generated."""
    import time
    from dataclasses import asdict

    from pocketvlm.commands._options import ready
    from pocketvlm.console import kept_stdout, print_json, quietly
    from vlm.preprocess import open_image
    from vlm.runtimes import open_runtime

    picture = open_image(image)
    ready(model, as_json)
    with kept_stdout() as terminal, quietly():
        start = time.perf_counter()
        runtime = open_runtime(model, threads)
        load_ms = (time.perf_counter() - start) * 1e3
        show = None if as_json else writer(terminal)
        try:
            answer = runtime.answer(picture, question, max_new_tokens, on_text=show)
        finally:
            runtime.close()
    decoded_s = sum(answer.timings.decode_ms) / 1e3
    rate = len(answer.timings.decode_ms) / decoded_s if decoded_s else None
    if as_json:
        times = {"load_ms": load_ms, **asdict(answer.timings), "decode_tok_s": rate}
        print_json({"answer": answer.text, "tokens": answer.tokens, "engine": runtime.engine, "timings": times})
        return
    print("" if answer.tokens else "(no answer: the model ended at once)")
    print(_times(runtime.engine, load_ms, answer, rate))


def writer(terminal: IO[str]) -> Callable[[str], None]:
    """Return what writes a growing text's new part; a character of several tokens is held back until it is whole."""
    written = 0

    def show(text: str) -> None:
        nonlocal written
        whole = text.rstrip("\ufffd")
        terminal.write(whole[written:])
        terminal.flush()
        written = max(written, len(whole))

    return show


def _times(engine: str, load_ms: float, answer: Answer, rate: float | None) -> str:
    times = answer.timings
    return (
        f"[{engine}] load {load_ms:.0f} ms, vision {times.vision_ms:.1f} ms, "
        f"prefill {times.prefill_ms:.1f} ms ({times.prefill_tokens} tokens), "
        f"first token after {times.ttft_ms:.1f} ms, "
        f"decode {'nothing after the first token' if rate is None else f'{rate:.1f} tokens/s'}"
    )
