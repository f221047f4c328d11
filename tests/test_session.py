"""A long evaluation goes on where it was killed, and its records do not depend on its course."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from device_bench import session as module
from device_bench.evaluate import evaluate, evaluate_batch, grade, questions, save_answers
from device_bench.records import read_records
from device_bench.session import Session, units
from device_bench.tasks.base import BenchQuestion, Sample
from pocketvlm.cli import app
from tests.answers import question
from tests.layouts import LLAVA
from vlm.errors import CheckFailed, UserError

ASKED = [question("scienceqa", "A", str(n), image="", prompt=f"question {n}") for n in range(6)]


class Fake:
    """A model that answers with the question's last character and breaks where it is told to."""

    facts = SimpleNamespace(context_length=400)

    def __init__(self, breaks: str = "") -> None:
        self.breaks, self.asked = breaks, 0

    def prompt(self, text: str, has_image: bool) -> str:
        return text

    def answer(self, image: None, text: str, max_new_tokens: int, vision: None) -> SimpleNamespace:
        if self.breaks and text.endswith(self.breaks):
            raise KeyboardInterrupt
        self.asked += 1
        return SimpleNamespace(text=text[-1], tokens=[1])

    def use_gpu(self) -> None:
        pass

    def close(self) -> None:
        pass


def session(folder: Path, asked: list[BenchQuestion] = ASKED, **header: Any) -> Session:
    return Session(folder / "model", asked, {"seed": 0, **header}, folder / "x.answers", 4)


