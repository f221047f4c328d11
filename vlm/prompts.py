"""Prompt templates of LLaVA / MobileVLM and how a prompt becomes token ids with the image in its place."""

from typing import Protocol

V1_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
IMAGE = "<image>"


class EncodesText(Protocol):
    """What prompts need of a tokenizer: plain ids of a string, no special tokens added."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`."""


def v1(question: str, has_image: bool = True) -> tuple[str, str]:
    """Vicuna's template, as upstream's `conv_v1`: what stands before and after the image.

    A text-only prompt has an empty second part.
    """
    head = f"{V1_SYSTEM} USER: "
    return (head, f"\n{question} ASSISTANT:") if has_image else (f"{head}{question} ASSISTANT:", "")


def plain(question: str = "", has_image: bool = True) -> tuple[str, str]:
    """The pretraining template, as upstream's `conv_plain`: the image, then the caption; a question is not shown."""
    return "", ""


TEMPLATES = {"v1": v1, "plain": plain}
# What ends an answer in training: v1 ends with the end token, plain (upstream's separator) with a line break instead.
ENDINGS = {"v1": "", "plain": "\n"}


def prompt_ids(parts: tuple[str, str], tokenizer: EncodesText, bos: int, image_id: int, image_tokens: int) -> list[int]:
    """Tokenize a prompt as upstream's `tokenizer_image_token` does: each part alone, the image's ids between them.

    Args:
        parts: text before and after the image.
        tokenizer: gives plain ids.
        bos: id that starts the sequence.
        image_id: placeholder id; stands where the image's embeddings go.
        image_tokens: how many of them; 0 for a prompt without an image.
    Returns:
        The ids, [N].
    """
    before, after = (tokenizer.encode(part) if part else [] for part in parts)
    return [bos, *before, *[image_id] * image_tokens, *after]
