"""Typed configuration: one pydantic model per stage, YAML as its serialisation, `key=value` to override."""

from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vlm.errors import UserError
from vlm.registry import did_you_mean

Count = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]

# Top-level key -> the kind of file that it makes, and the command that takes it.
KINDS = {
    "distill": ("a run", "run"),
    "stages": ("a distillation", "distill"),
    "rows": ("a study", "ablate"),
    "max_drop": ("allowances", "gate NEW --baseline OLD --allowances"),
}


class Config(BaseModel):
    """Base of every configuration: unknown keys are errors, values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @classmethod
    def load(cls, path: Path, overrides: list[str] | None = None) -> Self:
        """Read a YAML file and apply `key.sub=value` overrides (values are parsed as YAML).

        Raises:
            UserError: the file is missing or not YAML, a key or value is wrong; the message names all three.
        """
        tree = read(path)
        for key, (kind, command) in KINDS.items():
            if key in tree and key not in cls.model_fields:
                raise UserError(f"{path}: this is the file of {kind}. Type: pocketvlm {command} {path}")
        for override in overrides or []:
            _apply(tree, override)
        return cls.parse(tree, str(path))

    @classmethod
    def parse(cls, tree: dict[str, Any], source: str) -> Self:
        """Validate a tree of plain values; `source` names where it came from in error messages."""
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise UserError("\n".join(_explain(cls, source, problem) for problem in error.errors())) from error

    def dump(self) -> str:
        """Return the YAML text from which `load` builds an equal configuration."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def read(path: Path) -> dict[str, Any]:
    """Read the mapping that a YAML file holds.

    Raises:
        UserError: the file is missing or holds something else.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such configuration file. The built-in default is configs/tiny.yaml.")
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable YAML file: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a mapping of keys to values was expected, found {type(tree).__name__}.")
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise UserError(f"override {override!r}: expected key=value, for example bench.scenes=50.")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: the value is not YAML: {error}. Quote it.") from error
    node: Any = tree
    *parents, leaf = key.split(".")
    for parent in parents:
        place = _place(node, parent, override)
        if isinstance(node, dict):
            node.setdefault(place, {})
        node = node[place]
        if not isinstance(node, dict | list):
            raise UserError(f"override {override!r}: {parent!r} is a single value, not a section. Set it as a whole.")
    node[_place(node, leaf, override)] = parsed


def _place(node: dict[str, Any] | list[Any], key: str, override: str) -> Any:
    """A key as the section takes it: in a list the number of an item, from 0."""
    if isinstance(node, dict):
        return key
    if not key.isdecimal() or int(key) >= len(node):
        raise UserError(
            f"override {override!r}: {key!r} found in the place of a list's item, a number from 0 to {len(node) - 1} "
            "expected. Items are only added in the file."
        )
    return int(key)


def _explain(cls: type[BaseModel], source: str, problem: Any) -> str:
    location = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _fields_at(cls, problem["loc"][:-1])
        hint = did_you_mean(str(problem["loc"][-1]), known)
        return f"{source}: unknown key {location!r}.{hint} Known: {', '.join(known)}."
    if problem["type"] == "missing":
        return f"{source}: {location!r} is missing."
    return f"{source}: {location}: {problem['msg']} (found {problem['input']!r})."


def _fields_at(cls: Any, path: tuple[Any, ...]) -> list[str]:
    for part in path:
        field = getattr(cls, "model_fields", {}).get(part)
        candidates = [] if field is None else [field.annotation, *getattr(field.annotation, "__args__", ())]
        cls = next((c for c in candidates if hasattr(c, "model_fields")), cls)
    return sorted(getattr(cls, "model_fields", {}))
