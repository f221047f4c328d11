"""The decoder as a .gguf of architecture "llama": names, rotary order of q and k, quantization, and the way back."""

import ctypes
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType
from gguf.quants import dequantize

from export._gguf_vocabulary import add_vocabulary, read_vocabulary
from export.calibration import input_powers
from export.source import release_pages
from vlm.errors import UserError
from vlm.models.checkpoint import Checkpoint
from vlm.runtimes.llamacpp import silence

# llama.cpp's name -> the checkpoint's; {} is the layer.
TENSORS = {
    "token_embd.weight": "model.language_model.embed_tokens.weight",
    "output_norm.weight": "model.language_model.norm.weight",
    "output.weight": "lm_head.weight",
    "blk.{}.attn_norm.weight": "model.language_model.layers.{}.input_layernorm.weight",
    "blk.{}.attn_q.weight": "model.language_model.layers.{}.self_attn.q_proj.weight",
    "blk.{}.attn_k.weight": "model.language_model.layers.{}.self_attn.k_proj.weight",
    "blk.{}.attn_v.weight": "model.language_model.layers.{}.self_attn.v_proj.weight",
    "blk.{}.attn_output.weight": "model.language_model.layers.{}.self_attn.o_proj.weight",
    "blk.{}.ffn_norm.weight": "model.language_model.layers.{}.post_attention_layernorm.weight",
    "blk.{}.ffn_gate.weight": "model.language_model.layers.{}.mlp.gate_proj.weight",
    "blk.{}.ffn_up.weight": "model.language_model.layers.{}.mlp.up_proj.weight",
    "blk.{}.ffn_down.weight": "model.language_model.layers.{}.mlp.down_proj.weight",
}
FILE_TYPES = {
    "f16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16,
    "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "q5_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q5_K_M,
    "q4_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
}
# What embedding and head can be stored as instead of what llama.cpp chooses for them.
MATRIX_TYPES = {
    "f16": llama_cpp.GGML_TYPE_F16,
    "q8_0": llama_cpp.GGML_TYPE_Q8_0,
    "q6_k": llama_cpp.GGML_TYPE_Q6_K,
    "q5_k": llama_cpp.GGML_TYPE_Q5_K,
    "q4_k": llama_cpp.GGML_TYPE_Q4_K,
    "q4_0": llama_cpp.GGML_TYPE_Q4_0,
}
# Precisions whose rounding is weighted by an importance matrix.
WEIGHTED = ("q4_k_m", "q5_k_m")


def write_decoder(checkpoint: Checkpoint, path: Path, context_length: int) -> None:
    """Write the decoder with its vocabulary: matrices as float16, the norms' vectors as float32.

    Raises:
        UserError: the decoder has something that architecture "llama" does not have.
    """
    config: Any = checkpoint.model.config.text_config
    writer = GGUFWriter(path, "llama")
    writer.add_name(checkpoint.folder.name)
    writer.add_context_length(context_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(_rope_base(checkpoint))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(LlamaFileType.MOSTLY_F16)
    vocabulary = read_vocabulary(checkpoint.facts.tokenizer, config.vocab_size)
    add_vocabulary(writer, vocabulary, checkpoint.facts.bos_id, checkpoint.facts.eos_id)
    for name, _, parameter, _ in decoder_tensors(checkpoint):
        kind = np.dtype(np.float16 if parameter.ndim > 1 else np.float32)
        writer.add_tensor_info(name, parameter.shape, kind, parameter.numel() * kind.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, _, parameter, heads in decoder_tensors(checkpoint):  # one in memory at a time
        tensor = interleave(parameter, heads) if heads else parameter
        writer.write_tensor_data(tensor.to(torch.float16 if tensor.ndim > 1 else torch.float32).contiguous().numpy())
        release_pages(checkpoint)
    writer.close()


def decoder_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, str, torch.Tensor, int]]:
    """Yield (llama.cpp's name, the checkpoint's, parameter, heads if its rows are in rotary order else 0).

    Raises:
        UserError: a parameter without a name in architecture "llama" (for example a bias).
    """
    config: Any = checkpoint.model.config.text_config
    names = {ours: theirs for theirs, ours in TENSORS.items()}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for parameter_name, parameter in checkpoint.model.named_parameters():
        if not parameter_name.startswith(("model.language_model.", "lm_head.")):
            continue
        layer = re.search(r"\.layers\.(\d+)\.", parameter_name)
        pattern = re.sub(r"\.layers\.\d+\.", ".layers.{}.", parameter_name)
        if pattern not in names:
            raise UserError(
                f"{checkpoint.folder}: GGUF architecture 'llama' has no tensor for "
                f"{parameter_name}. Export to onnx or executorch instead."
            )
        name = names[pattern].format(layer[1] if layer else "")
        rotary = next((count for part, count in heads.items() if f".{part}." in name), 0)
        yield name, parameter_name, parameter.detach(), rotary


