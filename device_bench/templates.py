"""Templates of pages: every value is escaped, and all pages may include the report's style.css."""

from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

_REPORT = Path(__file__).parent / "report"


@cache
def template(folder: Path, name: str) -> Template:
    """The template `name` of a folder."""
    environment = Environment(
        loader=FileSystemLoader([folder, _REPORT]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
