"""The push bundle for x86-64, which runs on this machine as it would on a device: loader, C library, engine, runner."""

import shutil
from pathlib import Path

from device_bench.devices._bundle import bundle
from tests.rig.rig import Rig
from tests.runner_jobs import MAX_NEW_TOKENS, answers, run_job
from vlm.runtimes import open_runtime
from vlm.runtimes.base import Timings


def test_a_bundle_for_x86_gives_the_answers_of_the_python_runtime(
    rig: Rig, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    made, place = bundle("onnx", "x86_64"), tmp_path / "device"
    shutil.copytree(made.folder, place)
    for name in made.files:
        (place / name).chmod(0o700)
    program = tmp_path / "program"
    program.write_text(f'#!/bin/sh\nexec {" ".join(made.command(str(place)))} "$@"\n')
    program.chmod(0o700)
    runtime = open_runtime(artifacts["onnx-int4"], 1)
    ids = runtime.prompt("What is two and two?", has_image=False)
    done = run_job(program, tmp_path, artifacts["onnx-int4"], runtime, [("q", "-", ids)], threads=1)
    assert done.returncode == 0, done.stderr
    assert answers(tmp_path)["q"] == runtime.generate(ids, None, MAX_NEW_TOKENS, Timings(), 0.0)
