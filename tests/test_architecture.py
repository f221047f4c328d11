"""The import arrows of the house: roof -> stages -> ground floor, and no training library where artifacts run."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from pocketvlm import sources

ROOT = Path(__file__).parents[1]
STAGES = ("distill", "export", "device_bench")
ALLOWED = {"vlm": {"vlm"}, **{stage: {"vlm", stage} for stage in STAGES}, "pocketvlm": set(sources.ROOMS)}
TRAINING = {"torch", "transformers", "deepspeed", "accelerate"}
# These import torch if they find it; the runtimes that need them keep it out of the process (tests of each runtime).
BRINGS_TORCH = {"executorch", "coremltools"}


def modules(room: str) -> list[str]:
    """Every module of a room."""
    root = ROOT / room
    names = [path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in root.rglob("*.py")]
    return sorted(name.removesuffix(".__init__") for name in names)


def third_party(module: str) -> set[str]:
    """First names of what a module imports from outside the project and the standard library."""
    path = sources.source(module)
    assert path is not None, module
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - set(sources.ROOMS)


def benching_modules() -> list[str]:
    """What works without the training libraries: the bench, and every runtime except torch's."""
    runtimes = [name for name in modules("vlm/runtimes") if name != "vlm.runtimes.torch"]
    return [*modules("device_bench"), *runtimes]


@pytest.mark.parametrize("room", sources.ROOMS)
def test_arrows_point_down(room: str) -> None:
    wrong = {
        f"{module} imports {name}"
        for module in modules(room)
        for name in sources.imports(module)
        if name.partition(".")[0] in set(sources.ROOMS) - ALLOWED[room]
    }
    assert not wrong


def test_the_ground_floor_of_benching_reaches_no_training_library() -> None:
    wrong = {
        f"{module} imports {name}"
        for module in sources.reachable(benching_modules())
        for name in third_party(module) & TRAINING
    }
    assert not wrong


def imported(statement: str) -> set[str]:
    """Top-level modules that a fresh process has after `statement`."""
    code = f"import sys\n{statement}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_benching_really_imports_no_training_library() -> None:
    safe = [
        name for name in benching_modules() if not third_party(name) & BRINGS_TORCH and not name.endswith("__main__")
    ]
    assert not imported(f"import importlib\nfor name in {safe!r}: importlib.import_module(name)") & TRAINING


def test_a_run_with_nothing_to_do_imports_no_training_library() -> None:
    assert not imported("import pocketvlm.pipeline, pocketvlm.commands.run") & TRAINING


def test_help_imports_neither_stages_nor_heavy_libraries() -> None:
    heavy = {*STAGES, *TRAINING, "numpy", "pydantic", "rich", "matplotlib"}
    assert not imported("import pocketvlm.cli") & heavy


def test_plug_ins_are_found_without_a_central_list() -> None:
    for package in ("export.formats", "device_bench.devices", "device_bench.tasks", "vlm.runtimes"):
        listed = {entry.rpartition(".")[2] for entry in sources.entries_of(package)} - {"base"}
        central = sources.source(package)
        assert central is not None and listed
        named = {name for name in sources.imports(package) if name.rpartition(".")[2] in listed}
        assert not named, f"{central} names its entries"


def test_every_third_party_import_is_declared() -> None:
    tree = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [*tree["dependencies"], *(item for extra in tree["optional-dependencies"].values() for item in extra)]
    names = {re.split(r"[\[=<>]", item)[0].lower().replace("_", "-") for item in declared}
    providers = metadata.packages_distributions()
    wrong = set()
    for name in {name for room in sources.ROOMS for module in modules(room) for name in third_party(module)}:
        packages = {package.lower().replace("_", "-") for package in providers.get(name, [name])}
        wrong |= packages if not packages & names else set()
    assert not wrong


def test_constraints_pin_every_declared_package_once() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    names = [line.partition("==")[0].lower().replace("_", "-") for line in lines]
    assert len(names) == len(set(names))
    assert all(line.count("==") == 1 and "+" not in line for line in lines)
    assert "torchvision" not in names


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function's body, without its docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_no_file_and_no_function_is_long() -> None:
    """A file over 300 lines is asking to be two rooms; a function over 40 hides a name."""
    long = []
    for room in (*sources.ROOMS, "benchmarks", "tests"):
        for path in (ROOT / room).rglob("*.py"):
            text = path.read_text()
            found = [
                node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            ]
            long += [f"{path.relative_to(ROOT)}: {node.name}" for node in found if body_lines(node) > 40]
            long += [str(path.relative_to(ROOT))] if text.count("\n") > 300 else []
    assert long == []
