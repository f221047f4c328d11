"""manifest.json: what an artifact folder is, what it needs, and the proof that it is the model that was trained."""

import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from vlm.config import Config
from vlm.errors import UserError
from vlm.folders import sha256, write_atomic

MANIFEST = "manifest.json"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class File(Config):
    """One file of the artifact; `path` is relative to the folder."""

    path: str
    bytes: int
    sha256: str


class Preprocessing(Config):
    """How a picture becomes pixel values: made square, resized to `size`, scaled, normalised.

    `square` is how: "pad" adds borders of `pad_colour`; "crop" cuts the middle out, which CLIP alone does.
    """

    size: int
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    pad_colour: tuple[int, int, int] = (122, 116, 104)  # int(255 * mean), as upstream's expand2square
    resampling: Literal["bicubic", "bilinear"] = "bicubic"
    square: Literal["pad", "crop"] = "pad"


@dataclass(frozen=True)
class Facts:
    """What the loop that answers a question needs to know of a model, from its manifest or checkpoint."""

    preprocessing: Preprocessing
    template: str
    image_tokens: int
    image_token_id: int
    bos_id: int
    eos_id: int
    context_length: int
    tokenizer: Path

    def record(self) -> dict[str, Any]:
        """The facts as a manifest of the tokenizer's folder holds them."""
        return {**vars(self), "tokenizer": self.tokenizer.name}


class Precision(Config):
    """Storage type of each component's weights, in the field's names (fp32, fp16, int4, 8da4w, q4_0 ...)."""

    vision: str
    projector: str
    embedding: str
    decoder: str
    head: str | None = None  # None: stored as the decoder


class Rung(Config):
    """One rung of the parity ladder: the worst value over the probe set against its bar."""

    name: Literal["pixels", "vision", "projector", "logits", "tokens", "accuracy"]
    metric: str  # cosine | max_abs | kl | agreement | points
    value: float | None
    bar: float | None
    passed: bool
    reference: Literal["float", "dequantized"]
    note: str = ""


class Parity(Config):
    """The ladder and its summary; `allowed_drift` says that a user let a failing export through with --allow-drift."""

    rungs: list[Rung]
    probes: int
    vision_cos: float | None
    logits_cos: float | None
    kl: float | None
    token_agreement: float | None
    first_divergence: int | None  # index of the first differing greedy token over all probes; null = none differs
    ties: int | None = None  # greedy tokens that differ where two logits are tied; null = not counted
    passed: bool
    allowed_drift: bool = False


class Manifest(Config):
    """Everything a runtime needs besides the weights; written last, so that a folder with it is complete."""

    schema_: Literal[1] = Field(1, alias="schema")
    name: str  # "<format>-<precision>"
    format: str  # a module of export.formats
    engine: str  # a module of vlm.runtimes
    precision: str
    precisions: Precision
    files: list[File]
    source_sha256: str
    preprocessing: Preprocessing
    template: str
    image_tokens: int
    image_token_id: int
    bos_id: int
    eos_id: int
    hidden_size: int
    vocab_size: int
    context_length: int
    tokenizer: str = "tokenizer.json"
    versions: dict[str, str]
    settings: dict[str, int | float | str | bool]  # what only the engine needs: layers, heads, file names
    notes: list[str] = []
    parity: Parity | None = None

    @property
    def bytes(self) -> int:
        """Size of all files of the artifact."""
        return sum(file.bytes for file in self.files)

    def facts(self, folder: Path) -> Facts:
        """The loop's facts; `folder` is where the artifact lies."""
        known = {field.name: getattr(self, field.name) for field in fields(Facts)}
        return Facts(**{**known, "tokenizer": folder / self.tokenizer})

    def write(self, folder: Path) -> None:
        """Write manifest.json into `folder`, whole or not at all."""
        write_atomic(folder / MANIFEST, self.model_dump_json(by_alias=True, indent=1) + "\n")


def artifact_folder(target: str) -> str:
    """Name of a target's folder: "onnx:int4,vision=fp16" -> "onnx-int4-vision-fp16"."""
    return re.sub("[:,=]", "-", target)


def list_files(folder: Path) -> list[File]:
    """Describe every file below `folder` except the manifest itself."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    return [File(path=p.relative_to(folder).as_posix(), bytes=p.stat().st_size, sha256=sha256(p)) for p in paths]


def read_manifest(folder: Path, *, checksums: bool = False) -> Manifest:
    """Read and verify an artifact's manifest.

    Args:
        folder: the artifact.
        checksums: also compare every file's SHA-256 (sizes are always compared).
    Raises:
        UserError: no manifest, an invalid one, a path that leaves the folder, a missing, truncated or changed file.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder}: no {MANIFEST}, so this is no finished artifact. Export it again: pocketvlm export.")
    try:
        manifest = Manifest.model_validate(json.loads(path.read_text()))
    except (ValidationError, ValueError) as error:
        raise UserError(f"{path}: not a manifest of schema 1: {error}. Export the artifact again.") from error
    for file in manifest.files:
        _verify(folder, file, checksums)
    _inside(folder, manifest.tokenizer)
    return manifest


def _inside(folder: Path, name: str) -> Path:
    """The file that a manifest names, which links must not lead out of the folder either."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"{folder / MANIFEST}: file path {name!r} leaves the artifact's folder. "
            "Do not use this artifact, export your own: pocketvlm export."
        )
    return path


def _verify(folder: Path, file: File, checksums: bool) -> None:
    path = _inside(folder, file.path)
    if not path.is_file():
        raise UserError(f"{path}: missing, the manifest lists it. Export the artifact again.")
    found = path.stat().st_size
    if found != file.bytes:
        raise UserError(
            f"{path}: {found} bytes found, {file.bytes} expected: truncated or changed. Export the artifact again."
        )
    if checksums and (digest := sha256(path)) != file.sha256:
        raise UserError(
            f"{path}: SHA-256 {digest[:16]}... found, {file.sha256[:16]}... expected. Export the artifact again."
        )
