"""The push bundle: what is missing is named with the next step, and a damaged one is never pushed."""

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from device_bench.devices import _build, _bundle, _recipe
from device_bench.devices._bundle import bundle, examined, own_bundle
from device_bench.devices._recipe import RECORD
from device_bench.sensors.base import Absent
from pocketvlm.cli import app
from vlm.errors import UserError
from vlm.folders import sha256


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with a cross compiler that only tells its version, and an empty cache."""
    monkeypatch.setenv("POCKETVLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_recipe, "_version", lambda how: "1.0")
    folder = tmp_path / "bin"
    folder.mkdir()
    compiler = folder / "aarch64-linux-gnu-g++"
    compiler.write_text("#!/bin/sh\necho version 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


@pytest.mark.parametrize(
    ("engine", "abi", "message"),
    [
        ("coreml", "arm64-v8a", r"'coreml': no runner for other devices; executorch, onnx, llamacpp have one"),
        ("onnx", "mips", r"--abi mips: no bundle for this processor; arm64-v8a, x86_64 expected"),
    ],
)
def test_what_has_no_bundle_is_refused(engine: str, abi: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        bundle(engine, abi)


def test_a_missing_cross_compiler_says_what_to_install(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(UserError, match=r"aarch64-linux-gnu-g\+\+: not found.*apt install g\+\+-aarch64-linux-gnu"):
        bundle("onnx", "arm64-v8a")


def test_llama_cpp_asks_for_the_folder_of_its_packages(
    tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = tmp_path / "usr" / "include" / "llama.h"
    header.parent.mkdir(parents=True)
    header.touch()  # but no libraries for that processor
    monkeypatch.setenv("LLAMACPP_ROOT", str(tmp_path))
    with pytest.raises(UserError, match=rf"LLAMACPP_ROOT='{tmp_path}'.*aarch64-linux-gnu/libllama.so.*libllama-dev"):
        bundle("llamacpp", "arm64-v8a")


def test_a_bundle_in_the_cache_is_used_and_a_damaged_one_refused(
    tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(work: Path, *rest: object) -> Path:
        ready = work / "ready"
        ready.mkdir()
        (ready / "pocketvlm-runner").write_text("program")
        files = {"pocketvlm-runner": sha256(ready / "pocketvlm-runner")}
        (ready / RECORD).write_text(json.dumps({"files": files}))
        return ready

    monkeypatch.setattr(_bundle, "make", make)
    before = examined("executorch", "arm64-v8a")
    assert isinstance(before, Absent) and "not built yet; the first bench does it" in before.reason
    made = bundle("executorch", "arm64-v8a")
    assert examined("executorch", "arm64-v8a") == "built, executorch 1.0, 1 files, each with the right SHA-256"
    assert made.command("/there") == [
        "/there/ld-linux-aarch64.so.1", "--library-path", "/there", "/there/pocketvlm-runner"
    ]  # fmt: skip
    monkeypatch.setattr(_bundle, "make", lambda *rest: pytest.fail("made again"))
    assert bundle("executorch", "arm64-v8a") == made
    (made.folder / "pocketvlm-runner").write_text("other")
    with pytest.raises(UserError, match=r"pocketvlm-runner: damaged\. Remove"):
        bundle("executorch", "arm64-v8a")
    damaged = examined("executorch", "arm64-v8a")
    assert isinstance(damaged, Absent) and "damaged" in damaged.reason


def test_a_runner_that_the_user_built_is_taken_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_bundle("onnx") is None
    monkeypatch.setenv("POCKETVLM_RUNNERS", str(tmp_path))
    with pytest.raises(UserError, match=r"onnx/pocketvlm-runner: not there; POCKETVLM_RUNNERS names a folder"):
        own_bundle("onnx")
    (tmp_path / "onnx").mkdir()
    for name in ("pocketvlm-runner", "libonnxruntime.so", "libc++_shared.so"):
        (tmp_path / "onnx" / name).write_text(name)
    own = own_bundle("onnx")
    assert own is not None and own.command("/there") == ["/there/pocketvlm-runner"]
    assert examined("onnx", "mips") == f"your own, {tmp_path / 'onnx'}"
    assert sorted(own.files) == ["libc++_shared.so", "libonnxruntime.so", "pocketvlm-runner"]


def test_a_compiler_that_fails_is_told_with_what_it_said(tools: Path) -> None:
    (tools / "aarch64-linux-gnu-g++").write_text("#!/bin/sh\necho cannot find cc1plus >&2\nexit 4\n")
    with pytest.raises(
        UserError, match=r"g\+\+ --version \.\.\.` ended with 4\.\ncannot find cc1plus\nA cross compiler"
    ):
        bundle("executorch", "arm64-v8a")


def test_a_compiler_without_its_binutils_is_told(tools: Path) -> None:
    with pytest.raises(UserError, match=r"aarch64-linux-gnu-readelf: No such file or directory\. A cross compiler"):
        _build._needed(tools / "x.so", str(tools / "aarch64-linux-gnu-g++"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--abi", "nonsense"], "--abi nonsense: no bundle for this processor"),
        (["--engine", "executorch", "--engine", "nonsense"], "engine 'nonsense': no runner"),
        (["--engine", "executorch", "--engine", "onnx"], "onnxruntime_c_api.h: not found"),
    ],
)
def test_what_cannot_be_made_is_refused_before_anything_is_begun(
    tools: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    monkeypatch.setattr(_bundle, "make", lambda *rest: pytest.fail("begun"))
    monkeypatch.setattr(_recipe, "HEADER_PLACES", ())
    monkeypatch.delenv("ONNXRUNTIME_HEADERS", raising=False)
    done = CliRunner().invoke(app, ["bundle", *words])
    assert isinstance(done.exception, UserError) and message in str(done.exception)
    assert capfd.readouterr().err == ""
