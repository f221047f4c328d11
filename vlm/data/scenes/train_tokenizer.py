"""Trains the scenes' tokenizer, of LLaMA's kind, and writes it for sentencepiece, tokenizers and transformers."""

from __future__ import annotations

import io
import json
from pathlib import Path

import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]  # made at run time
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from vlm.data.scenes.corpus import tokenizer_corpus

# The first size at which every phrase of the corpus is one piece, and one more: with <image> a multiple of 8.
VOCABULARY = 775
LONGEST_PIECE = 256
UNK, BOS, EOS = "<unk>", "<s>", "</s>"
IMAGE_TOKEN = "<image>"
BLANK = "\u2581"


def train_tokenizer(out_dir: Path) -> Path:
    """Writes tokenizer.model, tokenizer.json and tokenizer_config.json into a folder, always the same ones.

    Args:
        out_dir: the folder, created if missing; the three files are overwritten.

    Returns:
        `out_dir`. "<image>", the last id, is in tokenizer.json only, as in LLaVA's published folders.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    model = _train_sentencepiece()
    (out_dir / "tokenizer.model").write_bytes(model)
    _to_tokenizers(model).save(str(out_dir / "tokenizer.json"))
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": UNK,
        "pad_token": UNK,
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": True,
        "clean_up_tokenization_spaces": False,
        "padding_side": "right",
        "extra_special_tokens": {"image_token": IMAGE_TOKEN},
        "image_token": IMAGE_TOKEN,
        "model_max_length": 2048,
    }
    (out_dir / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return out_dir


def _train_sentencepiece() -> bytes:
    """The serialised sentencepiece model."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=tokenizer_corpus(),
        model_writer=written,
        model_type="bpe",
        vocab_size=VOCABULARY,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        split_by_whitespace=False,
        split_by_unicode_script=False,
        max_sentencepiece_length=LONGEST_PIECE,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        # The corpus marks itself which phrases follow a blank; the finished model gets LLaMA's dummy prefix below.
        add_dummy_prefix=False,
        num_threads=1,
        minloglevel=2,
    )
    proto = ModelProto.FromString(written.getvalue())
    proto.normalizer_spec.add_dummy_prefix = True
    return bytes(proto.SerializeToString(deterministic=True))


def _to_tokenizers(model: bytes) -> Tokenizer:
    """The same tokenizer as a Hugging Face one, with LLaMA's normaliser, decoder and bos."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [processor.id_to_piece(index) for index in range(processor.get_piece_size())]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        BPE(vocab=vocabulary, merges=_merges(vocabulary), unk_token=UNK, fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(BLANK), normalizers.Replace(" ", BLANK)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    names = (UNK, BOS, EOS, IMAGE_TOKEN)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return tokenizer


def _merges(vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, earlier pieces first, as sentencepiece merges them."""
    merges: list[tuple[str, str]] = []
    for piece in sorted(vocabulary, key=vocabulary.__getitem__):
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [split for split in splits if split[0] in vocabulary and split[1] in vocabulary]
        merges += sorted(known, key=lambda split: (vocabulary[split[0]], vocabulary[split[1]]))
    return merges
