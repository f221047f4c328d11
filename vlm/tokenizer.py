"""tokenizer.json through the `tokenizers` library: all that a device needs, without transformers."""

from pathlib import Path

from tokenizers import Tokenizer as _Tokenizer

from vlm.errors import UserError


class Tokenizer:
    """Plain ids of a string and back; special tokens are never added here (vlm.prompts places them)."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(f"{path}: no such tokenizer file. Export the artifact again.")
        try:
            self._tokenizer = _Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for a file it cannot parse
            raise UserError(f"{path}: not a tokenizer.json ({error}). Export the artifact again.") from error

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, no special tokens added."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def identity(self) -> str:
        """Return a text that differs if any id could differ: the whole tokenizer."""
        return str(self._tokenizer.to_str())

    def decode(self, ids: list[int]) -> str:
        """Return the text of `ids`, special tokens left out."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)).strip()
