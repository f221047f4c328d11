"""How each component's weights are stored: a preset, then exceptions: "int4", "int4,vision=fp16,head=int8".

A format has `PRESETS` (name -> storage of every component) and `STORAGES` (component -> what it can be stored as), or
`PRECISIONS` alone if it takes no exceptions.
"""

from collections.abc import Collection, Mapping
from types import ModuleType

from vlm.errors import UserError
from vlm.registry import did_you_mean

COMPONENTS = ("vision", "projector", "embedding", "decoder", "head")


def resolve(
    text: str, presets: Mapping[str, Mapping[str, str]], storages: Mapping[str, Collection[str]]
) -> dict[str, str]:
    """Say how each of COMPONENTS is stored.

    Args:
        text: "<preset>[,<component>=<storage>...]".
        presets: the format's presets by name, each with all COMPONENTS.
        storages: what the format can store each component as.
    Raises:
        UserError: an unknown preset, component or storage, an exception of another form, or a component given twice.
    """
    preset, *exceptions = text.split(",")
    _check("precision", preset, presets)
    chosen, excepted = dict(presets[preset]), set()
    for exception in exceptions:
        component, _, storage = exception.partition("=")
        if storages and not (component and storage):
            form = ", ".join(f"{name}={next(iter(kinds))}" for name, kinds in list(storages.items())[:2])
            raise UserError(f"precision {text!r}: {exception!r} found, COMPONENT=STORAGE expected, such as {form}.")
        _check(f"precision {text!r}: component", component, storages)
        if component in excepted:
            raise UserError(f"precision {text!r}: {component} is given twice. Give it once.")
        excepted.add(component)
        _check(f"precision {text!r}: storage of {component}", storage, storages[component])
        chosen[component] = storage
    return chosen


def presets(module: ModuleType) -> Mapping[str, Mapping[str, str]]:
    """The presets of a format's module."""
    return getattr(module, "PRESETS", {name: {} for name in module.PRECISIONS})


def uniform(storage: str, **others: str) -> dict[str, str]:
    """A preset that stores every component as `storage`, but for `others`."""
    return dict.fromkeys(COMPONENTS, storage) | others


def _check(what: str, found: str, known: Collection[str]) -> None:
    if found not in known:
        some = f"Known: {', '.join(known)}." if known else "This format takes precisions without exceptions."
        if not found:
            raise UserError(f"no {what} was given. {some}")
        raise UserError(f"{what} {found!r} is unknown.{did_you_mean(found, known)} {some}")
