"""python -m export._gguf_mmproj_probe DECODER MMPROJ PICTURE OUT: stock llama.cpp's vision tokens as OUT (.npy)."""

import ctypes
import sys
import time
from pathlib import Path

import llama_cpp
import numpy as np
from llama_cpp import mtmd_cpp as mtmd
from PIL import Image

from vlm.runtimes.llamacpp import silence

IMAGE_CHUNK = 1


def vision_tokens(decoder: Path, mmproj: Path, picture: np.ndarray) -> tuple[np.ndarray, float]:
    """Encode a picture [S, S, 3] uint8 with llama.cpp's multimodal library: vision tokens, flat, and seconds."""
    silence()
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(str(decoder).encode(), llama_cpp.llama_model_default_params())
    parameters = mtmd.mtmd_context_params_default()
    parameters.use_gpu, parameters.warmup, parameters.n_threads = False, False, 2
    context = mtmd.mtmd_init_from_file(str(mmproj).encode(), model, parameters)
    if not context:
        raise SystemExit(f"llama.cpp cannot load {mmproj}")
    raw = (ctypes.c_uint8 * picture.size).from_buffer_copy(picture.tobytes())
    bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(mtmd.mtmd_bitmap_init(picture.shape[1], picture.shape[0], raw))
    text = mtmd.mtmd_input_text()
    text.text, text.add_special, text.parse_special = mtmd.mtmd_default_marker(), False, True
    text.text_len = len(text.text)
    chunks = mtmd.mtmd_input_chunks_init()
    if mtmd.mtmd_tokenize(context, chunks, ctypes.byref(text), bitmaps, 1) != 0:
        raise SystemExit("llama.cpp cannot split the picture into chunks")
    for index in range(mtmd.mtmd_input_chunks_size(chunks)):
        chunk = mtmd.mtmd_input_chunks_get(chunks, index)
        if mtmd.mtmd_input_chunk_get_type(chunk) == IMAGE_CHUNK:
            start = time.perf_counter()
            if mtmd.mtmd_encode_chunk(context, chunk) != 0:
                raise SystemExit("llama.cpp cannot encode the picture")
            seconds = time.perf_counter() - start
            size = mtmd.mtmd_input_chunk_get_n_tokens(chunk) * llama_cpp.llama_model_n_embd(model)
            return np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(context), (size,)).copy(), seconds
    raise SystemExit("llama.cpp found no picture in the prompt")


if __name__ == "__main__":
    decoder_file, mmproj_file, picture_file, out_file = (Path(argument) for argument in sys.argv[1:])
    pixels = np.asarray(Image.open(picture_file).convert("RGB"))
    np.save(out_file, vision_tokens(decoder_file, mmproj_file, pixels)[0])
