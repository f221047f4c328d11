"""`pocketvlm ask` shows the answer while it is generated."""

import io
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from pocketvlm.commands.ask import ask, writer
from vlm.runtimes.torch import TorchRuntime


def test_ask_shows_the_answer_as_it_grows(
    random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Talker(TorchRuntime):
        shown: ClassVar[list[str]] = []

        def forward(self, embeds: np.ndarray) -> np.ndarray:
            self.shown.append(capfd.readouterr().out)  # since the step before
            return super().forward(embeds)

    picture = tmp_path / "picture.png"
    Image.new("RGB", (120, 80), "red").save(picture)
    monkeypatch.setattr("vlm.runtimes.torch.TorchRuntime", Talker)
    monkeypatch.setattr("vlm.tokenizer.Tokenizer.decode", lambda _, ids: "abc"[: len(ids)])
    ask(random_checkpoint, picture, "What colour?", max_new_tokens=3)
    assert Talker.shown == ["", "a", "b"]
    assert capfd.readouterr().out.startswith("c\n[torch] load ")


@pytest.mark.parametrize(
    ("texts", "written"),
    [(["a", "a b", "a b c"], ["a", " b", " c"]), (["9", "9\ufffd", "9\ufffd\ufffd", "9é"], ["9", "", "", "é"])],
)
def test_a_character_is_written_once_and_whole(texts: list[str], written: list[str]) -> None:
    terminal = io.StringIO()
    show, found = writer(terminal), []
    for text in texts:
        before = len(terminal.getvalue())
        show(text)
        found.append(terminal.getvalue()[before:])
    assert found == written
