"""Code versions cover what a step really uses, the C++ engine included."""

from pathlib import Path

import pytest

from pocketvlm import sources


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
