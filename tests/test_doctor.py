"""The doctor knows every package that the extras bring, and notices an engine whose library is not there."""

import re
import tomllib
from pathlib import Path

import pytest

from pocketvlm import doctor

ROOT = Path(__file__).parents[1]
EXTRAS: dict[str, list[str]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
LIBRARIES = {
    "onnx": "onnxruntime", "executorch": "executorch", "coreml": "coremltools", "llamacpp": "llama_cpp",
    "torch": "torch",
}  # fmt: skip


def brought_by(extra: str) -> set[str]:
    """Names of the packages of an extra, those of the extras within it included."""
    found: set[str] = set()
    for requirement in EXTRAS[extra]:
        name, inner = re.fullmatch(r"([\w-]+)(?:\[([\w,]+)\])?.*", requirement).groups()  # type: ignore[union-attr]
        found |= {name} if inner is None else {p for part in inner.split(",") for p in brought_by(part)}
    return found


def test_every_package_of_every_extra_is_looked_for() -> None:
    known = {name for name, *_ in doctor.PACKAGES} | set(doctor.PIP_TOOLS)
    assert {package for extra in EXTRAS for package in brought_by(extra)} == known


def test_the_extra_that_is_advised_brings_the_package() -> None:
    advised = {name: extra for name, _, extra, _ in doctor.PACKAGES} | doctor.PIP_TOOLS
    assert [name for name, extra in advised.items() if name not in brought_by(extra)] == []


def test_a_missing_tool_is_advised_where_it_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda *_, **__: None)
    advice = {finding.name: finding.advice for finding in doctor._tools()}
    assert "apt-get install gcc" in advice["gcc"] and ".[test]" in advice["mypy"]


@pytest.mark.parametrize("engine", sorted(doctor.ENGINES))
def test_an_engine_without_its_library_does_not_work(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    without = f"import sys; sys.modules[{LIBRARIES[engine]!r}] = None; {doctor.ENGINES[engine]}"
    finding = doctor._engine(engine, without, None)
    assert finding.state == "note" and finding.found != "works"
    assert f".[{engine}]" in finding.advice


def test_make_install_is_advised_where_it_brings_the_package() -> None:
    extras = {extra for _, _, extra, _ in doctor.PACKAGES}
    left_out = {extra for extra in extras if not brought_by(extra) <= brought_by("all")}
    assert {extra for extra in extras if "make install" not in doctor._installing(extra)} == left_out


def test_every_engine_has_its_extra() -> None:
    assert set(doctor.ENGINES) <= set(EXTRAS)


def test_the_data_that_is_missing_of_any_stage_is_named_beside_the_forecasts() -> None:
    findings = {finding.name: finding for finding in doctor.examine(ROOT / "configs" / "mobilevlm_v2_1.7b.yaml")}
    advice = findings["input files"].advice
    assert findings["input files"].state == "missing" and {"memory", "disk"} <= set(findings)
    assert "stage pretrain: the data is not complete:\n  ShareGPT4V-PT: data/pretrain_data/share-captioner" in advice
    assert "stage finetune: the data is not complete:\n  COCO: data/finetune_data/coco.json: no such" in advice


def test_every_push_bundle_is_looked_at_and_what_it_needs_is_advised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    found = {finding.name: finding for finding in doctor._bundles()}
    engines = ("executorch", "onnx", "llamacpp")
    assert found.keys() == {f"{abi} {engine}" for abi in ("arm64-v8a", "x86_64") for engine in engines}
    for name, finding in found.items():
        compiler = ("aarch64" if name.startswith("arm64") else "x86_64") + "-linux-gnu-g++"
        assert (finding.state, finding.found) == ("note", "no") and f"{compiler}: not found" in finding.advice


def test_every_phone_that_adb_lists_is_told_with_its_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adb = tmp_path / "adb"
    adb.write_text("#!/bin/sh\nprintf 'List of devices attached\\nAAA\\tunauthorized\\nBBB\\toffline\\n'\n")
    adb.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = {finding.name: finding for finding in doctor._devices([])}
    assert "Allow USB debugging" in found["adb:AAA"].advice and "Reconnect the cable" in found["adb:BBB"].advice
    adb.write_text("#!/bin/sh\necho List of devices attached\n")
    assert "Connect it by USB" in next(finding for finding in doctor._devices([]) if finding.name == "adb").advice
