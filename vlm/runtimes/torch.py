"""The reference engine: the checkpoint itself in PyTorch, float32, on the CPU or a GPU."""

from pathlib import Path

import numpy as np
import torch
from transformers import DynamicCache

from vlm.models.checkpoint import Checkpoint, load_checkpoint
from vlm.runtimes.base import Runtime, VisionOutput


class TorchRuntime(Runtime):
    """Runs a `Checkpoint` with transformers' own forward and KV cache."""

    engine = "torch"

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.folder = checkpoint.folder
        self.model = checkpoint.model
        self.facts = checkpoint.facts
        self.reset()

    def use_gpu(self) -> None:
        """Move the model to the first GPU that this process sees, if there is one."""
        if torch.cuda.is_available():
            self.model.to("cuda")

    @torch.inference_mode()
    def encode_image(self, pixels: np.ndarray) -> VisionOutput:
        """Run vision tower and projector."""
        config, body = self.model.config, self.model.model
        device, dtype = self.model.device, self.model.dtype
        states = body.vision_tower(torch.from_numpy(pixels).to(device, dtype), output_hidden_states=True).hidden_states
        features = states[config.vision_feature_layer][:, 1:]  # [1, P, vision_dim]
        tokens = body.multi_modal_projector(features)  # [1, V, D]
        return VisionOutput(features[0].float().cpu().numpy(), tokens[0].float().cpu().numpy())

    @torch.inference_mode()
    def embed(self, ids: list[int]) -> np.ndarray:
        """Look up token embeddings."""
        embeds = self.model.get_input_embeddings()(torch.tensor(ids, device=self.model.device))
        return np.asarray(embeds.float().cpu().numpy())

    def reset(self) -> None:
        """Empty the KV cache."""
        self.cache = DynamicCache(config=self.model.config.text_config)

    @torch.inference_mode()
    def forward(self, embeds: np.ndarray) -> np.ndarray:
        """Append embeddings and return the last logits."""
        x = torch.from_numpy(np.ascontiguousarray(embeds))[None].to(self.model.device, self.model.dtype)  # [1, N, D]
        out = self.model.model.language_model(inputs_embeds=x, past_key_values=self.cache, use_cache=True)
        return np.asarray(self.model.lm_head(out.last_hidden_state[0, -1]).float().cpu().numpy())  # [vocabulary]


def open(folder: Path, threads: int = 2) -> TorchRuntime:
    """Load the checkpoint in `folder`."""
    torch.set_num_threads(threads)
    return TorchRuntime(load_checkpoint(folder))
