"""What every format is: a module with these names, found by its file name.

ENGINE: str                    the runtime of vlm.runtimes that opens its artifacts
COST: Cost                     what writing takes, for the forecast
PRECISIONS: tuple[str, ...]    what `write` can write: the names of its PRESETS
PRESETS, STORAGES              see export.precision; a format without them takes its PRECISIONS as they are
write(checkpoint, precision, folder, context_length, inputs=None) -> Written
    write the engine's files into `folder` (export.run adds tokenizer and manifest); `inputs`, a
    export.calibration.LayerInputs, says what the decoder's matrices are multiplied with: 4-bit ones are rounded by GPTQ
    for it (export.gptq), without it to the nearest
unproven(precision) -> str | None
    optional: why this machine cannot open what was written, so that its parity stays unknown
dequantized(checkpoint, precision, folder) -> dict[str, torch.Tensor] | None
    parameter names of the checkpoint's model -> the weights the written files really hold, read back from the
    files as float32; None where nothing was rounded (fp32)
"""

from dataclasses import dataclass, field

from vlm.manifest import Precision


@dataclass(frozen=True)
class Cost:
    """What writing takes, per parameter of the model; estimated at 1.7B (export/forecast.py).

    Attributes:
        memory: peak bytes; files that are mapped count, because they are in use.
        seconds: on two cores.
        vision: bytes of the files of the vision tower's parameters.
        temporary: bytes of the file that is written first, for another precision than f16.
        gptq: whether 4-bit weights are rounded for their inputs.
    """

    memory: float
    seconds: float
    vision: float
    temporary: float = 0.0
    gptq: bool = True


@dataclass(frozen=True)
class Written:
    """What a format has to say of the files it wrote.

    Attributes:
        precisions: storage type of each component's weights.
        settings: what only the engine needs (layer count, heads, file names); goes into the manifest.
        notes: plain sentences a user of the artifact must know.
    """

    precisions: Precision
    settings: dict[str, int | float | str | bool]
    notes: list[str] = field(default_factory=list)
