"""The C++ runner of ONNX Runtime answers as the Python runtime, whatever the decoder's form, with the same sessions."""

import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

import onnxruntime as ort

from device_bench.devices._recipe import HEADER, HEADER_PLACES, ONNXRUNTIME_HEADERS
from tests.artifacts import pixels, write_artifact
from tests.rig.fetch import folder as rig_folder
from tests.runner_jobs import MAX_NEW_TOKENS, answers, run_job
from tests.tiny import save_random_checkpoint
from vlm.models.checkpoint import load_checkpoint
from vlm.runtimes import _onnx_session, open_runtime
from vlm.runtimes._executorch_library import HARNESS, RUNNER
from vlm.runtimes.base import Timings

SPINNING = "session.intra_op.allow_spinning"


def headers() -> Path:
    """Folder of ONNX Runtime's C API; skips where it is nowhere."""
    rig = rig_folder() / "device" / "usr" / "include" / "onnxruntime"
    for place in (os.environ.get(ONNXRUNTIME_HEADERS, ""), *HEADER_PLACES, rig):
        if (Path(place) / HEADER).is_file():
            return Path(place)
    pytest.skip(f"no {HEADER}: apt install libonnxruntime-dev (Debian 13), or make test-rig")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runner, built for this machine with the wheel's library."""
    if shutil.which("cmake") is None:
        pytest.skip("no cmake")
    include, build = headers(), tmp_path_factory.mktemp("onnx") / "build"
    library = next((Path(ort.__file__).parent / "capi").glob("libonnxruntime.so.*"))
    settings = ["-DENGINE=onnx", f"-DONNXRUNTIME_INCLUDE_DIR={include}", f"-DONNXRUNTIME_LIBRARY={library}"]
    for command in (["cmake", "-S", HARNESS, "-B", build, *settings], ["cmake", "--build", build]):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    (build / "libonnxruntime.so.1").symlink_to(library)  # the wheel has it under its full version only
    return build / RUNNER


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of one random model: a decoder whose cache grows, and one whose past and present share a buffer."""
    base = tmp_path_factory.mktemp("artifacts")
    checkpoint = load_checkpoint(save_random_checkpoint(base / "checkpoint", num_key_value_heads=2))
    found = {precision: base / f"onnx-{precision}" for precision in ("fp32", "int4")}
    for precision, folder in found.items():
        folder.mkdir()
        write_artifact(checkpoint, f"onnx:{precision}", folder)
    return found


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_the_runner_answers_as_the_python_runtime(
    program: Path, artifacts: dict[str, Path], tmp_path: Path, precision: str
) -> None:
    runtime = open_runtime(artifacts[precision], 2)
    (tmp_path / "noise.f32").write_bytes(pixels().tobytes())
    seeing, blind = runtime.prompt("What color is the circle?"), runtime.prompt("What is two and two?", has_image=False)
    asked = [("seeing", "noise.f32", seeing), ("blind", "-", blind), ("again", "noise.f32", seeing)]
    done = run_job(program, tmp_path, artifacts[precision], runtime, asked)
    assert done.returncode == 0, done.stderr
    vision = runtime.encode_image(pixels())
    wanted = runtime.generate(seeing, vision, MAX_NEW_TOKENS, Timings(), 0.0)
    assert answers(tmp_path) == {
        "seeing": wanted,
        "blind": runtime.generate(blind, None, MAX_NEW_TOKENS, Timings(), 0.0),
        "again": wanted,
    }


def test_the_runner_opens_its_sessions_as_the_python_runtime(
    program: Path, artifacts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = tmp_path / "spy.so"
    source = Path(__file__).with_name("session_spy.cpp")
    subprocess.run(["c++", "-shared", "-fPIC", "-I", str(headers()), str(source), "-o", str(spy), "-ldl"], check=True)
    found: list[str] = []

    def session(path: str, options: Any, **more: Any) -> Any:
        words = [f"session {path} threads={options.intra_op_num_threads}"]
        with suppress(RuntimeError):  # it was not set
            words.append(f"{SPINNING}={options.get_session_config_entry(SPINNING)}")
        found.append(" ".join(words))
        return inference_session(path, options, **more)

    inference_session = ort.InferenceSession
    monkeypatch.setattr(_onnx_session.ort, "InferenceSession", session)
    runtime = open_runtime(artifacts["int4"], 2)
    monkeypatch.setenv("LD_PRELOAD", str(spy))
    asked = [("q", "-", runtime.prompt("What?", has_image=False))]
    done = run_job(program, tmp_path, artifacts["int4"], runtime, asked)
    assert done.returncode == 0 and done.stderr.splitlines() == found
    assert [SPINNING in line for line in found] == [True, False, False]
