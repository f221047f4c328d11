"""Prompts have, token for token, the ids that upstream's code gives them."""

import json
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from tests.upstream import save_clip, save_upstream
from vlm.models.checkpoint import load_checkpoint
from vlm.models.from_upstream import to_hf
from vlm.prompts import TEMPLATES, prompt_ids
from vlm.tokenizer import Tokenizer

IMAGE = 775
QUESTIONS = ["What color is the circle?", "Is it red?\nAnswer with one word.", "Größe 12, <b>?", "a  b"]
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


class Upstream:
    """Upstream's tokenizer, the slow LlamaTokenizer of transformers 4.33 (legacy), around sentencepiece itself."""

    def __init__(self, path: Path) -> None:
        self.pieces = SentencePieceProcessor(model_file=str(path))

    def text(self, text: str) -> list[int]:
        """Ids of a text in which "</s>" is the end token: each part between is sentencepiece's business alone."""
        first, *rest = text.split("</s>")
        ids = self.pieces.encode(first)
        for part in rest:
            ids += [2, *self.pieces.encode(part)]
        return ids

    def prompt(self, text: str) -> list[int]:
        """`tokenizer_image_token`: bos, then each part around <image> alone."""
        first, *rest = text.split("<image>")
        ids = [1, *self.text(first)]
        for part in rest:
            ids += [IMAGE, *self.text(part)]
        return ids


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that came from upstream's layout."""
    work = tmp_path_factory.mktemp("prompts")
    save_clip(work / "clip")
    save_upstream(work / "up", "ldpnetv2", work / "clip")
    return to_hf(work / "up", work / "hf")


@pytest.mark.parametrize("question", QUESTIONS)
def test_v1_is_upstreams(question: str, folder: Path) -> None:
    upstream, ours = Upstream(folder / "tokenizer.model"), Tokenizer(folder / "tokenizer.json")
    for text, has_image in ((f"<image>\n{question}", True), (question, False)):
        expected = upstream.prompt(f"{SYSTEM} USER: {text} ASSISTANT:")
        assert prompt_ids(TEMPLATES["v1"](question, has_image), ours, 1, IMAGE, int(has_image)) == expected


def test_plain_is_upstreams(folder: Path) -> None:
    upstream, ours = Upstream(folder / "tokenizer.model"), Tokenizer(folder / "tokenizer.json")
    assert prompt_ids(TEMPLATES["plain"]("", True), ours, 1, IMAGE, 1) == upstream.prompt("<image>")


def test_a_conversation_with_end_tokens_is_upstreams(folder: Path) -> None:
    text = f"\nWhat color is it? ASSISTANT: red</s>USER: {QUESTIONS[1]} ASSISTANT: yes</s>"
    expected = Upstream(folder / "tokenizer.model").text(text)
    assert Tokenizer(folder / "tokenizer.json").encode(text) == expected
    reloaded = AutoTokenizer.from_pretrained(folder)
    assert reloaded.encode(text, add_special_tokens=False) == expected
    assert reloaded("red").input_ids[0] == 1


def test_the_templates_name_comes_from_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    assert load_checkpoint(folder).facts.template == "v1"
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    tree = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**tree, "template": "plain"}))
    assert load_checkpoint(tmp_path).facts.template == "plain"
