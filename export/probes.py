"""The questions on which parity is measured: always the same ones, from scenes no model was trained on."""

from dataclasses import dataclass

from PIL import Image

from vlm.data.scenes.draw import render
from vlm.data.scenes.question import DESCRIBE, FAMILIES
from vlm.data.scenes.questions import benchmark_questions
from vlm.data.scenes.scene import VALIDATION_START, make_scene

# Every fourth probe asks for a caption: its answer is long enough for errors in the KV cache to add up.
CAPTION_EVERY = 4


@dataclass(frozen=True, eq=False)
class Probe:
    """A picture and a question about it; equal only to itself."""

    image: Image.Image
    question: str


def scene_probes(count: int) -> list[Probe]:
    """The first `count` probes, one per validation scene, the benchmark's families in turn."""
    probes = []
    for index in range(count):
        scene = make_scene(VALIDATION_START + index)
        family = FAMILIES[index % len(FAMILIES)]
        questions = benchmark_questions(scene)  # a scene without a label has no textvqa question
        question = next((q.prompt for q in questions if q.family == family), questions[0].prompt)
        caption = index % CAPTION_EVERY == CAPTION_EVERY - 1
        probes.append(Probe(render(scene), DESCRIBE if caption else question))
    return probes
