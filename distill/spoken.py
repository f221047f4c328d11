"""At which positions the terms compare distributions over the next token."""

from torch import Tensor

from distill.config import DistillConfig
from vlm.data.collator import IGNORE


def compared(
    config: DistillConfig, input_ids: Tensor, labels: Tensor, segments: Tensor, image_token_id: int
) -> dict[str, Tensor]:
    """Positions of each term that compares distributions, bool [B, N] by the term's short name.

    Args:
        config: which terms there are.
        input_ids: [B, N].
        labels: [B, N], on the predicting positions, else IGNORE.
        segments: [B, N], negative where there is padding.
        image_token_id: the placeholder.
    """
    found: dict[str, Tensor] = {}
    answers, real = labels != IGNORE, segments >= 0  # [B, N]
    if config.logits:
        found["logits"] = answers if config.logits.tokens == "answer" else real
    if config.vision_logits:
        found["vision_logits"] = (input_ids == image_token_id) & real
    if config.switch:
        found["switch"] = answers
    return found


def read_of_teacher(places: dict[str, Tensor]) -> Tensor:
    """Where any of the terms reads what the teacher says next, bool [B, N].

    Of all terms, also of those that have faded out: what is kept of a record is the same throughout a run.
    """
    first, *others = places.values()
    for place in others:
        first = first | place
    return first
