"""GGUF for llama.cpp: the decoder, its vision tower in ONNX beside it, and mmproj.gguf for stock llama.cpp.

decoder.gguf          architecture "llama" with the tokenizer; runs in every llama.cpp program
vision_encoder.onnx   pixel_values -> vision tokens, fed to llama.cpp as embeddings
mmproj.gguf           the same tower for llama.cpp's own CLIP graph, which is wrong; its error is measured
"""

from pathlib import Path
from typing import Any

import torch

from export._gguf_decoder import (
    FILE_TYPES,
    MATRIX_TYPES,
    WEIGHTED,
    count_types,
    importance_matrix,
    quantize,
    read_decoder,
    storage,
    write_decoder,
)
from export._gguf_mmproj import measure, unsupported, write_mmproj
from export._gguf_vision import eight_bit, read_vision, write_vision
from export._gguf_vocabulary import PROBES, tokenization_differences
from export.calibration import LayerInputs, calibration_embeddings
from export.formats.base import Cost, Written
from export.graph import VisionEncoder
from export.precision import resolve, uniform
from export.source import in_float32
from vlm.manifest import Precision
from vlm.models.checkpoint import Checkpoint
from vlm.runtimes.llamacpp import DECODER, VISION

ENGINE = "llamacpp"
# The vision tower is there twice, in ONNX and in mmproj.gguf; llama.cpp rounds from a file in f16.
COST = Cost(memory=3.0, seconds=35e-9, vision=4.0, temporary=2.0, gptq=False)
CHOSEN = "llama.cpp"  # llama.cpp chooses, by the decoder's precision
PRESETS = {name: uniform("f16", embedding=CHOSEN, decoder=name, head=CHOSEN) for name in FILE_TYPES}
PRECISIONS = tuple(PRESETS)
VISION_TYPES = ("f16", "q8_0")
STORAGES = {
    "vision": VISION_TYPES,
    "projector": VISION_TYPES,
    "embedding": tuple(MATRIX_TYPES),
    "head": tuple(MATRIX_TYPES),
}
MMPROJ = "mmproj.gguf"
MATRICES = {"embedding": "token_embd.weight", "head": "output.weight"}


def write(
    checkpoint: Checkpoint, precision: str, folder: Path, context_length: int, inputs: LayerInputs | None = None
) -> Written:
    """Write decoder, vision tower and mmproj into `folder`.

    Args:
        checkpoint: the model, its weights as they are stored.
        precision: a preset, and exceptions but for the decoder (export.precision); every preset has the vision tower's
            and the projector's matrices in float16.
        context_length: longest sequence in tokens.
        inputs: what the importance matrix is measured on, without it the usual scenes; llama.cpp rounds itself.
    Raises:
        UserError: the decoder or the tokenizer is of a kind llama.cpp's architecture "llama" does not have.
    """
    chosen = resolve(precision, PRESETS, STORAGES)
    preset, decoder = chosen["decoder"], folder / DECODER
    embedding, head = (None if chosen[part] == CHOSEN else chosen[part] for part in ("embedding", "head"))
    if preset == "f16" and not embedding and not head:
        write_decoder(checkpoint, decoder, context_length)
    else:
        source = folder / "decoder-f16.gguf"
        write_decoder(checkpoint, source, context_length)
        sequences = _sequences(checkpoint, inputs) if preset in WEIGHTED else []
        importance = importance_matrix(checkpoint, sequences) if sequences else None
        quantize(source, decoder, preset, importance, embedding, head)
        source.unlink()
    types = storage(decoder)
    notes = [f"Types of the decoder's matrices: {count_types(types)}.", *_fallbacks(types, preset, embedding)]
    if preset in WEIGHTED:
        notes.append(f"Rounded with an importance matrix of {len(sequences)} pictures with questions and answers.")
    settings: dict[str, int | float | str | bool] = {"matrix_types": count_types(types)}
    different = tokenization_differences(decoder, checkpoint.facts.tokenizer)
    settings["tokenizer_differences"] = len(different)
    if different:
        notes.append(f"llama.cpp's own tokenizer splits {len(different)} of {len(PROBES)} texts unlike tokenizer.json.")
    _add_vision(checkpoint, chosen, folder, settings, notes)
    stored = {name: types[tensor].lower() for name, tensor in MATRICES.items() if tensor in types}
    return Written(
        precisions=Precision(vision=chosen["vision"], projector=chosen["projector"], decoder=preset, **stored),
        settings=settings,
        notes=notes,
    )


