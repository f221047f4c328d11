"""python -m benchmarks.random_checkpoint OUT: a random-weight MobileVLM V2 of published size, float16, streamed.

For measuring speed, memory and size of exports; its answers mean nothing. The tokenizer is the built-in one, so that
nothing is needed that the project does not have.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoModelForImageTextToText, AutoTokenizer

from vlm.data.scenes.train_tokenizer import train_tokenizer
from vlm.folders import finished_folder
from vlm.manifest import Preprocessing
from vlm.models.mobilevlm import MobileVlmConfig, published_config
from vlm.models.processor import save_processor
from vlm.models.tensors import write_tensors
from vlm.prompts import IMAGE

STD = 0.02  # of every matrix, LLaMA's initialisation


def weights(config: MobileVlmConfig, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every parameter in float16: matrices Gaussian, norms one, biases Gaussian."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and name.endswith("weight"):
            yield name, torch.ones(parameter.shape, dtype=torch.float16)
        else:
            yield name, torch.empty(parameter.shape).normal_(0, STD, generator=generator).half()


def make(out: Path, size: str = "1.7b", seed: int = 0) -> Path:
    """Write the checkpoint in transformers' layout and return its folder."""
    config = published_config(size)
    with finished_folder(out) as folder:
        tokenizer = AutoTokenizer.from_pretrained(train_tokenizer(folder / "tokenizer"))
        config.image_token_index = config.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)
        config.dtype = torch.float16
        config.architectures = ["MobileVlmForConditionalGeneration"]
        config.save_pretrained(folder)
        save_processor(config, tokenizer, Preprocessing(size=config.vision_config.image_size), folder)
        write_tensors(weights(config, seed), folder)
    return out


def main(
    out: Path,
    size: Annotated[str, typer.Option(help="1.7b, 3b or 7b.")] = "1.7b",
    seed: Annotated[int, typer.Option(help="Of the weights.")] = 0,
) -> None:
    """Write a random checkpoint of published size."""
    print(make(out, size, seed))


if __name__ == "__main__":
    typer.run(main)
