"""The frozen vision tower, run once per image for teacher and student alike."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from distill.kept import Kept
from vlm.data.records import load_image
from vlm.manifest import Preprocessing
from vlm.preprocess import pixel_values

PROBED = 0  # seed of the picture by which towers are compared


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
        self.preprocessing = preprocessing
        self.kept = Kept(keep)

    def keep_in(self, file: Path) -> None:
        """Keep features in a file too, and read what an interrupted run left there."""
        self.kept = Kept(self.kept.entries, file)

    @contextmanager
    def computing(self, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
        """Compute on a device in a type; with a copy where that is not the tower's, which stays as it is."""
        own = self.tower
        weight = next(own.parameters())
        if (weight.device, weight.dtype) != (device, dtype):
            self.tower = copy.deepcopy(own).to(device, dtype)
        try:
            yield
        finally:
            self.tower = own

    @torch.no_grad()
    def __call__(self, images: list[str], pixels: Tensor | None = None) -> Tensor:
        """Return the features of the images, in order.

        Args:
            images: references.
            pixels: of the images, [I, 3, S, S], where they are opened already.
        """
        device = next(self.tower.parameters()).device
        if not images:  # a batch of text only
            vision = self.tower.config
            return torch.zeros(0, (vision.image_size // vision.patch_size) ** 2, vision.hidden_size, device=device)
        fresh = [image for image in dict.fromkeys(images) if image not in self.kept]
        computed: dict[str, Tensor] = {}
        if fresh:
            own = self._open(fresh) if pixels is None else pixels[[images.index(image) for image in fresh]]
            features = self.features(own.to(device)).to("cpu", torch.float16)  # [I, P, vision_dim]
            computed = dict(zip(fresh, features, strict=True))
        known = {image: computed[image] if image in computed else self.kept[image] for image in images}
        self.kept.add(computed)
        return torch.stack([known[image].float() for image in images]).to(device)  # [I, P, vision_dim]

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """Features of pixels [I, 3, S, S]: [I, P, vision_dim], without CLS."""
        # In the weights' type even under autocast: where that is float32, as exports compute, it stays so.
        with torch.autocast(pixels.device.type, enabled=False):
            states = self.tower(pixels.to(next(self.tower.parameters()).dtype), output_hidden_states=True).hidden_states
        features: Tensor = states[self.layer][:, 1:]
        return features

    def _open(self, images: list[str]) -> Tensor:
        return torch.cat([torch.from_numpy(pixel_values(load_image(image), self.preprocessing)) for image in images])


def tower_probe(model: LlavaForConditionalGeneration) -> Tensor:
    """A tower's features of one fixed picture of noise, [P, vision_dim]: equal features, the same tower."""
    size = model.config.vision_config.image_size
    noise = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(PROBED)) * 2 - 1  # [1, 3, S, S]
    tower = TowerFeatures(model, Preprocessing(size=size), keep=0)
    device = next(tower.tower.parameters()).device
    return tower.features(noise.to(device))[0].float().cpu()
