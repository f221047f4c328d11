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

    @torch.inference_mode()
    def generate_batch(
        self, prompts: list[list[int]], visions: list[VisionOutput | None], max_new_tokens: int
    ) -> list[list[int]]:
        """Answer several prompts at once, padded on the left; stops when the last one has ended."""
        body, device = self.model.model.language_model, self.model.device
        x, mask = self._padded([self.prompt_embeds(*pair) for pair in zip(prompts, visions, strict=True)])
        positions = (mask.cumsum(1) - 1).clamp(min=0)  # [B, N]
        rooms = [min(max_new_tokens, self.facts.context_length - len(ids)) for ids in prompts]
        cache = DynamicCache(config=self.model.config.text_config)
        answers: list[list[int]] = [[] for _ in prompts]
        going = set(range(len(prompts)))
        while True:
            out = body(
                inputs_embeds=x, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            )
            tokens = self.model.lm_head(out.last_hidden_state[:, -1]).argmax(-1)  # [B]
            for row in list(going):
                token = int(tokens[row])
                if token != self.facts.eos_id:
                    answers[row].append(token)
                if token == self.facts.eos_id or len(answers[row]) >= rooms[row]:
                    going.discard(row)
            if not going:
                return answers
            x = self.model.get_input_embeddings()(tokens)[:, None]  # [B, 1, D]
            mask = torch.cat([mask, torch.ones(len(prompts), 1, dtype=mask.dtype, device=device)], dim=1)  # [B, N + 1]
            positions = positions[:, -1:] + 1  # [B, 1]

    def _padded(self, embeds: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts of different lengths as one tensor [B, N, D], empty on the left, and what is no padding [B, N]."""
        longest = max(len(one) for one in embeds)
        x = torch.zeros(len(embeds), longest, embeds[0].shape[1])  # [B, N, D]
        mask = torch.zeros(len(embeds), longest, dtype=torch.long)  # [B, N]
        for row, one in enumerate(embeds):
            x[row, longest - len(one) :] = torch.from_numpy(np.ascontiguousarray(one))
            mask[row, longest - len(one) :] = 1
        return x.to(self.model.device, self.model.dtype), mask.to(self.model.device)


def open(folder: Path, threads: int = 2) -> TorchRuntime:
    """Load the checkpoint in `folder`."""
    torch.set_num_threads(threads)
    return TorchRuntime(load_checkpoint(folder))
