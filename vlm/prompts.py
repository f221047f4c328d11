"""Prompt templates of LLaVA / MobileVLM and how a prompt becomes token ids with the image in its place."""

from typing import Protocol

V1_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
IMAGE = "<image>"


class Tokenizer(Protocol):
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


def prompt_ids(parts: tuple[str, str], tokenizer: Tokenizer, bos: int, image_id: int, image_tokens: int) -> list[int]:
    """Tokenize a prompt as upstream's `tokenizer_image_token` does: each part alone, the image's ids between them.

    Args:
        parts: text before and after the image; an empty second part with text before means "no image".
        tokenizer: gives plain ids.
        bos: id that starts the sequence.
        image_id: placeholder id; stands `image_tokens` times where the image's embeddings go.
    Returns:
        The ids, [N].
    """
    before, after = parts
    head = [bos, *(tokenizer.encode(before) if before else [])]
    if before and not after:
        return head
    return [*head, *[image_id] * image_tokens, *(tokenizer.encode(after) if after else [])]
