"""Configuration of the loss: its terms beside the cross-entropy, and the outer weight of each."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from vlm.config import Config, Count, Positive

NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Layers = Annotated[list[int], Field(min_length=1)]

# Query rows and key columns of the attention.
Block = Literal["text_vision", "vision_vision", "text_text", "full", "vision_text"]

PUBLISHED_WEIGHT = 1.0
SKEW = 0.1  # DistiLLM's
EVEN = 0.5


class Weight(Config):
    """Outer weight of a term, by one of three rules; none given: fixed at 1, the published one.

    Attributes:
        fixed: this number.
        share: held so that the term's gradient with respect to the student is this share of the cross-entropy's; 1
            until the first measurement, that is, in the first step.
        cap: bound of the automatic weight of `share`: a term that collapses would be scaled without end.
        learned: Beta-KD: beta is trained with the student and beta * l - d / 2 * log(beta) is minimised; this is d, so
            that beta tends to d / (2 l).
        until: share of all the run's steps over which the weight falls linearly to zero; after that the term is not
            computed at all. None: it does not fall.
    """

    fixed: NotNegative | None = None
    share: Positive | None = None
    cap: Positive = 30.0
    learned: Positive | None = None
    until: Share | None = None

    @model_validator(mode="after")
    def _one_rule(self) -> "Weight":
        given = [name for name in ("fixed", "share", "learned") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"a weight follows one rule, but {' and '.join(given)} are given: leave one")
        return self

    @property
    def start(self) -> float:
        """The weight of the first step."""
        return PUBLISHED_WEIGHT if self.fixed is None else self.fixed

    def fade(self, progress: float) -> float:
        """Factor on the weight when `progress` (0 to 1) of the run's steps are done."""
        return 1.0 if self.until is None else max(0.0, 1.0 - progress / self.until)


class AttentionTerm(Config):
    """L_A: a block of the attention of some layers (Align-KD eq. 1), summed over the layers.

    Attributes:
        distance: `mse` on probabilities with a free 1x1 head adapter is the published one; `kl` compares rows
            renormalised over the block's columns, teacher heads mixed convexly; `cosine` compares rows with a free
            adapter, scale-free.
        block: query rows and key columns: text_vision is the published one; the others are the paper's ablations, but
            for vision_text, which the authors' released code compares: the same text as keys of the image tokens. It
            stands behind them, where they cannot see it: zero in both models.
        teacher_layers, student_layers: pairs of layers from 0; negative ones count from the last, -1.
    """

    distance: Literal["mse", "kl", "cosine"] = "mse"
    block: Block = "text_vision"
    teacher_layers: Layers = [0]
    student_layers: Layers = [0]
    weight: Weight = Weight()

    @model_validator(mode="after")
    def _pairs(self) -> "AttentionTerm":
        if len(self.teacher_layers) != len(self.student_layers):
            raise ValueError(
                f"teacher_layers has {len(self.teacher_layers)} entries and student_layers {len(self.student_layers)}: "
                "they are pairs, give as many of each"
            )
        return self


class VisionTerm(Config):
    """L_V on the projector's outputs.

    Attributes:
        weighting: `focus` is L_all + focus_weight * L_focus (Align-KD eq. 2 to 5); `instruction` weights every token by
            how much the teacher's instruction looks at it, after Align-TI, and has neither K nor lambda.
    """

    weighting: Literal["focus", "instruction"] = "focus"
    focus_tokens: Count = 16  # K
    focus_weight: NotNegative = 0.1  # lambda
    weight: Weight = Weight()

    @property
    def reads_attention(self) -> bool:
        """Whether it reads where the teacher's text looks."""
        return self.weighting == "instruction" or self.focus_weight > 0


class Distribution(Config):
    """How a distribution over the next token is held against the teacher's.

    Attributes:
        distance: distill/losses/logits.py has the formulas.
        mixture: share of the mixture's first part in `jsd` (None: 0.5) and the skewed distances (None: 0.1).
        temperature: divides both models' logits; the term is multiplied by its square.
    """

    distance: Literal["reverse_kl", "forward_kl", "jsd", "skew_kl", "skew_reverse_kl"] = "reverse_kl"
    mixture: Fraction | None = None
    temperature: Positive = 1.0
    weight: Weight = Weight()

    @model_validator(mode="after")
    def _mixture_is_used(self) -> "Distribution":
        if self.mixture is not None and self.distance in ("reverse_kl", "forward_kl"):
            raise ValueError(
                f"mixture: {self.distance} has none; leave it out, or choose jsd, skew_kl, skew_reverse_kl"
            )
        return self

    @property
    def part(self) -> float:
        """The mixture's first part, or its default."""
        return self.mixture or (EVEN if self.distance == "jsd" else SKEW)


class OnPolicy(Config):
    """Answers of the student's own to compare, as GKD (ICLR 2024, arXiv 2306.13649).

    Attributes:
        share: of the steps, drawn by chance, that compare them instead of the data's: GKD's lambda.
        temperature: of their sampling; 0 takes the likeliest token.
    """

    share: Share = 0.5
    temperature: NotNegative = 1.0


class LogitsTerm(Distribution):
    """L_KL: the student's answers; reverse KL on the answer tokens is published (eq. 6).

    Attributes:
        tokens: `answer`, or `all` that are no padding: prompt, image and answer.
        on_policy: in some steps, the student's own answers; None: always the data's.
    """

    tokens: Literal["answer", "all"] = "answer"
    on_policy: OnPolicy | None = None


class VisionLogitsTerm(Distribution):
    """L_vis: what the student says next at the image tokens; forward KL is LLaVA-KD's (ICCV 2025, arXiv 2410.16236)."""

    distance: Literal["reverse_kl", "forward_kl", "jsd", "skew_kl", "skew_reverse_kl"] = "forward_kl"


class SwitchTerm(Distribution):
    """L_switch: what the teacher answers when it sees the student's vision tokens, against what it answers else.

    After Switch-KD (CVPR 2026 Findings, arXiv 2604.14629), whose own distance is not built: `jsd` goes both ways here.
    """


Term = AttentionTerm | VisionTerm | LogitsTerm | VisionLogitsTerm | SwitchTerm