def _sequences(checkpoint: Checkpoint, inputs: LayerInputs | None) -> list[torch.Tensor]:
    return list(calibration_embeddings(checkpoint)) if inputs is None else inputs.read()


def dequantized(checkpoint: Checkpoint, precision: str, folder: Path) -> dict[str, torch.Tensor]:
    """Read every weight that was rounded back from decoder.gguf and vision_encoder.onnx."""
    return {**read_decoder(checkpoint, folder / DECODER), **read_vision(checkpoint, folder / VISION)}


def _fallbacks(types: dict[str, str], precision: str, embedding: str | None) -> list[str]:
    """Name the matrices whose rows do not divide into blocks, so that llama.cpp gave them another type."""
    asked = {"output.weight", *(["token_embd.weight"] if embedding else [])}
    block = precision.upper().removesuffix("_M")
    if block not in set(types.values()):
        return [f"No matrix has type {block}: no row divides into its blocks. llama.cpp chose {count_types(types)}."]
    usual = {block, "F32", "Q6_K"} if precision.endswith("_m") else {block, "F32"}  # _m: some in 6 bits by design
    other = sorted(name for name, kind in types.items() if kind not in usual and name not in asked)
    return [f"llama.cpp stored these in another type than {block}: {', '.join(other)}."] if other else []


def _add_vision(
    checkpoint: Checkpoint,
    chosen: dict[str, str],
    folder: Path,
    settings: dict[str, int | float | str | bool],
    notes: list[str],
) -> None:
    """Write the vision tower for ONNX Runtime and for llama.cpp."""
    encoder: Any = in_float32(VisionEncoder(checkpoint.model))
    rounded, ragged = eight_bit(checkpoint, chosen)
    write_vision(checkpoint, encoder, folder / VISION, rounded)
    if ragged:
        notes.append(f"These stayed float16, their rows do not divide into blocks of q8_0: {', '.join(ragged)}.")
    _add_mmproj(checkpoint, encoder, rounded, folder, settings, notes)


def _add_mmproj(
    checkpoint: Checkpoint,
    encoder: VisionEncoder,
    rounded: list[str],
    folder: Path,
    settings: dict[str, int | float | str | bool],
    notes: list[str],
) -> None:
    """Write mmproj.gguf and say how wrong stock llama.cpp is with it."""
    reason = unsupported(checkpoint)
    if reason:
        notes.append(f"No {MMPROJ}: {reason}.")
        return
    write_mmproj(checkpoint, encoder, folder / MMPROJ, rounded)
    found = measure(checkpoint, encoder, folder / DECODER, folder / MMPROJ)
    settings["mmproj"] = MMPROJ
    if found.cosine_min is None or found.cosine_mean is None:
        notes.append(f"{MMPROJ} could not be measured with stock llama.cpp: {found.failure}. Do not rely on it.")
        return
    settings["mmproj_cosine_min"], settings["mmproj_cosine_mean"] = found.cosine_min, found.cosine_mean
    notes.append(
        f"Do not use {MMPROJ} with stock llama.cpp until its CLIP graph is fixed (ggml-org/llama.cpp issue 25814, "
        f"class token appended last): measured cosine of the vision tokens with torch: {found.cosine_min:.3f} worst, "
        f"{found.cosine_mean:.3f} mean. pocketvlm uses {VISION} instead."
    )
