"""The questions of a scene: those of the benchmark, and the turns and captions a model is trained on."""

from __future__ import annotations

import random

from vlm.data.scenes.facts import with_distractors
from vlm.data.scenes.families import BUILDERS, POPE_SETTINGS, pope
from vlm.data.scenes.question import LETTERS, Question, Turn, choice_prompt
from vlm.data.scenes.scene import COLOURS, POSITIONS, SHAPES, WORDS, Scene

# How often each family is asked about one scene.
BENCHMARK_MIX = {"gqa": 2, "scienceqa": 1, "textvqa": 1, "mme": 1, "mmbench": 1}
TRAINING_MIX = {"gqa": 5, "scienceqa": 3, "textvqa": 1, "mme": 2, "mmbench": 2, "pope": 2}
# Two rotations of a question already teach that the letter follows the option.
TRAINING_ROTATIONS = 2
IMAGE_FREE_TURNS = 3


def benchmark_questions(scene: Scene) -> list[Question]:
    """The benchmark's questions about a scene, always the same ones; POPE's setting goes round with the seed."""
    rng = random.Random(f"benchmark {scene.seed}")
    questions: list[Question] = []
    for family, times in BENCHMARK_MIX.items():
        for index in range(times):
            questions += BUILDERS[family](scene, rng, f"{family}-{scene.seed}-{index}")
    return questions + pope(scene, rng, f"pope-{scene.seed}", POPE_SETTINGS[scene.seed % len(POPE_SETTINGS)])


def training_turns(scene: Scene, seed: int) -> list[Turn]:
    """About 24 training turns in random order; another `seed` asks other questions about the same scene."""
    rng = random.Random(f"training {scene.seed} {seed}")
    turns: list[Turn] = []
    for family, times in TRAINING_MIX.items():
        for _ in range(times):
            questions = BUILDERS[family](scene, rng, "")
            if family == "mmbench":
                questions = rng.sample(questions, TRAINING_ROTATIONS)
            turns += [Turn(question.prompt, question.answer) for question in questions]
    turns += [_letter_turn(rng) for _ in range(IMAGE_FREE_TURNS)]
    rng.shuffle(turns)
    return turns


def _letter_turn(rng: random.Random) -> Turn:
    """Which option is red: teaches what the letters mean, without the image."""
    pool = rng.choice((COLOURS, SHAPES, POSITIONS, WORDS))
    answer = rng.choice(pool)
    options = with_distractors(answer, pool, rng.choice((2, 3, 4)), rng)
    return Turn(choice_prompt(f"Which option is {answer}?", options), LETTERS[options.index(answer)])


def caption(scene: Scene) -> str:
    """All that a scene shows, e.g. "small red circle top left, large blue star center, word cat bottom right."

    The things come row by row and the label last.
    """
    parts = [f"{thing.size} {thing.colour} {thing.shape} {POSITIONS[thing.cell]}" for thing in scene.things]
    if scene.label is not None:
        parts.append(f"{scene.label.kind} {scene.label.text} {POSITIONS[scene.label.cell]}")
    return ", ".join(parts) + "."
