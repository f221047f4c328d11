"""The documentation says what the code does: figures, links, commands, options, targets and keys."""

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args, get_origin

import click
import pytest
import typer
from pydantic import BaseModel
from typer.main import get_command

from device_bench.baseline import slim
from device_bench.config import BenchConfig
from device_bench.judge import Allowances
from device_bench.report import build
from distill.config import DistillConfig
from export.config import ExportConfig
from pocketvlm.cli import app
from pocketvlm.readme import BEGIN, END, block, rewrite
from pocketvlm.study.config import StudyConfig
from tests.report_fixture import make_run
from vlm.errors import UserError
from vlm.manifest import Manifest

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
BASELINE = ROOT / "baselines" / "tiny.json"


def code(page: Path) -> list[str]:
    """What a page shows as code: indented lines, joined where they end in a backslash, and words between backticks."""
    text = re.sub(r"\\\n\s*", " ", page.read_text())
    indented = re.findall(r"^ {4,}(\S.*)$", text, re.MULTILINE)
    return indented + re.findall(r"`([^`]+)`", re.sub(r"^ {4,}.*$", "", text, flags=re.MULTILINE))


def keys(model: type[BaseModel], prefix: str = "") -> set[str]:
    """Dotted keys of a configuration's values; the items of a list of sections are written name[]."""
    found = set()
    for name, field in model.model_fields.items():
        kinds = (field.annotation, *get_args(field.annotation))
        section = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        items = "[]" if get_origin(field.annotation) is list else ""
        found |= keys(section, f"{prefix}{name}{items}.") if section else {f"{prefix}{name}"}
    return found


def first_column(page: Path) -> set[str]:
    """The words between backticks in the first column of a page's tables."""
    rows = re.findall(r"^\| (`.+?`) \|", page.read_text(), re.MULTILINE)
    return {word for row in rows for word in re.findall(r"`([^`]+)`", row)}


def commands() -> dict[str, click.Command]:
    """The command line's commands by name."""
    root = get_command(app)
    assert isinstance(root, click.Group | typer.core.TyperGroup)
    return dict(root.commands)


def options(command: Any) -> set[str]:
    """Every spelling of a command's options."""
    return {spelling for parameter in command.params for spelling in parameter.opts if spelling.startswith("-")}


def shown_commands() -> list[tuple[str, str, list[str]]]:
    """(page, command, options) of every `pocketvlm COMMAND ...` in the documentation."""
    found = []
    for page in PAGES:
        for line in code(page):
            for name, rest in re.findall(r"(?:^|/|&& )pocketvlm ([a-z]+)([^&#]*)", line):
                found.append((page.name, name, re.findall(r"(?<!\S)\[?(--[a-z][a-z-]*)", rest)))
    return found


def test_the_figures_of_the_readme_are_those_of_the_baseline() -> None:
    readme = (ROOT / "README.md").read_text()
    assert rewrite(readme, block(json.loads(BASELINE.read_text()))) == readme


def test_a_report_and_its_baseline_give_the_same_figures(tmp_path: Path) -> None:
    report = json.loads(json.dumps(build(make_run(tmp_path, scenes=6))))
    text = block(report)
    assert text == block(json.loads(json.dumps(slim(report))))
    student = report["models"]["student"]["accuracy"]["avg"]["score"]
    assert f"distilled student {student:.1f}" in text
    assert "no processor" in text and "| ONNX fp32 | 7.90 |" in text
    core_ml = next(line for line in text.splitlines() if line.startswith("| Core ML fp16"))
    assert core_ml.count("n/a") == 4 and "needs macOS" in text
    assert len([line for line in text.splitlines() if line.startswith("| ")]) == 1 + 8


def test_rewriting_keeps_the_rest_of_the_readme() -> None:
    assert rewrite(f"a\n{BEGIN}\nold\n{END}\nb\n", "new") == f"a\n{BEGIN}\nnew\n{END}\nb\n"
    with pytest.raises(UserError, match="figures"):
        rewrite("a readme without marks", "new")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_resolves(page: Path) -> None:
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()) if "://" not in link]
    assert [link for link in links if link and not (page.parent / link).exists()] == []


def test_every_command_and_option_shown_exists() -> None:
    known = commands()
    shown = shown_commands()
    assert {name for _, name, _ in shown} == set(known), "the documentation shows every command and no other"
    wrong = [(page, name, o) for page, name, given in shown for o in given if o not in options(known[name])]
    assert not wrong


def test_cli_md_lists_every_option() -> None:
    text = (ROOT / "docs" / "cli.md").read_text()
    for name, command in commands().items():
        section = text.partition(f"## {name}\n")[2].partition("\n## ")[0]
        missing = {option for option in options(command) if option.startswith("--")} - {"--help"}
        assert {option for option in missing if f"`{option}" not in section} == set(), name


def test_every_make_target_shown_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shown = {t for page in PAGES for line in code(page) for t in re.findall(r"(?:^|&& )make ([a-z-]+)", line)}
    assert shown and shown <= targets


def test_every_module_shown_can_be_run() -> None:
    shown = {module for page in PAGES for line in code(page) for module in re.findall(r"python -m ([a-z_.]+)", line)}
    assert shown and [module for module in sorted(shown) if find_spec(module) is None] == []


def test_distillation_md_lists_the_keys_of_the_configuration() -> None:
    shown = {key for key in first_column(ROOT / "docs" / "distillation.md") if not key.startswith("--")}
    assert shown - {"student"} == keys(DistillConfig)


@pytest.mark.parametrize(
    ("page", "model"),
    [("exports.md", ExportConfig), ("measuring.md", BenchConfig), ("measuring.md", Allowances)],
    ids=["export", "bench", "gate"],
)
def test_the_keys_of_the_other_configurations_are_named(page: str, model: type[BaseModel]) -> None:
    text = (ROOT / "docs" / page).read_text()
    assert [key for key in model.model_fields if f"`{key}`" not in text] == []


def test_studies_md_lists_the_shipped_studies() -> None:
    shipped = {f"studies/{path.name}" for path in (ROOT / "studies").glob("*.yaml")}
    section = (ROOT / "docs" / "studies.md").read_text().partition("## The shipped studies")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\* `(.+?)`", section, re.MULTILINE)) == shipped


def test_studies_md_lists_the_keys_of_a_study() -> None:
    assert first_column(ROOT / "docs" / "studies.md") == keys(StudyConfig)


def test_exports_md_lists_the_fields_of_the_manifest() -> None:
    fields = {field.alias or name for name, field in Manifest.model_fields.items()}
    assert fields - first_column(ROOT / "docs" / "exports.md") == set()
