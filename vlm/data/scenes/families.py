"""The six families of questions, each in the prompt and answer format of the benchmark whose name it bears."""

from __future__ import annotations

import random
from collections.abc import Callable

from vlm.data.scenes.facts import (
    ASKING,
    POOLS,
    Fact,
    attribute,
    attribute_fact,
    count_fact,
    name,
    relation_fact,
    singled_out,
    size_fact,
    with_distractors,
)
from vlm.data.scenes.question import (
    COUNTS,
    LETTERS,
    NO,
    NONCE,
    YES,
    YES_OR_NO,
    Question,
    choice_prompt,
    short_prompt,
)
from vlm.data.scenes.scene import COLOURS, POPULAR, POSITIONS, SHAPES, WORDS, Scene

POPE_SETTINGS = ("random", "popular", "adversarial")


def gqa(scene: Scene, rng: random.Random, group: str) -> list[Question]:
    """One open question: an attribute, a relation, a count, a size or a yes/no check of an attribute."""
    draw = rng.random()
    fact: Fact | None
    if draw < 0.4:
        fact = attribute_fact(scene, rng)
    elif draw < 0.65:
        fact = relation_fact(scene, rng) or count_fact(scene, rng)
    elif draw < 0.75:
        fact = count_fact(scene, rng)
    elif draw < 0.85:
        fact = size_fact(scene, rng)
    else:
        fact = _verification(scene, rng)
    return [Question("gqa", fact.kind, group, short_prompt(fact.question), fact.answer)]


def _verification(scene: Scene, rng: random.Random) -> Fact:
    """Is the red circle small? Yes half of the time."""
    thing = rng.choice(scene.things)
    kind = rng.choice(("size", "position"))
    truth = Fact(kind, "", attribute(thing, kind))
    right = rng.random() < 0.5
    word = truth.answer if right else truth.wrong(rng)
    place = word if kind == "size" else f"at the {word}"
    return Fact(f"verify {kind}", f"Is the {name(thing)} {place}?", YES if right else NO)


def scienceqa(scene: Scene, rng: random.Random, group: str) -> list[Question]:
    """A context that defines a made-up word, a question about the thing it names, 2 to 4 options."""
    made_up = rng.choice(NONCE)
    by = rng.choice(["pair", *(kind for kind in ("shape", "colour", "size") if singled_out(scene, kind))])
    thing = rng.choice(scene.things if by == "pair" else singled_out(scene, by))
    definition = {
        "pair": name(thing),
        "shape": thing.shape,
        "colour": f"{thing.colour} object",
        "size": f"{thing.size} object",
    }[by]
    known = ("colour", "shape") if by == "pair" else (by,)
    kind = rng.choice([kind for kind in ("position", "colour", "shape") if kind not in known])
    answer = attribute(thing, kind)
    options = with_distractors(answer, POOLS[kind], rng.choice((2, 3, 4)), rng)
    question = f"Context: A {made_up} is a {definition}.\n{ASKING[kind].format(made_up)}"
    letter = LETTERS[options.index(answer)]
    return [Question("scienceqa", kind, group, choice_prompt(question, options), letter, options)]


def textvqa(scene: Scene, rng: random.Random, group: str) -> list[Question]:
    """What is written in the image; no question where nothing is."""
    if scene.label is None:
        return []
    prompt = short_prompt(f"What {scene.label.kind} is written in the image?")
    return [Question("textvqa", scene.label.kind, group, prompt, scene.label.text)]


def mme(scene: Scene, rng: random.Random, group: str) -> list[Question]:
    """Two questions about the same image that differ in one word, one to be affirmed and one to be denied."""
    category = rng.choice(("existence", "count", "position", "color", *(("OCR",) if scene.label else ())))
    if category == "color" and not singled_out(scene, "shape"):
        category = "existence"
    template, right, wrong = _statement(scene, category, rng)
    return [
        Question("mme", category, group, short_prompt(f"{template.format(word)}? {YES_OR_NO}"), answer, (), category)
        for word, answer in ((right, YES), (wrong, NO))
    ]


