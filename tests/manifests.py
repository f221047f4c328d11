"""One manifest for every test that needs an artifact folder but no engine, and an artifact of the fake engine."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from vlm.manifest import Manifest, Precision, Preprocessing, list_files


def write_manifest(folder: Path, **changes: Any) -> Manifest:
    """Describe the files of `folder`, whose name is "<format>-<precision>", as an artifact of a tiny model.

    Args:
        folder: holds the artifact's files already.
        changes: values of single keys, instead of those here.
    """
    precision = folder.name.partition("-")[2]
    values: dict[str, Any] = {
        "schema": 1,
        "name": folder.name,
        "format": "onnx",
        "engine": "onnx",
        "precision": precision,
        "precisions": Precision(vision="fp32", projector="fp32", embedding="fp32", decoder=precision),
        "files": list_files(folder),
        "source_sha256": "0" * 64,
        "preprocessing": Preprocessing(size=96),
        "template": "v1",
        "image_tokens": 144,
        "image_token_id": 3,
        "bos_id": 1,
        "eos_id": 2,
        "hidden_size": 64,
        "vocab_size": 512,
        "context_length": 512,
        "versions": {},
        "settings": {},
    }
    manifest = Manifest(**{**values, **changes})
    manifest.write(folder)
    return manifest


def fake_artifact(tmp_path: Path, name: str = "fake-fp32", context_length: int = 256, **does: str) -> Path:
    """An artifact for the fake engine."""
    folder = tmp_path / name
    folder.mkdir()
    tokenizer = Tokenizer(WordLevel({"?": 0, "<image>": 1, "</s>": 2, "Yes": 3}, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    write_manifest(
        folder,
        preprocessing=Preprocessing(size=8),
        image_tokens=4,
        image_token_id=1,
        bos_id=0,
        hidden_size=8,
        vocab_size=9,
        context_length=context_length,
        settings={"notes": str(tmp_path), **does},
    )
    return folder
