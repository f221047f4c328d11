"""The C++ runner answers a job folder as the Python runtime and torch do, and says what is wrong with a bad one."""

import re
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("executorch.exir", reason="executorch is not installed")

from tests import runner_jobs
from tests.artifacts import pixels
from tests.executorch_artifacts import artifact_folder, checkpoint_folder, compiled_engine
from tests.runner_jobs import MAX_NEW_TOKENS, run, tokens_of
from vlm.models.checkpoint import load_checkpoint
from vlm.runtimes._executorch_library import RUNNER
from vlm.runtimes.base import Timings
from vlm.runtimes.executorch import MODEL, ExecutorchRuntime
from vlm.runtimes.executorch import open as open_executorch
from vlm.runtimes.torch import TorchRuntime


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> ExecutorchRuntime:
    return open_executorch(artifact_folder(tmp_path_factory, "fp32"), 2)


def test_runner_answers_as_the_python_runtime_and_torch(
    runtime: ExecutorchRuntime, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    torch_runtime = TorchRuntime(load_checkpoint(checkpoint_folder(tmp_path_factory, "fp32")))
    (tmp_path / "noise.f32").write_bytes(pixels().tobytes())
    seeing, blind = runtime.prompt("What color is the circle?"), runtime.prompt("What is two and two?", has_image=False)
    done = run_job(tmp_path, runtime, [("seeing", "noise.f32", seeing), ("blind", "-", blind)])
    assert done.returncode == 0, done.stderr
    answers = runner_jobs.answers(tmp_path)
    for reference in (runtime, torch_runtime):
        vision = reference.encode_image(pixels())
        assert answers["seeing"] == reference.generate(seeing, vision, MAX_NEW_TOKENS, Timings(), 0.0)
        assert answers["blind"] == reference.generate(blind, None, MAX_NEW_TOKENS, Timings(), 0.0)


def test_results_have_every_timing_and_the_peak_memory(runtime: ExecutorchRuntime, tmp_path: Path) -> None:
    (tmp_path / "noise.f32").write_bytes(pixels().tobytes())
    ids = runtime.prompt("What?")
    run_job(tmp_path, runtime, [("q", "noise.f32", ids)])
    cpus, load, start, answer, memory, done = (tmp_path / "results.txt").read_text().splitlines()
    assert re.fullmatch(r"cpus [\d,-]+", cpus) and float(start.removeprefix("start_s ")) > 0
    assert float(load.removeprefix("load_ms ")) > 0
    found = re.fullmatch(
        r"answer q end_s \d+\.\d+ vision_ms (\S+) prefill_ms (\S+) prefill_tokens (\d+) ttft_ms (\S+)"
        r" decode_ms([ .\d]*) tokens([ \d]*)",
        answer,
    )
    assert found
    vision, prefill, count, first, decode, tokens = found.groups()
    assert int(count) == len(ids)
    assert 0 < float(vision) + float(prefill) <= float(first) + 0.01
    assert len(decode.split()) == len(tokens.split()) - 1
    assert 1_000 < int(memory.removeprefix("vm_hwm_kib ")) < 1_000_000
    assert done == "done 1"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("treads 2", r"job\.txt:1: 'treads' found, model, threads"),
        ("threads two", r"job\.txt:1: no value"),
        ("request q - 1 2 x", r"job\.txt:1: something that is not a token id"),
        ("threads 2", r"job\.txt: a job without model"),
    ],
)
def test_bad_job_is_refused_by_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "job.txt").write_text(line + "\n")
    done = run(program(), tmp_path)
    assert done.returncode == 2
    assert re.search(message, done.stderr)


def test_picture_of_another_size_fails_the_run(runtime: ExecutorchRuntime, tmp_path: Path) -> None:
    (tmp_path / "noise.f32").write_bytes(pixels().tobytes()[:-4])
    done = run_job(tmp_path, runtime, [("q", "noise.f32", runtime.prompt("What?"))])
    assert done.returncode == 1
    assert re.search(r"noise\.f32: \d+ bytes found, \d+ expected", done.stderr)
    assert (tmp_path / "results.txt").read_text().splitlines()[-1].startswith("failed ")


def test_a_picture_is_encoded_once_for_its_questions_if_the_job_says_so(
    runtime: ExecutorchRuntime, tmp_path: Path
) -> None:
    (tmp_path / "noise.f32").write_bytes(pixels().tobytes())
    requests = [(name, "noise.f32", runtime.prompt("What?")) for name in ("first", "second")]
    run_job(tmp_path, runtime, requests)
    *_, first, second, _, _ = (tmp_path / "results.txt").read_text().splitlines()
    assert " vision_ms " in first and " vision_ms " in second
    run_job(tmp_path, runtime, requests, reuse_images=1)
    *_, first, reused, _, _ = (tmp_path / "results.txt").read_text().splitlines()
    assert " vision_ms " in first and " vision_ms " not in reused
    assert tokens_of(reused) == tokens_of(second)


def test_the_last_request_is_repeated_until_the_time_is_over(runtime: ExecutorchRuntime, tmp_path: Path) -> None:
    run_job(tmp_path, runtime, [("only", "-", runtime.prompt("What?", has_image=False))], repeat_s=0.3)
    lines = (tmp_path / "results.txt").read_text().splitlines()
    answers = [line.split() for line in lines if line.startswith("answer ")]
    assert [words[1] for words in answers] == ["only", *(f"only+{n}" for n in range(1, len(answers)))]
    ends = [float(words[3]) for words in answers]
    assert len(answers) > 2 and ends == sorted(ends) and ends[-1] - ends[0] < 0.6
    assert lines[-1] == f"done {len(answers)}"


def test_the_time_to_repeat_begins_after_the_warm_up(runtime: ExecutorchRuntime, tmp_path: Path) -> None:
    ids = runtime.prompt("What?", has_image=False)
    run_job(tmp_path, runtime, [("warm", "-", ids), ("timed", "-", ids)], repeat_s=0.2, repeat_from=1)
    lines = (tmp_path / "results.txt").read_text().splitlines()
    ends = [float(line.split()[3]) for line in lines if line.startswith("answer ")]
    assert ends[-1] - ends[0] >= 0.19


def run_job(
    folder: Path, runtime: ExecutorchRuntime, requests: list[tuple[str, str, list[int]]], **more: float
) -> subprocess.CompletedProcess[str]:
    """Write a job for the runtime's model into `folder` and run it."""
    return runner_jobs.run_job(program(), folder, runtime.folder / MODEL, runtime, requests, **more)


def program() -> Path:
    return compiled_engine() / RUNNER
