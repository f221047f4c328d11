"""The frozen vision tower, run once per image for teacher and student alike."""

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from vlm.data.records import load_image
from vlm.manifest import Preprocessing
from vlm.preprocess import pixel_values


class TowerFeatures:
    """Image references -> patch features [I, P, vision_dim] of the layer the projector reads, on the tower's device.

    Args:
        model: owner of the tower.
        preprocessing: how a picture becomes pixels.
        keep: how many images' features to keep, in the CPU's memory as float16 (each P * vision_dim * 2 bytes).
    """

    def __init__(self, model: LlavaForConditionalGeneration, preprocessing: Preprocessing, keep: int) -> None:
        self.tower = model.model.vision_tower
        self.layer = model.config.vision_feature_layer
        self.preprocessing, self.keep = preprocessing, keep
        self.kept: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, images: list[str]) -> Tensor:
        """Return the features of the images, in order."""
        device = next(self.tower.parameters()).device
        if not images:  # a batch of text only
            vision = self.tower.config
            return torch.zeros(0, (vision.image_size // vision.patch_size) ** 2, vision.hidden_size, device=device)
        fresh = [image for image in dict.fromkeys(images) if image not in self.kept]
        computed = dict(zip(fresh, self._compute(fresh, device), strict=True)) if fresh else {}
        known = {**self.kept, **computed}
        self.kept.update(list(computed.items())[: max(0, self.keep - len(self.kept))])
        return torch.stack([known[image].float() for image in images]).to(device)  # [I, P, vision_dim]

    def _compute(self, images: list[str], device: torch.device) -> Tensor:
        arrays = [torch.from_numpy(pixel_values(load_image(image), self.preprocessing)) for image in images]
        pixels = torch.cat(arrays).to(device)  # [I, 3, S, S]
        # float32 even under autocast: exports compute these features in float32 too.
        with torch.autocast(device.type, enabled=False):
            states = self.tower(pixels.float(), output_hidden_states=True).hidden_states
        features: Tensor = states[self.layer][:, 1:].to("cpu", torch.float16)  # [I, P, vision_dim]
        return features
