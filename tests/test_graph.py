"""The exporters' graph computes what transformers computes for the same checkpoint."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from export.graph import Decoder, TokenEmbedding, VisionEncoder, masked_attention
from tests.tiny import random_model

VOCABULARY, IMAGE_ID, CONTEXT = 50, 3, 64


class GrowingDecoder(Decoder):
    """The plainest cache: one tensor per layer that grows."""

    def forward(self, x: torch.Tensor, past: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        old, new = past[0].shape[2], x.shape[1]
        cos, sin = self.cos[None, None, old : old + new], self.sin[None, None, old : old + new]  # [1, 1, N, d]
        present: list[torch.Tensor] = []
        return self.run_layers(x, cos, sin, (past, present)), present

    def attend(self, index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: object) -> torch.Tensor:
        past, present = cache  # type: ignore[misc]
        k, v = torch.cat((past[2 * index], k), 2), torch.cat((past[2 * index + 1], v), 2)  # [1, KV, T, d]
        present += [k, v]
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])  # [N, T]
        return masked_attention(q, k, v, mask)

    def empty(self) -> list[torch.Tensor]:
        return [torch.zeros(1, self.kv_heads, 0, self.head_dim)] * (2 * len(self.layers))


@pytest.fixture(scope="module", params=[4, 2], ids=["all-heads", "grouped-heads"])
def model(request: pytest.FixtureRequest) -> LlavaForConditionalGeneration:
    return random_model(VOCABULARY, IMAGE_ID, num_key_value_heads=request.param)


def reference_logits(model: LlavaForConditionalGeneration, x: torch.Tensor) -> torch.Tensor:
    return model.lm_head(model.model.language_model(inputs_embeds=x, use_cache=False).last_hidden_state)


@torch.no_grad()
def test_vision_encoder_gives_the_features_and_tokens_of_transformers(model: LlavaForConditionalGeneration) -> None:
    pixels = torch.randn(1, 3, 96, 96)
    tokens, features = VisionEncoder(model)(pixels)
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(features, states[-2][:, 1:])
    torch.testing.assert_close(tokens, model.model.multi_modal_projector(states[-2][:, 1:]))


@torch.no_grad()
@pytest.mark.parametrize("layer", [-3, -1, 1])
def test_vision_encoder_stops_at_the_selected_layer(layer: int) -> None:
    model = random_model(VOCABULARY, IMAGE_ID)
    model.config.vision_feature_layer = layer
    pixels = torch.randn(1, 3, 96, 96)
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(VisionEncoder(model)(pixels)[1], states[layer][:, 1:])


@torch.no_grad()
def test_token_embedding_looks_up_the_table(model: LlavaForConditionalGeneration) -> None:
    ids = torch.tensor([[0, 7, VOCABULARY - 1]])
    assert torch.equal(TokenEmbedding(model)(ids), model.get_input_embeddings()(ids))


@torch.no_grad()
def test_decoder_prefills_as_transformers_does(model: LlavaForConditionalGeneration) -> None:
    x = torch.randn(1, 20, 64)
    decoder = GrowingDecoder(model, CONTEXT)
    torch.testing.assert_close(decoder(x, decoder.empty())[0], reference_logits(model, x)[:, -1:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_decoder_with_cache_gives_every_position_of_the_full_forward(model: LlavaForConditionalGeneration) -> None:
    x = torch.randn(1, 20, 64)
    decoder = GrowingDecoder(model, CONTEXT)
    expected = reference_logits(model, x)
    _, past = decoder(x[:, :15], decoder.empty())
    for position in range(15, 20):
        logits, past = decoder(x[:, position : position + 1], past)
        torch.testing.assert_close(logits, expected[:, position : position + 1], rtol=1e-4, atol=1e-5)


def test_a_decoder_without_a_cache_says_so() -> None:
    decoder = Decoder(random_model(VOCABULARY, IMAGE_ID), CONTEXT)
    with pytest.raises(TypeError, match="where keys and values are kept"):
        decoder.run_layers(torch.randn(1, 2, 64), decoder.cos[:2], decoder.sin[:2], None)


@pytest.mark.parametrize("part", [VisionEncoder, TokenEmbedding, lambda m: Decoder(m, CONTEXT)])
def test_the_graph_shares_the_checkpoints_weights(part: Callable[[LlavaForConditionalGeneration], nn.Module]) -> None:
    model = random_model(VOCABULARY, IMAGE_ID)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert all(parameter.data_ptr() in own for parameter in part(model).parameters())
