"""`pocketvlm sensitivity`: which layers suffer from few bits, and the mixed precision that follows."""

from pathlib import Path
from typing import Annotated

import typer


def sensitivity(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Checkpoint in Hugging Face layout.")],
    out: Annotated[Path, typer.Option(help="Folder of sensitivity.json and index.html.")],
    scenes: Annotated[int, typer.Option(min=1, help="Questions about training scenes to measure on.")] = 16,
    bits: Annotated[float, typer.Option(min=4.625, help="Mean bits per weight, scales included, to stay below.")] = 5.5,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    force: Annotated[bool, typer.Option("--force", help="Start also where memory seems too small.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print sensitivity.json.")] = False,
) -> None:
    """Round one layer at a time, measure how far the answers move, and propose a precision per component."""
    import torch

    from pocketvlm.analysis.sensitivity import write
    from pocketvlm.commands._options import ready
    from pocketvlm.console import print_json, print_table, quietly
    from pocketvlm.progress import Progress

    ready(checkpoint, as_json)
    torch.set_num_threads(threads)
    with Progress(quiet=as_json) as progress, quietly():
        from export.forecast import scan_forecast
        from export.sensitivity import passes, scan, tree
        from export.source import open_checkpoint

        opened = open_checkpoint(checkpoint)
        needs = scan_forecast(opened, passes(opened, scenes), out)
        needs.refuse_if_hopeless(force)
        progress.note(f"This scan {needs.text()}.")
        progress.single(f"layers of {checkpoint.name}", needs.seconds)
        progress.update(0.0, "the answers of the unrounded model")
        found = scan(
            opened,
            scenes,
            lambda done, count: progress.update(done / count, f"layer {done} of {count}"),
        )
        result = tree(found, scenes, bits)
        write(result, checkpoint.resolve().name, out)
    if as_json:
        print_json(result)
        return
    rows = [
        [entry["name"], f"{entry['count']:,}", f"{entry['kl_4']:.6f}", f"{entry['kl_8']:.6f}"]
        for entry in sorted(result["layers"], key=lambda entry: -entry["kl_4"])
    ]
    print_table("", ["layer", "weights", "KL at 4 bits", "KL at 8 bits"], rows)
    print(f"{result['mean_bits']:.2f} bits per weight: {' '.join(f'--to {target}' for target in result['targets'])}")
    print(f"Chart: {out / 'index.html'}")
