"""Code versions cover what a step really uses, plug-ins and the C++ engine included."""

import ast
from pathlib import Path

import pytest

from pocketvlm import sources, steps
from tests import road


def test_the_engine_in_cpp_is_part_of_the_executorch_runtimes_version() -> None:
    files = sources._files("vlm.runtimes._executorch_library")
    assert {"CMakeLists.txt"} <= {path.name for path in files}
    assert any(path.suffix == ".cpp" for path in files)


def test_a_changed_source_changes_the_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = sources.code_version(["vlm.bars"])
    other = tmp_path / "bars.py"
    other.write_text("")
    real = sources.source
    monkeypatch.setattr(sources, "source", lambda module: other if module == "vlm.bars" else real(module))
    assert sources.code_version(["vlm.bars"]) != before


def loaded_by_name(module: str) -> set[str]:
    """The packages that a module gives to vlm.registry.load, as text or as a constant of its own."""
    path = sources.source(module)
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)] if path else []
    given = [call.args[0] for call in calls if isinstance(call.func, ast.Name) and call.func.id == "load" and call.args]
    texts = [node.value for node in given if isinstance(node, ast.Constant)]
    texts += [sources.constant(module, node.id) for node in given if isinstance(node, ast.Name)]
    return {text for text in texts if isinstance(text, str) and sources.source(text)}


def test_what_a_step_loads_by_name_is_in_its_code_or_in_that_of_what_it_is_made_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(steps, "code_version", " ".join)
    covered: dict[str, set[str]] = {}
    found: set[str] = set()
    for step in steps.road(road.config(), Path("run")):
        for product in step.products:
            own = product.inputs["code"].split()
            covered[product.name] = {*own, *(entry for need in product.needs for entry in covered[need])}
            packages = {package for module in sources.reachable(own) for package in loaded_by_name(module)}
            left_out = {p for p in packages if not any(entry.startswith(f"{p}.") for entry in covered[product.name])}
            assert not left_out, step.title
            found |= packages
    assert found == {"device_bench.devices", "device_bench.tasks", "export.formats", "vlm.runtimes"}
