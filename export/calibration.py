"""What quantizers see of the model at work: pictures and questions, never text alone."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from export.gptq import inverse_factor
from export.graph import VisionEncoder
from export.questions import Ask, scene_questions
from export.source import in_float32
from vlm.models.checkpoint import Checkpoint
from vlm.preprocess import pixel_values
from vlm.prompts import TEMPLATES, prompt_ids
from vlm.tokenizer import Tokenizer

SCENES = 16
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Prompt:
    """A picture [1, 3, S, S], a prompt with the right answer behind it as ids [N], and the answer's length."""

    pixels: Tensor
    ids: Tensor
    answer: int


def calibration_prompts(checkpoint: Checkpoint, count: int = SCENES, ask: Ask = scene_questions) -> Iterator[Prompt]:
    """Yield the prompts of `count` questions with their right answers."""
    facts = checkpoint.facts
    tokenizer = Tokenizer(facts.tokenizer)
    for question in ask(count):
        parts = TEMPLATES[facts.template](question.text)
        prompt = prompt_ids(parts, tokenizer, facts.bos_id, facts.image_token_id, facts.image_tokens)
        answer = tokenizer.encode(question.answer)
        pixels = torch.from_numpy(pixel_values(question.image, facts.preprocessing))  # [1, 3, S, S]
        yield Prompt(pixels, torch.tensor(prompt + answer), len(answer))


def prompt_embeddings(checkpoint: Checkpoint, encoder: nn.Module, prompt: Prompt) -> Tensor:
    """What the decoder reads of a prompt, [1, N, D] float32."""
    table, image = checkpoint.model.get_input_embeddings().weight, checkpoint.facts.image_token_id
    x = table[prompt.ids.clamp(max=len(table) - 1)].detach().float()  # [N, D]
    x[prompt.ids == image] = encoder(prompt.pixels)[0][0]  # [V, D]
    return x[None]


def calibration_embeddings(checkpoint: Checkpoint, count: int = SCENES, ask: Ask = scene_questions) -> Iterator[Tensor]:
    """Yield one sequence [1, N, D] float32 per picture: prompt, vision tokens, a question and its right answer.

    Args:
        checkpoint: the model, its weights as they are stored.
        count: how many; their pictures are encoded one at a time.
        ask: about which pictures.
    """
    encoder = in_float32(VisionEncoder(checkpoint.model))
    for prompt in calibration_prompts(checkpoint, count, ask):
        yield prompt_embeddings(checkpoint, encoder, prompt)


def input_powers(checkpoint: Checkpoint, sequences: Iterable[Tensor]) -> dict[str, Tensor]:
    """Mean square of what each column of each matrix of the decoder and its head is multiplied with.

    Args:
        checkpoint: the model, its weights as they are stored.
        sequences: what the decoder reads, [1, N, D] float32 each.
    Returns:
        Parameter name -> [in], float32.
    """
    layers = _statistics(checkpoint, sequences, lambda x: x.square().mean((0, 1)))
    return {name: power for found in layers for name, power in found.items()}


class LayerInputs:
    """Second moments of what the decoder's matrices are multiplied with, one layer of them in memory at a time.

    Args:
        checkpoint: the model, its weights as they are stored.
        sequences: begins to yield what the decoder reads, [1, N, D] float32 each, from the first one on.
    Attributes:
        asked: whether anything was rounded for them yet.
        sequences: how many there are, once read.
    """

    def __init__(self, checkpoint: Checkpoint, sequences: Callable[[], Iterable[Tensor]]) -> None:
        self.asked, self.sequences = False, 0
        self._names = {id(parameter): name for name, parameter in checkpoint.model.named_parameters()}
        self._checkpoint, self._read = checkpoint, sequences
        self._layers, self._found = self._start(), dict[str, Tensor]()
        self._factors: dict[int, np.ndarray] = {}

    def factor(self, weight: Tensor) -> np.ndarray | None:
        """Upper triangular U [in, in] with U.T U = inverse of the inputs' second moments (`export.gptq`).

        Args:
            weight: a parameter of the checkpoint's model; asking in the order of the layers walks through them once.
        Returns:
            None for what is no matrix of the decoder or its head.
        """
        name = self._names.get(id(weight), "")
        if weight.ndim != 2 or not name.startswith(("model.language_model.layers.", HEAD)):
            return None
        self.asked = True
        if not self._advance(name):
            self._layers = self._start()
            self._advance(name)
        moments = self._found[name]
        if id(moments) not in self._factors:
            self._factors[id(moments)] = inverse_factor(moments).numpy()
        return self._factors[id(moments)]

    def read(self) -> list[Tensor]:
        """The sequences."""
        sequences = list(self._read())
        self.sequences = len(sequences)
        return sequences

    def _start(self) -> Iterator[dict[str, Tensor]]:
        yield from _statistics(self._checkpoint, self.read(), lambda x: x[0].T @ x[0] / x.shape[1])

    def _advance(self, name: str) -> bool:
        while name not in self._found:
            found = next(self._layers, None)
            if found is None:
                return False
            self._found, self._factors = found, {}
        return True


def _statistics(
    checkpoint: Checkpoint, sequences: Iterable[Tensor], statistic: Callable[[Tensor], Tensor]
) -> Iterator[dict[str, Tensor]]:
    """Yield a statistic of the inputs of each layer's matrices, mean over sequences; the head's comes last.

    The layers run one after the other on all sequences, one of them in float32 at a time. Matrices that read the same
    input share one tensor.
    """
    body = checkpoint.model.model.language_model
    with torch.inference_mode():
        states = list(sequences)
    for index, layer in enumerate(body.layers):
        with torch.inference_mode():
            states, inputs = _run(in_float32(layer), body, states)
            shared = {id(seen[0]): _mean(statistic, seen) for seen in inputs.values()}
        yield {f"model.language_model.layers.{index}.{name}.weight": shared[id(x[0])] for name, x in inputs.items()}
    with torch.inference_mode():
        norm = in_float32(body.norm)
        head = _mean(statistic, [norm(x) for x in states])
    yield {HEAD: head}


def _run(layer: nn.Module, body: nn.Module, states: list[Tensor]) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """Run a layer on all sequences; returns the new states and what its matrices read, by their layers' names."""
    inputs: dict[str, list[Tensor]] = {}

    def watch(name: str) -> None:
        def keep(_: nn.Module, read: tuple[Tensor, ...]) -> None:
            inputs.setdefault(name, []).append(read[0])  # [1, N, in]

        layer.get_submodule(name).register_forward_pre_hook(keep)

    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            watch(name)
    outputs = []
    for x in states:
        positions = torch.arange(x.shape[1])[None]  # [1, N]
        rotary = body.rotary_emb(x, positions)  # type: ignore[operator]
        causal = torch.full((x.shape[1],) * 2, torch.finfo(torch.float32).min).triu(1)[None, None]  # [1, 1, N, N]
        y = layer(x, attention_mask=causal, position_embeddings=rotary, position_ids=positions)
        outputs.append(y[0] if isinstance(y, tuple) else y)
    return outputs, inputs


def _mean(statistic: Callable[[Tensor], Tensor], inputs: list[Tensor]) -> Tensor:
    total = statistic(inputs[0]).clone()
    for x in inputs[1:]:
        total += statistic(x)
    return total / len(inputs)