def _statement(scene: Scene, category: str, rng: random.Random) -> tuple[str, str, str]:
    """A question with a gap, the word that makes it true and one that makes it false."""
    thing = rng.choice(scene.things)
    if category == "color":
        thing = rng.choice(singled_out(scene, "shape"))
        return f"Is the {thing.shape} {{}}", thing.colour, Fact("colour", "", thing.colour).wrong(rng)
    if category == "position":
        truth = Fact("position", "", POSITIONS[thing.cell])
        return f"Is the {name(thing)} at the {{}}", truth.answer, truth.wrong(rng)
    if category == "count":
        truth = Fact("count", "", COUNTS[len(scene.things) - 1])
        return "Is the number of objects {}", truth.answer, truth.wrong(rng)
    if category == "OCR" and scene.label is not None:
        pool = WORDS if scene.label.kind == "word" else [str(number) for number in range(10, 100)]
        wrong = rng.choice([text for text in pool if text != scene.label.text])
        return f"Is the {scene.label.kind} in the image {{}}", scene.label.text, wrong
    return "Is there a {} in the image", name(thing), _absent_pair(scene, rng.choice(POPE_SETTINGS), rng)


def mmbench(scene: Scene, rng: random.Random, group: str) -> list[Question]:
    """One question with 2 to 4 options in every circular rotation; right only if all are."""
    fact = rng.choice((attribute_fact, attribute_fact, attribute_fact, count_fact))(scene, rng)
    options = with_distractors(fact.answer, POOLS[fact.kind], rng.choice((2, 3, 4)), rng)
    turned = [options[shift:] + options[:shift] for shift in range(len(options))]
    return [
        Question(
            "mmbench", fact.kind, group, choice_prompt(fact.question, order), LETTERS[order.index(fact.answer)], order
        )
        for order in turned
    ]


def pope(scene: Scene, rng: random.Random, group: str, setting: str = "") -> list[Question]:
    """Whether something is there: one question about a thing that is, one about a thing that is not.

    Args:
        setting: where the absent thing comes from: "random", "popular" (frequent in the data) or "adversarial" (its
            colour or shape is in the picture); any of them if empty.
    """
    setting = setting or rng.choice(POPE_SETTINGS)
    if setting == "random" and rng.random() < 0.6:
        kind, words, gap = rng.choice((("colour", COLOURS, "{} object"), ("shape", SHAPES, "{}")))
        seen = [attribute(thing, kind) for thing in scene.things]
        present, absent = (gap.format(w) for w in (rng.choice(seen), rng.choice([w for w in words if w not in seen])))
    else:
        kind, present, absent = "pair", name(rng.choice(scene.things)), _absent_pair(scene, setting, rng)
    return [
        Question(
            "pope",
            kind,
            f"{group}-{answer.lower()}",
            short_prompt(f"Is there a {what} in the image?"),
            answer,
            (),
            setting,
        )
        for what, answer in ((present, YES), (absent, NO))
    ]


def _absent_pair(scene: Scene, setting: str, rng: random.Random) -> str:
    """A colour and shape that no thing of the scene has both of."""
    present = {(thing.shape, thing.colour) for thing in scene.things}
    shapes, colours = ([attribute(thing, kind) for thing in scene.things] for kind in ("shape", "colour"))
    everything = [(shape, colour) for shape in SHAPES for colour in COLOURS]
    crossed = [(s, c) for s in shapes for c in colours if (s, c) not in present]
    near = [(s, c) for s, c in everything if (s in shapes or c in colours)]
    choices = {"random": everything, "popular": list(POPULAR), "adversarial": crossed or near}[setting]
    shape, colour = rng.choice([pair for pair in choices if pair not in present])
    return f"{colour} {shape}"


BUILDERS: dict[str, Callable[[Scene, random.Random, str], list[Question]]] = {
    "gqa": gqa,
    "scienceqa": scienceqa,
    "textvqa": textvqa,
    "mme": mme,
    "mmbench": mmbench,
    "pope": pope,
}
