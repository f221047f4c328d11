"""Configuration of the loss: its terms beside the cross-entropy, and the outer weight of each."""

from typing import Annotated, Literal

from pydantic import Field

from vlm.config import Config

Count = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class Weight(Config):
    """Outer weight of a term: `fixed`, or held so that the term's gradient is `share` of the cross-entropy's.

    The gradient is that with respect to the student; `cap` bounds the automatic weight, because a term that collapses
    would otherwise be scaled without end. With `share`, `fixed` is only the weight until the first measurement, that
    is, in the first step.
    """

    fixed: NotNegative = 1.0
    share: Positive | None = None
    cap: Positive = 30.0


class AttentionTerm(Config):
    """L_A on text-query rows x vision-key columns of one layer's attention (Align-KD eq. 1).

    distance: `mse` on probabilities with a free 1x1 head adapter is the published one; `kl` compares rows renormalised
    over the vision columns, teacher heads mixed convexly; `cosine` compares rows with a free adapter, scale-free.
    """

    distance: Literal["mse", "kl", "cosine"] = "mse"
    teacher_layer: Index = 0
    student_layer: Index = 0
    weight: Weight = Weight()


class VisionTerm(Config):
    """L_V = L_all + focus_weight * L_focus on the projector's outputs (Align-KD eq. 2 to 5)."""

    focus_tokens: Count = 16  # K
    focus_weight: NotNegative = 0.1  # lambda
    weight: Weight = Weight()


class LogitsTerm(Config):
    """L_KL on the answer tokens; reverse is the published one (eq. 6)."""

    distance: Literal["reverse_kl", "forward_kl"] = "reverse_kl"
    temperature: Positive = 1.0
    weight: Weight = Weight()
