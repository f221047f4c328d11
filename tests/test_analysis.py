"""What is drawn of a model's insides equals what its plain forward pass gives."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedModel

from distill.analysis import adjacent_similarity, attention_map, cross_similarity, look_inside, looking_share
from pocketvlm.analysis.page import heat
from pocketvlm.analysis.run import about_images, about_scenes, analyze
from tests.tiny import random_model
from tests.upstream import save_clip, save_upstream
from vlm.errors import UserError

IMAGE = 299


def _prompt() -> tuple[torch.Tensor, torch.Tensor]:
    """Three words, the picture, five words: ids [1, N] and embeddings [1, N, D]."""
    ids = torch.tensor([[1, 5, 7, *[IMAGE] * 144, 11, 12, 13, 14, 15]])
    return ids, torch.randn(1, ids.shape[1], 64)


def _decoder(kind: str) -> PreTrainedModel:
    """A random decoder of two layers with grouped queries: a student's, or another family's."""
    if kind == "mobilevlm":
        return random_model(300, IMAGE, num_key_value_heads=2).model.language_model
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(kind, **sizes, num_key_value_heads=2, head_dim=16, vocab_size=300, pad_token_id=None)
    return AutoModel.from_config(config).eval()


@pytest.mark.parametrize(("kind", "layer"), [("mobilevlm", 0), ("mobilevlm", -1), ("qwen2", 1), ("gemma2", 0)])
@torch.no_grad()
def test_states_and_attention_equal_the_plain_forward_pass(kind: str, layer: int) -> None:
    decoder = _decoder(kind)
    ids, embeds = _prompt()
    inside = look_inside(decoder, embeds, ids, IMAGE, layer)
    decoder.set_attn_implementation("eager")
    plain = decoder(inputs_embeds=embeds, use_cache=False, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(inside.states[:-1], torch.cat(plain.hidden_states[:-1]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(decoder.norm(inside.states[-1:]), plain.last_hidden_state, rtol=1e-4, atol=1e-4)
    expected = plain.attentions[layer][0][:, 147:, 3:147]  # [H, M, V]
    torch.testing.assert_close(inside.attention, expected, rtol=1e-4, atol=1e-6)
    assert inside.vision.nonzero().flatten().tolist() == list(range(3, 147))
    torch.testing.assert_close(looking_share(inside.attention), expected.sum(-1).mean(-1))


def test_a_layer_that_does_not_exist_is_refused() -> None:
    decoder = random_model(300, IMAGE).model.language_model
    ids, embeds = _prompt()
    for layer in (2, -3):
        with pytest.raises(UserError, match=rf"layer {layer}: the decoder has 2 layers"):
            look_inside(decoder, embeds, ids, IMAGE, layer)


def test_similarities_are_means_of_cosines() -> None:
    states = torch.randn(4, 9, 5)
    vision = torch.tensor([False, True, True, False, True, False, False, True, True])
    adjacent = [[F.cosine_similarity(states[i, n], states[i + 1, n], 0) for n in (1, 2, 4, 7, 8)] for i in range(3)]
    torch.testing.assert_close(adjacent_similarity(states, vision), torch.tensor(adjacent).mean(1))
    pairs = [
        [F.cosine_similarity(states[i, v], states[i, t], 0) for v in (1, 2, 4, 7, 8) for t in (0, 3, 5, 6)]
        for i in range(4)
    ]
    torch.testing.assert_close(cross_similarity(states, vision), torch.tensor(pairs).mean(1))


def test_the_map_has_the_pictures_rows() -> None:
    attention = torch.zeros(2, 3, 144)
    attention[:, :, 13] = 0.5  # second token of the second row
    grid = attention_map(attention)
    assert grid.shape == (12, 12) and grid[1, 1] == 0.5 and grid.sum() == 0.5
    with pytest.raises(UserError, match="140 vision tokens are no square grid"):
        attention_map(torch.zeros(2, 3, 140))


def test_the_heat_is_brightest_where_attention_is_highest() -> None:
    import base64
    import io

    drawn = Image.open(io.BytesIO(base64.b64decode(heat([[0.0, 0.1], [0.2, 0.0]]).partition(",")[2])))
    brightness = np.asarray(drawn.convert("RGB")).sum(-1)
    assert brightness.argmax() == 2 and brightness[0, 0] == 0 and drawn.size == (2, 2)


def test_scenes_are_validation_scenes_with_questions_of_three_families() -> None:
    asked = about_scenes(2)
    assert [entry.image for entry in asked] == ["scenes:900000"] * 3 + ["scenes:900001"] * 3
    assert len({entry.question for entry in asked[:3]}) == 3


def test_analysis_of_a_folder_of_pictures(random_checkpoint: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (120, 60), (200, 30, 30)).save(pictures / "red.png")
    (pictures / "notes.txt").write_text("no picture")
    asked = about_images(pictures, ["What is it?", "Is <it> red?"])
    done: list[int] = []
    result = analyze(random_checkpoint, asked, 0, 1, tmp_path / "out", lambda number, _: done.append(number))
    assert done == [1, 2]
    assert json.loads((tmp_path / "out" / "analysis.json").read_text()) == json.loads(json.dumps(result))
    assert [len(result["similarity"][name]["mean"]) for name in ("adjacent_vision", "vision_text")] == [2, 3]
    first = result["prompts"][0]
    assert np.array(first["attention"]).shape == (12, 12) and len(first["looking"]) == 4
    assert 0 < sum(map(sum, first["attention"])) <= 1
    text = (tmp_path / "out" / "index.html").read_text()
    assert "Is &lt;it&gt; red?" in text and text.count('class="heat" href="data:image/png') == 2
    assert not re.search(r'(?:src|href)="(?!data:|#)', text)  # one file that needs no other


@pytest.mark.parametrize(("kind", "side"), [("ldpnet", 12), ("ldpnetv2", 12), ("mlp2x_gelu", 24)])
def test_a_checkpoint_in_upstreams_layout_is_analysed(kind: str, side: int, tmp_path: Path) -> None:
    save_clip(tmp_path / "clip")
    save_upstream(tmp_path / "up", kind, tmp_path / "clip", max_position_embeddings=1024)
    result = analyze(tmp_path / "up", about_scenes(1), -1, 1, tmp_path / "out", lambda *_: None)
    assert np.array(result["prompts"][0]["attention"]).shape == (side, side)


def test_the_picture_is_shown_as_the_model_sees_it(random_checkpoint: Path) -> None:
    from pocketvlm.analysis.run import as_seen
    from vlm.manifest import Preprocessing
    from vlm.preprocess import pixel_values

    how = Preprocessing(size=96)
    seen = np.asarray(as_seen(pixel_values(Image.new("RGB", (96, 48), (200, 30, 30)), how), how))
    assert seen.shape == (96, 96, 3)
    assert seen[48, 48].tolist() == [200, 30, 30] and seen[5, 5].tolist() == list(how.pad_colour)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no picture found"):
        about_images(tmp_path, ["What?"])
