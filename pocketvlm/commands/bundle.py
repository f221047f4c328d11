"""`pocketvlm bundle`: what is pushed to a device so that it needs neither Python nor a compiler nor an app."""

from typing import Annotated

import typer


def bundle(
    abi: Annotated[str, typer.Option(help="The device's processor: arm64-v8a or x86_64.")] = "arm64-v8a",
    engine: Annotated[list[str] | None, typer.Option(help="executorch, onnx or llamacpp; all if not given.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print folders, versions and checksums as JSON.")] = False,
) -> None:
    """Make the push bundles for a processor, or find them in the cache."""
    import json

    from device_bench.devices._bundle import bundle as make
    from device_bench.devices._bundle import check
    from device_bench.devices._recipe import ENGINES, RECORD
    from pocketvlm.console import print_json, print_table
    from pocketvlm.progress import Progress

    engines = engine or list(ENGINES)
    for name in engines:
        check(name, abi)  # what cannot be made is refused before any time is spent
    with Progress(quiet=as_json) as progress:
        progress.single("bundle", 60.0 * len(engines))
        progress.update(0.0, "bundle")
        made = [make(name, abi) for name in engines]
    if as_json:
        print_json({"bundles": [{"path": b.folder, **json.loads((b.folder / RECORD).read_text())} for b in made]})
        return
    rows = [
        [b.engine, f"{sum(path.stat().st_size for path in b.files.values()) / 2**20:.0f} MiB", str(b.folder)]
        for b in made
    ]
    print_table("", ["engine", "size", "folder"], rows)
