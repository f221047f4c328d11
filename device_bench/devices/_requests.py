"""What a pass asks, as the runner's job: prompts as token ids, pictures as raw tensors, and the answers read back."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from device_bench.pictures import load_picture
from device_bench.tasks.base import BenchQuestion
from vlm.errors import CheckFailed
from vlm.manifest import Facts, Manifest, read_manifest
from vlm.preprocess import pixel_values
from vlm.prompts import TEMPLATES, prompt_ids
from vlm.tokenizer import Tokenizer

PICTURES = "../../pictures"  # seen from a job's folder


@dataclass(frozen=True)
class Request:
    """One question: its prompt as ids [N], and the file with its picture's pixels, "-" for none."""

    id: str
    picture: str
    ids: tuple[int, ...]


@dataclass
class Reply:
    """What the runner wrote about one request; milliseconds. Without a picture of its own it has no vision_ms."""

    id: str
    tokens: list[int]
    end_s: float  # of the device's uptime
    prefill_ms: float
    prefill_tokens: int
    ttft_ms: float
    decode_ms: list[float]
    vision_ms: float | None = None


@dataclass
class Results:
    """Everything the runner wrote so far."""

    cpus: str | None = None  # that it may use
    load_ms: float | None = None
    start_s: float | None = None  # of the device's uptime, when the first request began
    peak_kib: int | None = None
    failed: str | None = None
    done: bool = False
    replies: list[Reply] = field(default_factory=list)


class Asker:
    """Turns questions into requests for one artifact."""

    def __init__(self, artifact: Path) -> None:
        self.manifest: Manifest = read_manifest(artifact)
        self.facts: Facts = self.manifest.facts(artifact)
        self.tokenizer = Tokenizer(self.facts.tokenizer)

    def ids(self, question: str, has_image: bool) -> tuple[int, ...]:
        """The prompt's ids with the image placeholder repeated V times, [N]."""
        facts = self.facts
        parts = TEMPLATES[facts.template](question, has_image)
        count = facts.image_tokens if has_image else 0
        return tuple(prompt_ids(parts, self.tokenizer, facts.bos_id, facts.image_token_id, count))

    @property
    def picture_bytes(self) -> int:
        """Bytes of a picture's pixels."""
        return 3 * self.facts.preprocessing.size**2 * 4

    def save_pixels(self, image: Image.Image, to: Path) -> None:
        """Write a picture's pixels [3, S, S] as little-endian float32, as this model wants them."""
        to.write_bytes(pixel_values(image, self.facts.preprocessing).astype("<f4").tobytes())

    def requests(self, questions: Sequence[BenchQuestion], folder: Path) -> tuple[list[Request], dict[str, str]]:
        """Requests for benchmark questions, their pictures written into `folder`.

        Returns:
            The requests, named q0, q1, ... by the place of their question, and why others are not: name -> problem.
        """
        requests, problems, pictures = [], {}, dict[str, str]()
        for place, question in enumerate(questions):
            name, ids = f"q{place}", self.ids(question.prompt, bool(question.image))
            if len(ids) + 1 > self.facts.context_length:
                problems[name] = f"the prompt has {len(ids)} tokens, the context holds {self.facts.context_length}"
                continue
            if question.image and question.image not in pictures:
                pictures[question.image] = f"image{len(pictures)}.f32"
                self.save_pixels(load_picture(question.image), folder / pictures[question.image])
            requests.append(Request(name, pictures.get(question.image, "-"), ids))
        return requests, problems


def blocks(questions: Sequence[BenchQuestion], pictures: int) -> list[list[BenchQuestion]]:
    """Questions in their order, cut where another picture would be one too many for the device's disk."""
    found: list[list[BenchQuestion]] = [[]]
    seen: set[str] = set()
    for question in questions:
        if question.image and question.image not in seen:
            if len(seen) == pictures:
                found.append([])
                seen = set()
            seen.add(question.image)
        found[-1].append(question)
    return found


def job_text(settings: dict[str, object], requests: Sequence[Request]) -> str:
    """The runner's job.txt (android_harness/README.md)."""
    lines = [f"{key} {value}" for key, value in settings.items()]
    for request in requests:
        picture = request.picture if request.picture == "-" else f"{PICTURES}/{request.picture}"
        lines.append(f"request {request.id} {picture} {' '.join(map(str, request.ids))}")
    return "\n".join(lines) + "\n"


def read_line(results: Results, line: str) -> None:
    """Add one line of the runner's results.txt.

    Raises:
        CheckFailed: it is none.
    """
    key, _, rest = line.partition(" ")
    try:
        if key == "cpus":
            results.cpus = rest
        elif key == "load_ms":
            results.load_ms = float(rest)
        elif key == "start_s":
            results.start_s = float(rest)
        elif key == "answer":
            results.replies.append(_reply(rest.split()))
        elif key == "vm_hwm_kib":
            results.peak_kib = int(rest)
        elif key == "failed":
            results.failed = rest
        elif key == "done":
            results.done = True
        else:
            raise ValueError(key)
    except (ValueError, KeyError, IndexError) as error:
        raise CheckFailed(
            f"the runner wrote {line[:80]!r}, which is no line of results. Is its version ours?"
        ) from error


def _reply(words: list[str]) -> Reply:
    name, rest = words[0], words[1:]
    ends = rest.index("tokens")
    start = rest.index("decode_ms")
    pairs = dict(zip(rest[:start:2], rest[1:start:2], strict=True))
    return Reply(
        id=name,
        tokens=[int(word) for word in rest[ends + 1 :]],
        end_s=float(pairs["end_s"]),
        prefill_ms=float(pairs["prefill_ms"]),
        prefill_tokens=int(pairs["prefill_tokens"]),
        ttft_ms=float(pairs["ttft_ms"]),
        decode_ms=[float(word) for word in rest[start + 1 : ends]],
        vision_ms=float(pairs["vision_ms"]) if "vision_ms" in pairs else None,
    )