def run(made: Session, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> list[Sample]:
    monkeypatch.setattr(module, "open_runtime", lambda folder, threads: fake)
    return made.run(lambda done, count: None)


def test_an_interrupted_run_asks_only_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = run(session(tmp_path / "a"), Fake(), monkeypatch)
    first, second = Fake(breaks="4"), Fake()
    with pytest.raises(KeyboardInterrupt):
        run(session(tmp_path / "b"), first, monkeypatch)
    part = tmp_path / "b" / "x.answers" / "1.jsonl"
    part.write_text(part.read_text() + '{"id": "4", "ima')  # killed while it wrote
    resumed = run(session(tmp_path / "b"), second, monkeypatch)
    assert (first.asked, second.asked) == (4, 2)
    assert [replace(s, ms=0, vision_ms=0) for s in resumed] == [replace(s, ms=0, vision_ms=0) for s in straight]
    assert [sample.id for sample in resumed] == [asked.id for asked in ASKED]
    done = session(tmp_path / "b")
    done.clear()
    assert not done.journal.exists()


def test_answers_of_another_evaluation_are_not_mixed_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(session(tmp_path), Fake(), monkeypatch)
    with pytest.raises(UserError, match="holds answers of another evaluation"):
        run(session(tmp_path, seed=1), Fake(), monkeypatch)


def test_a_unit_is_an_image_or_a_batch_that_does_not_depend_on_what_is_left() -> None:
    asked = [question("gqa", "x", str(n), image=f"i{n % 3}") for n in range(9)]
    assert [[q.image for q in unit] for unit in units(asked, 1)] == [["i0"] * 3, ["i1"] * 3, ["i2"] * 3]
    assert [len(unit) for unit in units(asked, 4)] == [4, 4, 1] and units(asked, 4)[0].together
    assert [q.image for unit in units(asked, 4) for q in unit] == ["i0"] * 3 + ["i1"] * 3 + ["i2"] * 3


def test_a_batch_gives_the_answers_of_single_questions(random_checkpoint: Path) -> None:
    from vlm.runtimes import open_runtime

    runtime = open_runtime(random_checkpoint, 1)
    asked = [*questions(["scenes"], 1)[:9], question("scienceqa", "A", "text", image="", prompt="Which?\nA. x\nB. y")]
    asked.insert(3, question("gqa", "x", "long", image="", prompt="w " * 600))
    alone, together = (ask(runtime, asked, 6) for ask in (evaluate, evaluate_batch))
    assert [s.answer for s in together] == [s.answer for s in alone] and len({s.answer for s in alone}) > 3
    assert together[0].problem == "" and together[3].problem == alone[3].problem != ""
    assert sum(s.vision_ms > 0 for s in together) == 1


def test_two_processes_give_the_records_of_one_and_a_crash_keeps_answers(
    tmp_path: Path, random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    LLAVA["scienceqa"](tmp_path)
    common = ["eval", str(random_checkpoint), "--task", "scienceqa", "--data", str(tmp_path), "--threads", "1"]
    common += ["--max-new-tokens", "3", "--json"]
    found = []
    for more in (["--processes", "1"], ["--processes", "2"], ["--batch", "2"]):
        out = tmp_path / f"{'-'.join(more)}.jsonl"
        done = CliRunner().invoke(app, [*common, *more, "--out", str(out)])
        assert done.exit_code == 0, done.output
        details = json.loads(done.stdout)["accuracy"]["tasks"]["scienceqa"]["details"]
        assert details["data"]["questions"] == 2 and details["line"].startswith("ScienceQA IMG-Accuracy")
        found.append([replace(sample, ms=0, vision_ms=0) for sample in read_records(out)])
        assert not out.with_name(out.name + ".answers").exists()
    assert found[0] == found[1] == found[2] and found[0][0].tokens == 3
    again = CliRunner().invoke(app, ["eval", "--predictions", str(out), "--against", str(out), "--json"])
    assert json.loads(again.stdout)["against"]["scienceqa"]["p"] == 1
    only = CliRunner().invoke(app, [*common, "--only", "image", "--out", str(out)])
    assert only.exit_code == 0 and [sample.kind for sample in read_records(out)] == ["image"]
    (tmp_path / "no").mkdir()
    broken = Session(tmp_path / "no", ASKED, {}, tmp_path / "y.answers", 4, processes=2)
    with pytest.raises((UserError, CheckFailed), match="no"):
        broken.run(lambda done, count: None)


def test_processes_of_accelerate_launch_share_the_images(tmp_path: Path, random_checkpoint: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    common = ["eval", str(random_checkpoint), "--scenes", "2", "--threads", "1", "--max-new-tokens", "3"]
    assert CliRunner().invoke(app, [*common, "--out", str(tmp_path / "one.jsonl")]).exit_code == 0
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "pocketvlm"]
    settings = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    out = ["--out", str(tmp_path / "two.jsonl")]
    done = subprocess.run([*launch[:3], *settings, *launch[3:], *common, *out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, two = (
        [replace(sample, ms=0, vision_ms=0) for sample in read_records(tmp_path / f"{name}.jsonl")]
        for name in ("one", "two")
    )
    assert one == two and done.stdout.count("average") == 1
    assert not (tmp_path / "two.jsonl.answers").exists()


def test_each_process_has_a_gpu_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl"):
        (tmp_path / name).touch()
    monkeypatch.setattr(module, "DEVICE_FILES", tmp_path)
    monkeypatch.setattr(module, "answer_shard", lambda *arguments: None)
    for visible, given in ((None, ["0", "1", "0"]), ("5,7", ["5", "7", "5"]), ("", ["", "", ""])):
        found = []
        for number in range(3):
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
            if visible is not None:
                monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
            module._worker(tmp_path, [], 1, 1, tmp_path, number, None, None)
            found.append(os.environ["CUDA_VISIBLE_DEVICES"])
        assert found == given


def test_our_records_are_scored_for_the_benchmarks_asked(tmp_path: Path) -> None:
    samples = [grade(question("gqa", "red", "1"), "red"), grade(question("textvqa", "stop", "1"), "go")]
    save_answers(samples, tmp_path / "x.jsonl")
    call = ["eval", "--predictions", str(tmp_path / "x.jsonl"), "--json"]
    shown = [CliRunner().invoke(app, [*call, *more]).stdout for more in ([], ["--tasks", "gqa"])]
    assert [list(json.loads(each)["accuracy"]["tasks"]) for each in shown] == [["gqa", "textvqa"], ["gqa"]]
    assert isinstance(CliRunner().invoke(app, [*call, "--tasks", "pope"]).exception, UserError)
