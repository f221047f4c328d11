"""The built-in scenes: the same everywhere, asked about truthfully, in the formats of the real benchmarks."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from vlm.data.scenes import scene as scene_module
from vlm.data.scenes.attributes import CLASSES, IGNORE, cell_attributes
from vlm.data.scenes.corpus import AFTER_QUESTION, BEFORE_IMAGE, PHRASES
from vlm.data.scenes.draw import RGB, render
from vlm.data.scenes.question import CHOOSE, COUNTS, FAMILIES, LETTERS, SHORT, YES_OR_NO, Question
from vlm.data.scenes.questions import benchmark_questions, caption, training_turns
from vlm.data.scenes.scene import COLOURS, POSITIONS, SHAPES, SIZES, Scene, Thing, make_scene

SEEDS = range(scene_module.TEST_START, scene_module.TEST_START + 300)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [make_scene(seed) for seed in SEEDS]


@pytest.fixture(scope="module")
def asked(scenes: list[Scene]) -> list[tuple[Scene, Question]]:
    return [(scene, question) for scene in scenes for question in benchmark_questions(scene)]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from vlm.data.scenes.train_tokenizer import train_tokenizer

    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def matching(scene: Scene, phrase: str) -> list[Thing]:
    """The things a phrase such as "red circle", "large object" or "object at the top left" names."""
    phrase, _, place = phrase.partition(" at the ")
    words = set(phrase.split()) - {"object", "objects"}
    return [
        thing
        for thing in scene.things
        if words <= {thing.colour, thing.shape, thing.size} and place in ("", POSITIONS[thing.cell])
    ]


def the_one(scene: Scene, phrase: str) -> Thing:
    """The only thing a phrase names."""
    (thing,) = matching(scene, phrase)
    return thing


def solve(scene: Scene, question: str) -> str:
    """Answers a question from its text and the scene alone, knowing nothing of how it was made."""
    context = re.match(r"Context: A (\w+) is a (.+)\.\n", question)
    if context:
        question = question[context.end() :].replace(f"the {context[1]}", f"the {context[2]}")
    question = question.splitlines()[0].removesuffix(" " + YES_OR_NO)
    assert question.endswith("?")
    question = question.removesuffix("?")
    for pattern, answer in SOLVERS:
        match = re.fullmatch(pattern, question)
        if match:
            return answer(scene, *match.groups())
    raise AssertionError(f"no solver for {question!r}")


def where(scene: Scene, first: str, side: str, second: str) -> str:
    (row, column), (other_row, other_column) = (divmod(the_one(scene, name).cell, 3) for name in (first, second))
    if side.startswith("left"):
        assert column != other_column
        return "left" if column < other_column else "right"
    assert row != other_row
    return "above" if row < other_row else "below"


def label_text(scene: Scene, kind: str) -> str:
    assert scene.label is not None and scene.label.kind == kind
    return scene.label.text


def yes(truth: bool) -> str:
    return "Yes" if truth else "No"


SOLVERS = [
    (r"What color is the (.+)", lambda s, x: the_one(s, x).colour),
    (r"What shape is the (.+)", lambda s, x: the_one(s, x).shape),
    (r"What size is the (.+)", lambda s, x: the_one(s, x).size),
    (r"Where is the (.+)", lambda s, x: POSITIONS[the_one(s, x).cell]),
    (r"How many (.*)objects are there", lambda s, x: COUNTS[len(matching(s, x)) - 1]),
    (r"Is the (.+) (left or right of|above or below) the (.+)", where),
    (r"What (word|number) is written in the image", label_text),
    (r"Is the number of objects (\w+)", lambda s, x: yes(len(s.things) == 1 + COUNTS.index(x))),
    (r"Is the (word|number) in the image (\w+)", lambda s, k, x: yes(label_text(s, k) == x)),
    (r"Is there a (.+) in the image", lambda s, x: yes(bool(matching(s, x)))),
    (r"Is the (.+) at the (.+)", lambda s, x, p: yes(POSITIONS[the_one(s, x).cell] == p)),
    (r"Is the (.+) (small|large)", lambda s, x, z: yes(the_one(s, x).size == z)),
    (r"Is the (\w+) (\w+)", lambda s, x, c: yes(the_one(s, x).colour == c)),
]


def test_a_seed_is_always_the_same_scene_and_picture() -> None:
    for seed in (0, 7, scene_module.TEST_START):
        assert make_scene(seed) == make_scene(seed)
        assert np.array_equal(np.asarray(render(make_scene(seed))), np.asarray(render(make_scene(seed))))
    assert make_scene(3) == Scene(
        3,
        (
            Thing(1, "heart", "cyan", "small"),
            Thing(3, "cross", "purple", "large"),
            Thing(7, "circle", "red", "small"),
        ),
        scene_module.Label(5, "number", "81"),
    )


def test_splits_do_not_share_seeds() -> None:
    starts = [
        0,  # of training
        scene_module.VALIDATION_START,
        scene_module.TEST_START,
        scene_module.TOWER_START,
    ]
    assert starts == sorted(starts)
    assert all(later - earlier >= 50_000 for earlier, later in pairwise(starts))


def test_things_and_label_have_cells_of_their_own_and_looks_of_their_own(scenes: list[Scene]) -> None:
    for scene in scenes:
        cells = [thing.cell for thing in scene.things] + ([scene.label.cell] if scene.label else [])
        assert len(set(cells)) == len(cells)
        assert len({(thing.shape, thing.colour) for thing in scene.things}) == len(scene.things) <= 4
    assert 0.65 < sum(scene.label is not None for scene in scenes) / len(scenes) < 0.85


def test_a_thing_is_drawn_in_its_cell_in_its_colour(scenes: list[Scene]) -> None:
    for scene in scenes[:60]:
        pixels = np.asarray(render(scene)).astype(int)
        for thing in scene.things:
            row, column = divmod(thing.cell, 3)
            cell = pixels[row * 32 : row * 32 + 32, column * 32 : column * 32 + 32].reshape(-1, 3)
            vivid = cell[np.ptp(cell, axis=1) > 50]
            distance = {name: float(np.abs(np.median(vivid, axis=0) - rgb).sum()) for name, rgb in RGB.items()}
            assert min(distance, key=distance.__getitem__) == thing.colour


def test_attributes_say_what_is_in_each_cell(scenes: list[Scene]) -> None:
    for scene in scenes[:60]:
        labels = cell_attributes(scene)
        assert all(values.shape == (9,) and values.max() < CLASSES[name] for name, values in labels.items())
        assert (labels["shape"] > 0).sum() == len(scene.things)
        for thing in scene.things:
            assert SHAPES[labels["shape"][thing.cell] - 1] == thing.shape
            assert COLOURS[labels["colour"][thing.cell] - 1] == thing.colour
            assert SIZES[labels["size"][thing.cell] - 1] == thing.size
        written = [name for name in ("word", "tens", "ones") if (labels[name] != IGNORE).any()]
        kind = scene.label.kind if scene.label else ""
        assert written == {"": [], "word": ["word"], "number": ["tens", "ones"]}[kind]


def test_every_answer_is_true(asked: list[tuple[Scene, Question]]) -> None:
    for scene, question in asked:
        answer = solve(scene, question.prompt)
        assert question.answer == (LETTERS[question.options.index(answer)] if question.options else answer)


def test_every_training_answer_is_true_and_other_seeds_ask_anew(scenes: list[Scene]) -> None:
    for scene in scenes[:100]:
        turns = training_turns(scene, 0)
        assert turns == training_turns(scene, 0) != training_turns(scene, 1)
        assert 20 <= len(turns) <= 26
        for turn in turns:
            options = dict(re.findall(r"^([A-D])\. (.+)$", turn.question, re.MULTILINE))
            if not turn.question.startswith("Which option is "):
                assert options.get(turn.answer, turn.answer) == solve(scene, turn.question)
            else:
                assert turn.question.startswith(f"Which option is {options[turn.answer]}?\n")


def test_prompts_have_the_format_of_their_benchmark(asked: list[tuple[Scene, Question]]) -> None:
    short, lettered = re.escape("\n" + SHORT), r"(\n[A-D]\. [a-z ]+){2,4}" + re.escape("\n" + CHOOSE)
    formats = {
        "gqa": r"[^\n]+\?" + short,
        "scienceqa": r"Context: [^\n]+\.\n[^\n]+\?" + lettered,
        "textvqa": r"What (word|number) is written in the image\?" + short,
        "mme": r"[^\n]+\? Please answer yes or no\." + short,
        "mmbench": r"[^\n]+\?" + lettered,
        "pope": r"Is there a [^\n]+ in the image\?" + short,
    }
    for _, question in asked:
        assert re.fullmatch(formats[question.family], question.prompt), question.prompt
        shown = tuple(re.findall(r"^[A-D]\. (.+)$", question.prompt, re.MULTILINE))
        assert shown == question.options and len(set(shown)) == len(shown)
    assert {question.family for _, question in asked} == set(FAMILIES)


def test_options_number_two_three_and_four_equally_often(asked: list[tuple[Scene, Question]]) -> None:
    sizes = Counter(len(question.options) for _, question in asked if question.family == "scienceqa")
    assert set(sizes) == {2, 3, 4} and min(sizes.values()) > 0.25 * sum(sizes.values())


def test_yes_and_no_are_balanced_within_mme_and_pope(asked: list[tuple[Scene, Question]]) -> None:
    for family in ("mme", "pope"):
        answers = Counter(question.answer for _, question in asked if question.family == family)
        assert answers == {"Yes": len(SEEDS), "No": len(SEEDS)}
    pope = [question for _, question in asked if question.family == "pope"]
    assert Counter(question.category for question in pope) == {
        setting: 2 * len(SEEDS) // 3 for setting in ("random", "popular", "adversarial")
    }
    assert {q.category for _, q in asked if q.family == "mme"} == {"existence", "count", "position", "color", "OCR"}


def test_mmbench_groups_hold_every_rotation_and_other_groups_their_pairs(
    asked: list[tuple[Scene, Question]],
) -> None:
    groups: dict[str, list[Question]] = {}
    for _, question in asked:
        groups.setdefault(question.group, []).append(question)
    for members in groups.values():
        first = members[0]
        if first.family == "mmbench":
            turned = {first.options[shift:] + first.options[:shift] for shift in range(len(first.options))}
            assert {question.options for question in members} == turned and len(members) == len(turned)
            assert len({question.options[LETTERS.index(question.answer)] for question in members}) == 1
        else:
            assert [q.answer for q in members] == ["Yes", "No"] if first.family == "mme" else len(members) == 1


def test_a_caption_names_everything(scenes: list[Scene]) -> None:
    for scene in scenes[:50]:
        parts = set(caption(scene).removesuffix(".").split(", "))
        things = {f"{t.size} {t.colour} {t.shape} {POSITIONS[t.cell]}" for t in scene.things}
        label = {f"{x.kind} {x.text} {POSITIONS[x.cell]}" for x in (scene.label,) if x}
        assert parts == things | label


def right_chunk(question: str, answer: str = "") -> str:
    """What follows the image in the v1 conversation."""
    return f"\n{question}{AFTER_QUESTION}" + (f" {answer}" if answer else "")


def test_three_tokenizers_agree(tokenizer_folder: Path, asked: list[tuple[Scene, Question]]) -> None:
    import sentencepiece
    from tokenizers import Tokenizer

    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_folder / "tokenizer.model"))
    fast = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    auto = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    llama = transformers.LlamaTokenizerFast.from_pretrained(tokenizer_folder)
    texts = [right_chunk(question.prompt, question.answer) for _, question in asked[:500]]
    texts += [
        BEFORE_IMAGE,
        "\nHow tall is Zoë's 3rd\tjug?  (in cm)",
        "Yes",
        *(caption(scene) for scene, _ in asked[:99]),
    ]
    for text in texts:
        expected = pieces.encode(text)
        assert fast.encode(text, add_special_tokens=False).ids == expected
        for tokenizer in (auto, llama):
            assert tokenizer(text).input_ids == [tokenizer.bos_token_id, *expected]
            assert tokenizer.decode(expected) == pieces.decode(expected) == text
    assert auto.convert_tokens_to_ids("<image>") == len(pieces) == len(auto) - 1
    whole = auto(BEFORE_IMAGE + "<image>" + texts[0]).input_ids
    assert whole == [1, *pieces.encode(BEFORE_IMAGE), len(pieces), *pieces.encode(texts[0])]


def test_a_prompt_is_a_token_prefix_of_itself_and_its_answer(tokenizer_folder: Path, scenes: list[Scene]) -> None:
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_folder / "tokenizer.model"))
    for scene in scenes[:100]:
        turns = [(turn.question, turn.answer) for turn in training_turns(scene, 0)]
        for question, answer in [*turns, ("Describe the image.", caption(scene))]:
            prompt = pieces.encode(right_chunk(question))
            assert pieces.encode(right_chunk(question, answer)) == prompt + pieces.encode(answer)


def test_phrases_and_content_words_are_single_tokens(tokenizer_folder: Path, scenes: list[Scene]) -> None:
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_folder / "tokenizer.model"))
    known = {pieces.id_to_piece(index) for index in range(len(pieces))}
    assert {phrase.replace(" ", "\u2581") for phrase in PHRASES} <= known
    lengths: dict[bool, list[int]] = {True: [], False: []}
    for scene in scenes[:100]:
        for question in benchmark_questions(scene):
            if question.answer not in LETTERS and not question.answer.isdigit():
                assert len(pieces.encode(question.answer)) == 1
            lengths[bool(question.options)].append(
                len(pieces.encode(right_chunk(question.prompt, question.answer))) + 1
            )
    assert np.mean(lengths[False]) <= 12 and np.mean(lengths[True]) <= 24
