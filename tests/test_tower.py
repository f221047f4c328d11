"""The vision tower of the built-in scenes: what is written can be read, and attention by cell is what it claims."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlm.data.scenes.attributes import CLASSES
from vlm.errors import UserError

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def test_a_trained_tower_is_a_clip_vision_model_of_24_by_24_patches(tmp_path: Path) -> None:
    from distill.tower import build_reader, make_batch, train_tower

    accuracies = train_tower(tmp_path / "tower", steps=1, seed=3, held_out=32)
    assert set(accuracies["features"]) == set(CLASSES)
    assert sorted(path.name for path in tmp_path.glob("*")) == ["tower"]
    tower = transformers.CLIPVisionModel.from_pretrained(tmp_path / "tower")
    pixels, _ = make_batch(0, 2)
    states = tower(pixel_values=pixels, output_hidden_states=True).hidden_states
    assert [tuple(state.shape) for state in states] == [(2, 1 + 24 * 24, 64)] * 5
    fresh = build_reader(3).tower.embeddings.position_embedding.weight
    assert not torch.equal(tower.embeddings.position_embedding.weight, fresh)
    before = (tmp_path / "tower" / "tower.json").read_bytes()
    assert train_tower(tmp_path / "tower", steps=1, seed=3) == accuracies  # finished: not trained again
    assert (tmp_path / "tower" / "tower.json").read_bytes() == before


def test_a_tower_of_another_command_is_left_alone_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from distill import tower

    (tmp_path / "tower.json").write_text('{"steps": 7, "seed": 0, "accuracies": {"features": {"shape": 90.0}}}')
    for steps, code in (("7", 0), ("8", 2)):
        monkeypatch.setattr("sys.argv", ["tower", "--out", str(tmp_path), "--steps", steps])
        assert tower.main() == code
    captured = capsys.readouterr()
    assert "this tower is finished" in captured.out
    assert "holds a tower of 7 steps, seed 0, patches of 4, not of 8 steps" in captured.err
    assert captured.err.count("\n") == 1


def test_a_tower_of_wider_patches_has_fewer_of_them_and_goes_on_from_its_own_kind_only(tmp_path: Path) -> None:
    from distill.tower import train_tower

    train_tower(tmp_path / "wide", steps=1, patch=8, held_out=32)
    tower = transformers.CLIPVisionModel.from_pretrained(tmp_path / "wide")
    assert tower.embeddings.position_embedding.weight.shape[0] == 1 + 12 * 12
    with pytest.raises(UserError, match=r"patches of 8, not of 4\. Give --patch 8"):
        train_tower(tmp_path / "next", steps=1, seed=1, init=tmp_path / "wide")
    train_tower(tmp_path / "next", steps=1, seed=1, patch=8, held_out=32, init=tmp_path / "wide")


def test_attention_by_cell_is_attention_to_the_own_cell_alone() -> None:
    from distill.tower_attention import attention_by_cell

    side = 6
    query, key, value = torch.randn(3, 2, 4, 1 + side * side, 8, generator=torch.Generator().manual_seed(0))
    rows, columns = torch.arange(side).repeat_interleave(side) // 2, torch.arange(side).repeat(side) // 2
    allowed = torch.ones(1 + side * side, 1 + side * side, dtype=torch.bool)  # [N, N]
    allowed[1:] = False
    allowed[1:, 1:] = (rows[:, None] == rows) & (columns[:, None] == columns)
    scores = (query @ key.transpose(2, 3) / 8**0.5).masked_fill(~allowed, -torch.inf)  # [B, H, N, N]
    expected = (scores.softmax(-1) @ value).transpose(1, 2)  # [B, N, H, D/H]
    torch.testing.assert_close(attention_by_cell(torch.nn.Identity(), query, key, value, None)[0], expected)
