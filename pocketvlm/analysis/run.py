"""Put questions about pictures to a checkpoint and write what went on inside as analysis.json and index.html."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocketvlm.analysis.page import page
from vlm.errors import UserError
from vlm.folders import finished_folder

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from torch import Tensor

    from vlm.manifest import Preprocessing
    from vlm.runtimes.torch import TorchRuntime

SCHEMA = 1
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
PER_SCENE = 3  # questions, each of another family
DIGITS = 6  # of numbers in analysis.json
ANSWER_TOKENS = 24
SEEN = "seen"  # the picture as the model sees it, in the tree that the page is drawn from


@dataclass(frozen=True)
class Asked:
    """A question about a picture ("scenes:900000" or a path); the right answer where it is known."""

    image: str
    question: str
    truth: str | None = None


def about_scenes(count: int) -> list[Asked]:
    """Questions of different families about the first validation scenes."""
    from device_bench.tasks.scenes import questions
    from vlm.data.scenes.scene import VALIDATION_START

    asked: dict[tuple[str, str], Asked] = {}
    for question in questions(count, VALIDATION_START):
        if question.image:
            truth = question.truth if isinstance(question.truth, str) else question.truth[0]
            asked.setdefault((question.image, question.family), Asked(question.image, question.prompt, truth))
    images = dict.fromkeys(entry.image for entry in asked.values())
    return [entry for image in images for entry in [e for e in asked.values() if e.image == image][:PER_SCENE]]


def about_images(folder: Path, questions: Sequence[str]) -> list[Asked]:
    """Every question about every picture in a folder.

    Raises:
        UserError: there is no picture in it.
    """
    found = sorted(path for path in folder.glob("*") if path.suffix.lower() in PICTURES)
    if not found:
        raise UserError(f"{folder}: no picture found ({', '.join(PICTURES)}). Give a folder with pictures in it.")
    return [Asked(str(path), question) for path in found for question in questions]


def analyze(
    checkpoint: Path, asked: Sequence[Asked], layer: int, threads: int, out: Path, say: Callable[[int, int], None]
) -> dict[str, Any]:
    """Write `out`/analysis.json and `out`/index.html.

    Args:
        checkpoint: folder in Hugging Face layout.
        asked: what is put to it.
        layer: whose attention is drawn; negative ones count from the last.
        threads: CPU threads.
        out: the folder to make.
        say: told how many questions are done, of how many.
    Returns:
        What analysis.json holds.
    Raises:
        UserError: the checkpoint cannot be loaded, or has no such layer.
    """
    from vlm.runtimes.torch import open as open_checkpoint

    runtime = open_checkpoint(checkpoint, threads)
    prompts = []
    for done, question in enumerate(asked, 1):
        prompts.append(_one(runtime, question, layer))
        say(done, len(asked))
    result = {
        "schema": SCHEMA,
        "checkpoint": str(checkpoint),
        "layers": len(runtime.model.model.language_model.layers),
        "attention_layer": layer,
        "vision_tokens": runtime.facts.image_tokens,
        "similarity": _mean_curves([prompt["similarity"] for prompt in prompts]),
        "prompts": prompts,
    }
    text = page(result)
    stored = [{key: value for key, value in prompt.items() if key != SEEN} for prompt in prompts]
    with finished_folder(out) as folder:
        (folder / "analysis.json").write_text(json.dumps({**result, "prompts": stored}, indent=1) + "\n")
        (folder / "index.html").write_text(text)
    return {**result, "prompts": stored}


def _one(runtime: TorchRuntime, asked: Asked, layer: int) -> dict[str, Any]:
    """One prompt's numbers."""
    import torch

    from distill.analysis import adjacent_similarity, attention_map, cross_similarity, look_inside, looking_share
    from vlm.data.records import load_image

    pixels = runtime.pixels(load_image(asked.image))
    vision = runtime.encode_image(pixels)
    ids = runtime.prompt(asked.question)
    embeds = torch.from_numpy(runtime.prompt_embeds(ids, vision))[None]  # [1, N, D]
    model, image_id = runtime.model, runtime.facts.image_token_id
    decoder = model.model.language_model
    inside = look_inside(
        decoder, embeds.to(model.device, model.dtype), torch.tensor([ids], device=model.device), image_id, layer
    )
    answer = runtime.answer(None, asked.question, ANSWER_TOKENS, vision=vision)
    return {
        **vars(asked),
        "answer": answer.text,
        "similarity": {
            "adjacent_vision": _numbers(adjacent_similarity(inside.states, inside.vision)),
            "adjacent_text": _numbers(adjacent_similarity(inside.states, ~inside.vision)),
            "vision_text": _numbers(cross_similarity(inside.states, inside.vision)),
        },
        "attention": _numbers(attention_map(inside.attention)),
        "looking": _numbers(looking_share(inside.attention)),
        SEEN: as_seen(pixels, runtime.facts.preprocessing),
    }


def as_seen(pixels: np.ndarray, how: Preprocessing) -> Image.Image:
    """Turn a model's pixel values [1, 3, S, S] back into the picture they came from, square and at their size."""
    import numpy as np
    from PIL import Image

    colours = pixels[0].transpose(1, 2, 0) * np.array(how.std) + np.array(how.mean)  # [S, S, 3]
    return Image.fromarray((colours * 255).round().clip(0, 255).astype(np.uint8))


def _numbers(values: Tensor) -> Any:
    """Nested lists of short numbers."""
    import numpy as np

    return np.round(values.cpu().numpy().astype(float), DIGITS).tolist()


def _mean_curves(curves: Sequence[dict[str, list[float]]]) -> dict[str, Any]:
    """Mean, lowest and highest over the prompts at each layer."""
    result = {}
    for name in curves[0]:
        layers = list(zip(*(curve[name] for curve in curves), strict=True))  # [layers][prompts]
        means = [round(sum(values) / len(values), DIGITS) for values in layers]
        result[name] = {"mean": means, "min": [min(v) for v in layers], "max": [max(v) for v in layers]}
    return result
