"""The data of a training stage: the built-in scenes, or LLaVA-format records, one file or a recipe of several."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from vlm.config import Config, Count, Index
from vlm.errors import UserError

SCENE_TEMPLATES = {"scene_captions": "plain", "scene_conversations": "v1"}


class Part(Config):
    """One records file of a recipe.

    Attributes:
        records: .json list or .jsonl file.
        images: the folder that the records' image paths begin at.
        folders: folders below `images` that the records need.
        count: how many records the file has, within 5 %; None: not checked.
    """

    name: str
    records: str
    images: str
    folders: list[str] = []
    count: Count | None = None


class Recipe(Config):
    """The parts of a stage's data, as in configs/data/*.yaml."""

    parts: list[Part] = Field(min_length=1)


class Data(Config):
    """Training data of a stage.

    Attributes:
        start, count: for scenes, seed of the first and number of scenes.
        records, images: for llava, one file and the folder of its images;
        recipe, parts: or several: a YAML file with `parts`, which are read from it when the configuration is.
        root: folder that the paths of the parts begin at.
        template: of the prompt; None: the scenes' own, v1 for llava.
        max_length: longest record in embedding tokens (Short is 512, Long 2048); longer ones are left out. None: as
            the student's context.
        batching: `random`; `grouped` (batches of similar length, with image or all without, as LLaVA's
            group_by_modality_length); `packed` (several records in a row of at most max_length, first fit).
        max_broken: share of the records that may be broken.
        cache: folder of indices and lengths; None: $POCKETVLM_CACHE or ~/.cache/pocketvlm.
    """

    kind: Literal["scene_captions", "scene_conversations", "llava"]
    start: Index = 0
    count: Index = 0
    records: str | None = None
    images: str | None = None
    recipe: str | None = None
    parts: list[Part] = []
    root: str = "."
    template: Literal["plain", "v1"] | None = None
    max_length: Count | None = None
    batching: Literal["random", "grouped", "packed"] = "random"
    max_broken: float = Field(0.01, ge=0, le=1)
    cache: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _read_recipe(cls, tree: Any) -> Any:
        """The parts become part of the configuration, so that a run's copy of it says what it was trained on."""
        if isinstance(tree, dict) and tree.get("recipe") and not tree.get("parts"):
            return {**tree, "parts": Recipe.load(Path(str(tree["recipe"]))).model_dump()["parts"]}
        return tree

    @model_validator(mode="after")
    def _complete(self) -> "Data":
        if self.kind == "llava":
            if bool(self.parts) == bool(self.records and self.images):
                raise ValueError(
                    "data of kind llava needs `records` (a .json or .jsonl file) and `images` (a folder), "
                    "or instead `recipe` or `parts`"
                )
            names = [part.name for part in self.parts]
            if doubled := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"two parts are named {doubled[0]!r}: give each part a name of its own")
        else:
            self._complete_scenes()
        return self

    def _complete_scenes(self) -> None:
        if self.count < 1:
            raise ValueError(f"data of kind {self.kind} needs `count`, the number of scenes")
        own = SCENE_TEMPLATES[self.kind]
        if self.template not in (None, own):
            raise ValueError(f"data of kind {self.kind} has the template {own}, not {self.template}: leave it out")
        if self.batching != "random":
            raise ValueError(f"batching: {self.batching} is for data of kind llava")

    def all_parts(self) -> list[Part]:
        """The parts with their paths from where the program runs; one file is a part named after it. Scenes: none."""
        if self.kind != "llava":
            return []
        if not self.parts:
            records, images = str(self.records), str(self.images)
            return [Part(name=Path(records).stem, records=records, images=images)]
        root = Path(self.root)
        places = [{"records": str(root / part.records), "images": str(root / part.images)} for part in self.parts]
        return [part.model_copy(update=place) for part, place in zip(self.parts, places, strict=True)]


def missing(data: Data) -> list[str]:
    """One sentence for each file and folder of the data that is not there; empty for scenes."""
    found = []
    for part in data.all_parts():
        if not Path(part.records).is_file():
            found.append(f"{part.name}: {part.records}: no such records file")
        folders = [Path(part.images), *(Path(part.images) / folder for folder in part.folders)]
        found += [f"{part.name}: {folder}: no such image folder" for folder in folders if not folder.is_dir()]
    return found


def refuse(problems: dict[str, list[str]]) -> None:
    """Stop before stages whose data have problems.

    Args:
        problems: of each stage, by its name.
    Raises:
        UserError: lists them all.
    """
    found = {stage: listed for stage, listed in problems.items() if listed}
    if found:
        said = [
            f"stage {stage}: the data is not complete:" + "".join(f"\n  {problem}" for problem in listed)
            for stage, listed in found.items()
        ]
        advice = "Put it there (docs/data.md says where it comes from), or correct the paths and counts of the data."
        raise UserError("\n".join([*said, advice]))
