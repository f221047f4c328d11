"""`pocketvlm ask`: one answer with its timings."""

from pathlib import Path
from typing import Annotated

import typer


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
    """Answer one question about one picture."""
    import time
    from dataclasses import asdict

    from pocketvlm.commands._options import ready
    from pocketvlm.console import print_json, quietly
    from vlm.preprocess import open_image
    from vlm.runtimes import open_runtime

    picture = open_image(image)
    ready(model, as_json)
    with quietly():
        start = time.perf_counter()
        runtime = open_runtime(model, threads)
        load_ms = (time.perf_counter() - start) * 1e3
        try:
            answer = runtime.answer(picture, question, max_new_tokens)
        finally:
            runtime.close()
    timings = answer.timings
    decoded_s = sum(timings.decode_ms) / 1e3
    rate = len(timings.decode_ms) / decoded_s if decoded_s else None
    if as_json:
        times = {"load_ms": load_ms, **asdict(timings), "decode_tok_s": rate}
        print_json({"answer": answer.text, "tokens": answer.tokens, "engine": runtime.engine, "timings": times})
        return
    print(answer.text)
    speed = "one token only" if rate is None else f"{rate:.1f} tokens/s"
    print(
        f"[{runtime.engine}] load {load_ms:.0f} ms, vision {timings.vision_ms:.1f} ms, "
        f"prefill {timings.prefill_ms:.1f} ms ({timings.prefill_tokens} tokens), "
        f"first token after {timings.ttft_ms:.1f} ms, decode {speed}"
    )
