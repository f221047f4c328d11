"""One question of the built-in benchmark, and the phrases all its families share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Family = Literal["gqa", "scienceqa", "textvqa", "mme", "mmbench", "pope"]
FAMILIES: tuple[Family, ...] = ("gqa", "scienceqa", "textvqa", "mme", "mmbench", "pope")

# The instructions with which LLaVA-1.5 and MobileVLM V2 are evaluated.
SHORT = "Answer the question using a single word or phrase."
CHOOSE = "Answer with the option's letter from the given choices directly."
YES_OR_NO = "Please answer yes or no."
DESCRIBE = "Describe the image."

YES, NO = "Yes", "No"
LETTERS = ("A", "B", "C", "D")
COUNTS = ("one", "two", "three", "four")
NONCE = ("dax", "wug", "blick", "toma", "fep", "zorp", "modi", "kiki")


@dataclass(frozen=True)
class Question:
    """One question about a scene.

    Attributes:
        family: the benchmark whose format it has.
        kind: what is asked ("colour", "relation", ...), the unit of per-type priors.
        group: questions with the same group are scored together.
        prompt: what the human says, without the image's line.
        answer: what the model should say.
        options: the texts behind the letters, in the order shown; empty in open questions.
        category: MME's existence, count, position, color, OCR; POPE's random, popular, adversarial; else "".
    """

    family: Family
    kind: str
    group: str
    prompt: str
    answer: str
    options: tuple[str, ...] = ()
    category: str = ""


@dataclass(frozen=True)
class Turn:
    """One training question and answer."""

    question: str
    answer: str


def short_prompt(question: str) -> str:
    """An open question, to be answered in a word."""
    return f"{question}\n{SHORT}"


def choice_prompt(question: str, options: Sequence[str]) -> str:
    """A question with lettered options, 2 to 4 of them."""
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([question, *lines, CHOOSE])
