"""LLaMA's tokenizer between upstream's files, which know no <image>, and transformers', where it has an id."""

import json
import shutil
import tempfile
from pathlib import Path

from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase

from vlm.errors import UserError
from vlm.prompts import IMAGE

MODEL = "tokenizer.model"
PAD = "<pad>"
_FILES = (MODEL, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_NAMES = ("bos_token", "eos_token", "unk_token")


def from_upstream(folder: Path, vocabulary: int) -> PreTrainedTokenizerBase:
    """Read upstream's tokenizer and add <image> and <pad>, as transformers' own conversion of LLaVA does.

    Args:
        folder: of the checkpoint.
        vocabulary: rows of its embeddings; <image> must not get one of them.
    Raises:
        UserError: there is no tokenizer.model, it or another of the tokenizer's files is damaged, or it has fewer
            tokens than the embeddings have rows.
    """
    if not (folder / MODEL).is_file():
        raise UserError(f"{folder}: no {MODEL}, which upstream's tokenizer is read from. Copy it from the base model.")
    with tempfile.TemporaryDirectory() as name:
        try:
            tokenizer = _read(folder, Path(name))
        except (ValueError, TypeError, AttributeError, OSError) as error:
            reason = str(error).partition("\n")[0].replace(name, str(folder))
            raise UserError(
                f"{folder}: its tokenizer cannot be read ({reason}). Copy {', '.join(_FILES)} (those there are) "
                "again from the published checkpoint; git-lfs files as themselves, not as their pointers."
            ) from error
    if len(tokenizer) < vocabulary:
        raise UserError(
            f"{folder / MODEL}: {len(tokenizer)} tokens found, {vocabulary} (vocab_size of config.json) expected: this "
            "tokenizer does not belong to the weights. Copy it from the published checkpoint."
        )
    tokenizer.add_tokens(AddedToken(IMAGE, special=True, normalized=False), special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": PAD})
    tokenizer.image_token = IMAGE
    return tokenizer


def _read(folder: Path, copy: Path) -> PreTrainedTokenizerBase:
    """Upstream's tokenizer from a copy without tokenizer.json, which upstream never reads; without the key `legacy` its
    version of transformers puts a blank before the text that follows a special token."""
    for file in _FILES:
        if (folder / file).is_file():
            shutil.copyfile(folder / file, copy / file)
    config = copy / "tokenizer_config.json"
    values = json.loads(config.read_text()) if config.is_file() else {}
    values = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True} | values
    config.write_text(json.dumps(values))
    tokenizer = AutoTokenizer.from_pretrained(copy)
    # What transformers does not write by itself; without `legacy` it reads its own files back as another tokenizer.
    tokenizer.init_kwargs |= {"image_token": IMAGE, "legacy": tokenizer.legacy, "add_bos_token": True}
    return tokenizer


def to_upstream(folder: Path, out: Path) -> None:
    """Write the tokenizer of a checkpoint in transformers' layout to `out` as upstream's files, without <image>.

    Raises:
        UserError: the checkpoint has no tokenizer.model, the only form that upstream reads.
    """
    if not (folder / MODEL).is_file():
        raise UserError(
            f"{folder}: no {MODEL}, the only form in which upstream reads a tokenizer. Copy it from the base model."
        )
    shutil.copyfile(folder / MODEL, out / MODEL)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    names = {name: str(getattr(tokenizer, name)) for name in _NAMES}
    names["pad_token"] = names["unk_token"]  # as upstream trains
    told = folder / "tokenizer_config.json"
    legacy = json.loads(told.read_text()).get("legacy", False) if told.is_file() else False  # transformers 5's default
    config = {
        "tokenizer_class": "LlamaTokenizer",
        **names,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": legacy,
        "model_max_length": 2048,
        "padding_side": "right",
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "special_tokens_map.json").write_text(json.dumps(names, indent=2) + "\n")
