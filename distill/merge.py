"""From the shared tower's features to what a decoder reads: projected vision tokens among the text's embeddings."""

from torch import Tensor
from transformers import LlavaForConditionalGeneration


def project(model: LlavaForConditionalGeneration, features: Tensor) -> Tensor:
    """The model's vision tokens E of patch features: [I, P, vision_dim] -> [I, V, D]."""
    projector = model.model.multi_modal_projector
    tokens: Tensor = projector(features.to(next(projector.parameters()).dtype))
    return tokens


def merge_vision(model: LlavaForConditionalGeneration, input_ids: Tensor, tokens: Tensor) -> Tensor:
    """Embed ids [B, N] and put vision tokens [I, V, D] where the image placeholders stand: [B, N, D]."""
    is_vision = input_ids == model.config.image_token_id  # [B, N]
    embeds = model.get_input_embeddings()(input_ids.masked_fill(is_vision, 0))
    merged: Tensor = embeds.masked_scatter(is_vision[..., None], tokens.to(embeds.dtype))
    return merged
