"""Engines with the errors that were seen in the field, for the tests of the parity ladder."""

import numpy as np
import torch

from vlm.runtimes.base import VisionOutput
from vlm.runtimes.torch import TorchRuntime


class ClassTokenLast(TorchRuntime):
    """Stock llama.cpp's error: the class token comes last, so patches are shifted by one."""

    def encode_image(self, pixels: np.ndarray) -> VisionOutput:
        tower = self.model.model.vision_tower
        embeds = tower.embeddings(torch.from_numpy(pixels)).roll(-1, 1)  # [1, 1 + P, vision_dim]
        with torch.inference_mode():
            x = tower.pre_layrnorm(embeds)
            for layer in tower.encoder.layers[:-1]:
                x = layer(x, attention_mask=None)
            tokens = self.model.model.multi_modal_projector(x[:, 1:])  # [1, V, D]
        return VisionOutput(x[0, 1:].numpy(), tokens[0].numpy())
