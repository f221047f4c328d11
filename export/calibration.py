"""What quantizers see of the model at work: pictures and questions, never text alone, from scenes it may train on."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from export.graph import VisionEncoder
from export.source import in_float32
from vlm.data.scenes.draw import render
from vlm.data.scenes.questions import benchmark_questions
from vlm.data.scenes.scene import make_scene
from vlm.models.checkpoint import Checkpoint
from vlm.preprocess import pixel_values
from vlm.prompts import TEMPLATES, prompt_ids
from vlm.tokenizer import Tokenizer

SCENES = 16


def calibration_embeddings(checkpoint: Checkpoint, scenes: int = SCENES) -> Iterator[Tensor]:
    """Yield one sequence [1, N, D] float32 per scene: prompt, vision tokens, a question and its right answer.

    Args:
        checkpoint: the model, its weights as they are stored.
        scenes: how many; their pictures are encoded one at a time.
    """
    facts, model = checkpoint.facts, checkpoint.model
    tokenizer, encoder = Tokenizer(facts.tokenizer), in_float32(VisionEncoder(model))
    table = model.get_input_embeddings().weight
    for seed in range(scenes):
        scene = make_scene(seed)  # a training scene: nothing is asked here that accuracy is measured on
        questions = benchmark_questions(scene)
        question = questions[seed % len(questions)]
        parts = TEMPLATES[facts.template](question.prompt)
        prompt = prompt_ids(parts, tokenizer, facts.bos_id, facts.image_token_id, facts.image_tokens)
        ids = torch.tensor(prompt + tokenizer.encode(question.answer))  # [N]
        pixels = torch.from_numpy(pixel_values(render(scene), facts.preprocessing))  # [1, 3, S, S]
        x = table[ids.clamp(max=len(table) - 1)].detach().float()  # [N, D]
        x[ids == facts.image_token_id] = encoder(pixels)[0][0]  # [V, D]
        yield x[None]


def input_powers(checkpoint: Checkpoint, scenes: int = SCENES) -> dict[str, Tensor]:
    """Mean square of what each column of each matrix of the decoder and its head is multiplied with.

    The layers run one after the other on all sequences, one of them in float32 at a time.

    Args:
        checkpoint: the model, its weights as they are stored.
        scenes: pictures with questions to look at.
    Returns:
        Parameter name -> [in], float32.
    """
    body = checkpoint.model.model.language_model
    powers: dict[str, Tensor] = {}
    with torch.inference_mode():
        states = list(calibration_embeddings(checkpoint, scenes))
        for index, layer in enumerate(body.layers):
            states, found = _run(in_float32(layer), body, states)
            powers |= {f"model.language_model.layers.{index}.{name}": power for name, power in found.items()}
        norm = in_float32(body.norm)
        powers["lm_head.weight"] = _mean([norm(x).square().mean((0, 1)) for x in states])
    return powers


def _run(layer: nn.Module, body: nn.Module, states: list[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Run a layer on all sequences; returns the new states and the powers of its matrices' inputs."""
    sums: dict[str, list[Tensor]] = {}

    def watch(name: str) -> None:
        def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            sums.setdefault(f"{name}.weight", []).append(inputs[0].square().mean((0, 1)))  # [in]

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
    return outputs, {name: _mean(parts) for name, parts in sums.items()}


def _mean(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).mean(0)
