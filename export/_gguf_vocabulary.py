"""tokenizer.json as llama.cpp's SentencePiece vocabulary, and whether llama.cpp then splits text the same way."""

import ctypes
import json
import re
from dataclasses import dataclass
from pathlib import Path

import llama_cpp
from gguf import GGUFWriter, TokenType

from vlm.errors import UserError
from vlm.runtimes.llamacpp import silence
from vlm.tokenizer import Tokenizer

_BLANK = "\u2581"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# One text of each kind that prompts are made of. None begins with a blank: there llama.cpp adds one, as
# SentencePiece does, and the tokenizer.json that transformers 5 writes does not.
PROBES = (
    "A chat between a curious user and an artificial intelligence assistant. USER: ",
    "\nWhat color is the circle? ASSISTANT:",
    "\nIs there a red square in the image?\nAnswer the question using a single word or phrase. ASSISTANT:",
    "\nA. left\nB. right\nAnswer with the option's letter from the given choices directly. ASSISTANT:",
    "1234567890 + 3.14 = 0x1F; (a-b)/c [d] {e} <f> & \"g\" 'h' #i @j %k",
    "two  spaces and\ttabs \n\n and lines ",
    "Größe, naïve, 東京, ¿qué?",
)


@dataclass(frozen=True)
class Vocabulary:
    """Pieces with llama.cpp's scores and types, one per id; `space_prefix`: each text gets a blank in front."""

    pieces: list[str]
    scores: list[float]
    types: list[int]
    space_prefix: bool


def read_vocabulary(tokenizer_file: Path, size: int) -> Vocabulary:
    """Read a LLaMA tokenizer.json as what SentencePiece would know of it.

    llama.cpp joins the neighbours whose joint piece has the best score; tokenizer.json lists its merges best first, so
    a piece's score is minus the rank of the first merge that makes it.

    Args:
        tokenizer_file: tokenizer.json, BPE with byte fall-back.
        size: rows of the model's embedding table; ids without a piece become unused ones.
    Raises:
        UserError: another kind of tokenizer, or more pieces than rows.
    """
    tree = json.loads(tokenizer_file.read_text())
    model = tree["model"]
    if model["type"] != "BPE" or not model.get("byte_fallback"):
        found = f"{model['type']}, byte_fallback {model.get('byte_fallback')}"
        raise UserError(
            f"{tokenizer_file}: a LLaMA tokenizer (BPE with byte_fallback) expected, found {found}. Export to "
            "onnx or executorch instead."
        )
    added = {token["id"]: token for token in tree["added_tokens"]}
    names = {index: piece for piece, index in model["vocab"].items()} | {i: t["content"] for i, t in added.items()}
    if max(names) >= size:
        raise UserError(
            f"{tokenizer_file}: id {max(names)} found, the model has {size} embeddings. Use its own tokenizer."
        )
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(pairs):
        ranks.setdefault("".join(pair), rank)
    pieces = [names.get(index, f"[UNUSED{index}]") for index in range(size)]
    types = [int(_type(index, names, added, model.get("unk_token") or "<unk>")) for index in range(size)]
    scores = [-float(ranks.get(piece, len(ranks) + index)) for index, piece in enumerate(pieces)]
    space_prefix = names[Tokenizer(tokenizer_file).encode("a")[0]].startswith(_BLANK)
    return Vocabulary(pieces, scores, types, space_prefix)


def _type(index: int, names: dict[int, str], added: dict[int, dict[str, object]], unknown: str) -> TokenType:
    if index not in names:
        return TokenType.UNUSED
    if names[index] == unknown:
        return TokenType.UNKNOWN
    if index in added:
        return TokenType.CONTROL if added[index]["special"] else TokenType.USER_DEFINED
    return TokenType.BYTE if _BYTE.fullmatch(names[index]) else TokenType.NORMAL


def add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary, bos: int, eos: int) -> None:
    """Write the tokenizer's keys."""
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([piece.encode() for piece in vocabulary.pieces])
    writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    writer.add_bos_token_id(bos)
    writer.add_eos_token_id(eos)
    if int(TokenType.UNKNOWN) in vocabulary.types:
        writer.add_unk_token_id(vocabulary.types.index(int(TokenType.UNKNOWN)))
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(vocabulary.space_prefix)


def tokenization_differences(decoder_file: Path, tokenizer_file: Path) -> list[str]:
    """Return the probe texts that llama.cpp's own tokenizer splits otherwise than tokenizer.json.

    Args:
        decoder_file: the .gguf; only its vocabulary is loaded.
        tokenizer_file: tokenizer.json.
    """
    silence()
    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(decoder_file).encode(), parameters)
    if not model:
        raise UserError(
            f"{decoder_file}: llama.cpp cannot read the vocabulary that was just written. Update "
            "llama-cpp-python, or export to onnx instead."
        )
    try:
        vocabulary, ours = llama_cpp.llama_model_get_vocab(model), Tokenizer(tokenizer_file)
        return [text for text in PROBES if _tokenize(vocabulary, text) != ours.encode(text)]
    finally:
        llama_cpp.llama_model_free(model)


def _tokenize(vocabulary: object, text: str) -> list[int]:
    raw = text.encode()
    room = len(raw) + 8
    ids = (llama_cpp.llama_token * room)()
    count = llama_cpp.llama_tokenize(vocabulary, raw, len(raw), ids, ctypes.c_int32(room), False, False)
    return list(ids[:count])
