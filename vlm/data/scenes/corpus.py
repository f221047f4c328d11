"""The text on which the scenes' tokenizer is trained: every word, and every phrase that never changes.

Phrases that never change become one token each, which makes training about three times cheaper. Words that carry an
answer stay tokens of their own, so phrases hold none of them; and since a word is repeated far more often than the
phrases it is in, it is complete before it can merge with a neighbour.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from vlm.data.scenes.facts import ASKING, POOLS
from vlm.data.scenes.question import CHOOSE, COUNTS, DESCRIBE, LETTERS, NO, NONCE, SHORT, YES, YES_OR_NO
from vlm.data.scenes.scene import COLOURS, POSITIONS, SHAPES, SIZES, WORDS
from vlm.prompts import v1

# The v1 conversation around a question; the image's tokens stand between the two.
BEFORE_IMAGE, AFTER_IMAGE = v1("")
AFTER_QUESTION = AFTER_IMAGE.removeprefix("\n")

REPEATS_WORD, REPEATS_PUNCTUATED, REPEATS_PHRASE = 100, 10, 1
PUNCTUATION = ".,?:"

# A leading blank marks what follows a blank in the prompt; what follows a newline has none.
PHRASES = (
    " " + BEFORE_IMAGE.rstrip(),
    SHORT + AFTER_QUESTION,
    CHOOSE + AFTER_QUESTION,
    DESCRIBE + AFTER_QUESTION,
    AFTER_QUESTION,
    " " + YES_OR_NO,
    *(asking.partition(" {}")[0] for asking in ASKING.values()),
    "What word is written in the image?",
    "What number is written in the image?",
    "How many objects are there?",
    " objects are there?",
    "Which option is",
    "Context: A",
    "Is there a",
    "Is the number of objects",
    "Is the number in the image",
    "Is the word in the image",
    " in the image?",
    " left or right of the",
    " above or below the",
    " object at the",
    " at the",
    " is a",
    *(f" {position}" for position in POSITIONS),
)
CONTENT = (
    *COLOURS, *SHAPES, *SIZES, *WORDS, *NONCE, *COUNTS, *POOLS["position"],
    "left", "right", "above", "below", "word", "number", "object", YES, NO, *LETTERS,
)  # fmt: skip


def tokenizer_corpus() -> Iterator[str]:
    """Lines to train a byte-pair tokenizer on, leading blanks included; no line is in two of the three levels."""
    lines = [*PHRASES, *(f" {word}" for word in CONTENT), *(f"{letter}." for letter in LETTERS)]
    words = list(dict.fromkeys(word for line in lines for word in re.findall(r" ?[^ ]+", line)))
    bare = dict.fromkeys(word.rstrip(PUNCTUATION) for word in words)
    for word in bare:
        yield from [word] * REPEATS_WORD
    for word in words:
        if word not in bare:
            yield from [word] * REPEATS_PUNCTUATED
    for phrase in PHRASES:
        yield from [phrase] * REPEATS_PHRASE
    yield from "0123456789" + PUNCTUATION