def _rope_base(checkpoint: Checkpoint) -> float:
    config: Any = checkpoint.model.config.text_config
    rope = config.rope_parameters
    if rope["rope_type"] != "default":
        raise UserError(
            f"{checkpoint.folder}: rope_type {rope['rope_type']!r} found, GGUF export expects 'default'. "
            "Export to onnx or executorch instead."
        )
    return float(rope["rope_theta"])


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows [H * d, D] of q or k from transformers' halves to llama.cpp's pairs (x_i, x_{i + d/2})."""
    split = weight.reshape(heads, 2, -1, weight.shape[1])  # [H, 2, d/2, D]
    return split.transpose(1, 2).reshape(weight.shape)


def deinterleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo `interleave`."""
    split = weight.reshape(heads, -1, 2, weight.shape[1])  # [H, d/2, 2, D]
    return split.transpose(1, 2).reshape(weight.shape)


def quantize(
    source: Path,
    target: Path,
    precision: str,
    importance: dict[str, np.ndarray] | None = None,
    embedding: str | None = None,
    head: str | None = None,
) -> None:
    """Quantize a float16 .gguf with llama.cpp's own quantizer.

    Args:
        source: float16.
        target: gets the quantized file.
        precision: one of FILE_TYPES.
        importance: llama.cpp's tensor names -> weight of each column's error, float32 [in]; None: all the same.
        embedding, head: of MATRIX_TYPES; None: as llama.cpp chooses.
    Raises:
        UserError: llama.cpp refused (its return code is in the message).
    """
    silence()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = FILE_TYPES[precision]
    parameters.nthread = 2
    if embedding:
        parameters.token_embedding_type = MATRIX_TYPES[embedding]
    if head:
        parameters.output_tensor_type = MATRIX_TYPES[head]
    entries = _importance_entries(importance or {})
    if importance:
        parameters.imatrix = entries
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters))
    if code != 0:
        raise UserError(
            f"{target}: llama.cpp could not quantize to {precision} (code {code}). Choose another "
            "precision, for example gguf:f16, or free memory and disk."
        )


def _importance_entries(importance: dict[str, np.ndarray]) -> Any:
    """The importance matrix as llama.cpp's C array, which ends with an entry without a name."""
    entries = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()
    for entry, (name, values) in zip(entries, importance.items(), strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return entries


def importance_matrix(checkpoint: Checkpoint, sequences: Iterable[torch.Tensor]) -> dict[str, np.ndarray]:
    """Measure llama.cpp's importance matrix on what the decoder reads, [1, N, D] each; see `export.calibration`."""
    powers = input_powers(checkpoint, sequences)
    return {
        name: np.ascontiguousarray(powers[parameter_name].numpy(), np.float32)
        for name, parameter_name, _, _ in decoder_tensors(checkpoint)
        if parameter_name in powers
    }


def storage(path: Path) -> dict[str, str]:
    """Return llama.cpp's tensor names -> their storage types ("Q4_0", "F16" ...)."""
    return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}


def count_types(types: dict[str, str]) -> str:
    """Say how many matrices have which type, for example "15 Q4_0, 1 Q8_0"; vectors are float32 always."""
    counts = Counter(kind for name, kind in types.items() if "norm" not in name)
    return ", ".join(f"{count} {kind}" for kind, count in counts.most_common())


def read_decoder(checkpoint: Checkpoint, path: Path) -> dict[str, torch.Tensor]:
    """Read every decoder parameter back from a .gguf as float32, under the checkpoint's names."""
    stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    weights = {}
    for name, parameter_name, parameter, heads in decoder_tensors(checkpoint):
        flat = dequantize(stored[name].data, GGMLQuantizationType(stored[name].tensor_type))
        tensor = torch.from_numpy(np.array(flat, dtype=np.float32)).reshape(parameter.shape)
        weights[parameter_name] = deinterleave(tensor, heads) if heads else tensor
    return weights
