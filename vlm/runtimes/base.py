"""The one way in which every engine answers a question: pixels -> vision tokens -> prefill -> greedy decoding.

An engine supplies four small operations; the loop, its timing and the prompt live here, so that no engine can
differ in anything but its arithmetic. NumPy only.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from vlm.errors import UserError
from vlm.manifest import Facts
from vlm.preprocess import pixel_values
from vlm.prompts import TEMPLATES, prompt_ids
from vlm.tokenizer import Tokenizer


@dataclass(frozen=True)
class VisionOutput:
    """The vision tower's patch features [P, vision_dim] (None where the engine does not expose them) and the projected
    vision tokens [V, D]."""

    features: np.ndarray | None
    tokens: np.ndarray


@dataclass
class Timings:
    """Milliseconds of one answer; `decode_ms` has one entry per token after the first."""

    preprocess_ms: float = 0.0
    vision_ms: float = 0.0
    prefill_ms: float = 0.0
    prefill_tokens: int = 0
    ttft_ms: float = 0.0  # from the picture in memory to the first token
    decode_ms: list[float] = field(default_factory=list)


@dataclass
class Answer:
    """Greedy answer: text, ids without the end token, and what it took."""

    text: str
    tokens: list[int]
    timings: Timings


class Runtime(ABC):
    """One loaded model with a KV cache of one sequence."""

    engine: str
    emulated: bool = (
        False  # the engine interprets the artifact on a machine it was not made for: right answers, no speed
    )
    folder: Path
    facts: Facts

    @abstractmethod
    def encode_image(self, pixels: np.ndarray) -> VisionOutput:
        """Run vision tower and projector on pixels [1, 3, S, S] float32."""

    @abstractmethod
    def embed(self, ids: list[int]) -> np.ndarray:
        """Look up token embeddings: [N] -> [N, D] float32."""

    @abstractmethod
    def reset(self) -> None:
        """Empty the KV cache."""

    @abstractmethod
    def forward(self, embeds: np.ndarray) -> np.ndarray:
        """Append embeddings [N, D] to the cache and return the last position's logits [vocabulary] float32."""

    def use_gpu(self) -> None:
        """Answer on a GPU from now on, where the engine can and there is one; artifacts' engines stay on the CPU."""

    def close(self) -> None:
        """Give back what the engine holds; the runtime cannot be used afterwards."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The artifact's tokenizer, read once."""
        if not hasattr(self, "_tokenizer"):
            self._tokenizer = Tokenizer(self.facts.tokenizer)
        return self._tokenizer

    def pixels(self, image: Image.Image) -> np.ndarray:
        """Preprocess a picture as this model wants it: [1, 3, S, S]."""
        return pixel_values(image, self.facts.preprocessing)

    def prompt(self, question: str, has_image: bool = True) -> list[int]:
        """Return the prompt's ids with the image placeholder repeated V times, [N]."""
        facts = self.facts
        parts = TEMPLATES[facts.template](question, has_image)
        count = facts.image_tokens if has_image else 0
        return prompt_ids(parts, self.tokenizer, facts.bos_id, facts.image_token_id, count)

    def prompt_embeds(self, ids: list[int], vision: VisionOutput | None) -> np.ndarray:
        """Embed a prompt and put the vision tokens where the placeholders stand: [N, D]."""
        is_image = np.array([i == self.facts.image_token_id for i in ids])  # [N]
        text = self.embed([0 if image else i for i, image in zip(ids, is_image, strict=True)])  # [N, D]
        if vision is None:
            return text
        if is_image.sum() != len(vision.tokens):
            raise UserError(
                f"the prompt has {is_image.sum()} image positions, the image gave {len(vision.tokens)} tokens."
            )
        embeds = np.array(text, dtype=np.float32)
        embeds[is_image] = vision.tokens
        return embeds

    def answer(
        self,
        image: Image.Image | None,
        question: str,
        max_new_tokens: int = 64,
        vision: VisionOutput | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Answer:
        """Answer a question greedily.

        Args:
            image: the picture, or None for a text-only question.
            question: the human's words, without template.
            max_new_tokens: stop after so many tokens if the model does not.
            vision: a vision output computed before for this picture (then no vision time is counted).
            on_text: told the answer so far after each token; no timing counts what it does.
        """
        timings = Timings()
        start = time.perf_counter()
        if vision is None and image is not None:
            pixels = self.pixels(image)
            encoded = time.perf_counter()
            vision = self.encode_image(pixels)
            timings.preprocess_ms = (encoded - start) * 1e3
            timings.vision_ms = (time.perf_counter() - encoded) * 1e3
        ids = self.prompt(question, has_image=vision is not None)
        if len(ids) + 1 > self.facts.context_length:
            raise UserError(
                f"the prompt has {len(ids)} tokens, the context holds {self.facts.context_length}. Shorten it."
            )
        room = self.facts.context_length - len(ids)

        def told(tokens: list[int]) -> None:
            if on_text:
                on_text(self.tokenizer.decode(tokens))

        tokens = self.generate(ids, vision, min(max_new_tokens, room), timings, start, told)
        return Answer(self.tokenizer.decode(tokens), tokens, timings)

    def generate(
        self,
        ids: list[int],
        vision: VisionOutput | None,
        max_new_tokens: int,
        timings: Timings,
        start: float,
        on_token: Callable[[list[int]], None] | None = None,
    ) -> list[int]:
        """Prefill the prompt and decode greedily until the end token; fills `timings`, returns the new ids.

        `on_token` is told the new ids so far, between the timed steps.
        """
        before = time.perf_counter()
        self.reset()
        token = int(self.forward(self.prompt_embeds(ids, vision)).argmax())
        now = time.perf_counter()
        timings.prefill_ms, timings.prefill_tokens = (now - before) * 1e3, len(ids)
        timings.ttft_ms = (now - start) * 1e3
        tokens: list[int] = []
        while token != self.facts.eos_id:
            tokens.append(token)
            if on_token:
                on_token(tokens)
            if len(tokens) >= max_new_tokens:
                break
            before = time.perf_counter()
            token = int(self.forward(self.embed([token])).argmax())
            timings.decode_ms.append((time.perf_counter() - before) * 1e3)
        return tokens

    def generate_batch(
        self, prompts: list[list[int]], visions: list[VisionOutput | None], max_new_tokens: int
    ) -> list[list[int]]:
        """Answer several prompts greedily; here one after the other, in an engine that can all at once.

        Args:
            prompts: ids of each, all shorter than the context.
            visions: the image of each, None for text only.
            max_new_tokens: per answer; the context may end it sooner.
        Returns:
            The new ids of each, without the end token.
        """
        room = self.facts.context_length
        return [
            self.generate(ids, vision, min(max_new_tokens, room - len(ids)), Timings(), time.perf_counter())
            for ids, vision in zip(prompts, visions, strict=True)
        ]
