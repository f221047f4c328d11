"""Two processes train what one does, and a run of which a process was killed goes on to the same weights.

Everything runs on the CPU over the loopback, each process with one thread.
"""

import importlib.util
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from distill import run as running
from distill.config import DistillConfig
from distill.run import run
from distill.training import worker
from distill.training.launch import command
from tests.llava_data import record, write
from tests.tiny import save_random_checkpoint
from vlm.errors import UserError

STEPS = 20
Trained = tuple[DistillConfig, Path]  # and the student's folder
# ZeRO-3 leaves tensors below 100,000 numbers whole in every process, which are all of so small a model.
WHOLE = {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
SETTINGS: dict[int, dict[str, int]] = {2: {}, 3: {**WHOLE, "stage3_prefetch_bucket_size": 1000}}
NEEDS_DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install -e '.[distill]'"
)


def _config(teacher: Path, **changes: object) -> DistillConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    data = teacher.parent
    stage = {
        "name": "train",
        "data": {"kind": "llava", "records": str(data / "records.jsonl"), "images": str(data), "cache": str(data)},
        "steps": STEPS,
        "batch_size": 4,
        "learning_rate": 1e-3,
    }
    tree = {
        "teacher": str(teacher),
        "student": {**sizes, "num_attention_heads": 2, "num_key_value_heads": 2},
        "stages": [stage],
        "attention": {},
        "vision_tokens": {},
        "logits": {"distance": "forward_kl", "weight": {"learned": 1.0}},
        "precision": "fp32",
        "log_steps": 1,
        "probe_steps": 2,
        "stop_dead_terms": False,
        "checkpoint_steps": 8,
        **changes,
    }
    return DistillConfig.parse(tree, "test")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random teacher; beside it records, half of them text alone, so that some batches have no image."""
    folder = tmp_path_factory.mktemp("teacher")
    write(folder, [record(number, "red " * (number % 3 + 1), images=number % 2) for number in range(16)])
    return save_random_checkpoint(folder / "checkpoint")


@pytest.fixture(scope="module")
def alone(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student trained by one process."""
    out = tmp_path_factory.mktemp("alone") / "student"
    worker.train(_config(teacher), out)
    return out


@pytest.fixture(scope="module", params=[2, 3])
def zero(request: pytest.FixtureRequest, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    """A student trained by two processes with ZeRO-2 or ZeRO-3, without interruption."""
    config = _config(teacher, processes=2, zero={"stage": request.param, "settings": SETTINGS[request.param]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "command", _looking)
        folder = tmp_path_factory.mktemp("zero")
        yield config, run(config, folder)


def _looking(config: DistillConfig, file: Path, out: Path) -> list[str]:
    """The command of a training, of tests.looking_worker."""
    return [part.replace("distill.training.worker", "tests.looking_worker") for part in command(config, file, out)]


def _curve(student: Path) -> list[list[float]]:
    return list(json.loads((student / "history.json").read_text())["curve"])


def _equal(one: Path, other: Path) -> None:
    assert len(_curve(one)) == STEPS
    for (step, expected), (_, found) in zip(_curve(one), _curve(other), strict=True):
        assert found == pytest.approx(expected, abs=1e-4), step
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    for name, value in ours.items():
        assert torch.allclose(value, theirs[name], atol=1e-4), name


def test_two_processes_train_what_one_does(teacher: Path, alone: Path, tmp_path: Path) -> None:
    _equal(alone, run(_config(teacher, processes=2), tmp_path))


def test_accumulation_trains_what_whole_batches_do(teacher: Path, alone: Path, tmp_path: Path) -> None:
    config = _config(teacher)
    stage = config.stages[0].model_copy(update={"gradient_accumulation": 4})
    worker.train(config.model_copy(update={"stages": [stage]}), tmp_path / "student")
    _equal(alone, tmp_path / "student")


@NEEDS_DEEPSPEED
def test_zero_trains_what_one_process_does(alone: Path, zero: Trained) -> None:
    config, student = zero
    _equal(alone, student)
    assert config.zero
    seen = json.loads((student.parent / "seen.json").read_text())
    assert seen["steps"] == STEPS and seen["held_at_rebuild"] == 0
    whole = [name for name in seen["whole"] if "log_weight" not in name]  # a single number cannot be split
    assert (whole == []) == (config.zero.stage == 3)  # in a process, between two steps


@NEEDS_DEEPSPEED
def test_a_killed_process_is_said_and_the_run_goes_on_to_the_same_weights(zero: Trained, tmp_path: Path) -> None:
    config, straight = zero
    killed = threading.Event()

    def kill(share: float, _: str) -> None:
        if share >= 0.5 and not killed.is_set():
            killed.set()
            for process in psutil.Process().children(recursive=True):
                if str(tmp_path) in " ".join(process.cmdline()) and process.environ().get("RANK") == "1":
                    process.kill()

    with pytest.raises(UserError, match="a training process was killed"):
        run(config, tmp_path, kill)
    assert killed.is_set() and not (tmp_path / "student").exists()
    _same_to_the_bit(straight, run(config, tmp_path))


@NEEDS_DEEPSPEED
@pytest.mark.parametrize("level", [2, 3])
def test_weights_that_only_the_optimizer_has_in_float32_are_saved(level: int, teacher: Path, tmp_path: Path) -> None:
    config = _config(teacher, precision="bf16", zero={"stage": level}, logits=None, attention=None)
    stage = config.stages[0].model_copy(update={"steps": 2})
    weights = load_file(run(config.model_copy(update={"stages": [stage]}), tmp_path) / "model.safetensors")
    before = load_file(teacher / "model.safetensors")
    assert not torch.equal(weights["lm_head.weight"], weights["lm_head.weight"].bfloat16().float())
    for name in (name for name in weights if "vision_tower" in name):
        assert torch.equal(weights[name], before[name])


@NEEDS_DEEPSPEED
def test_a_setting_that_deepspeed_does_not_know_is_refused_before_anything_is_done(
    teacher: Path, tmp_path: Path
) -> None:
    config = _config(teacher, zero={"stage": 3, "settings": {"stage3_prefetch": 1}})
    with pytest.raises(UserError, match=r"zero\.settings: stage3_prefetch: 1 found, which DeepSpeed"):
        worker.train(config, tmp_path / "student")
    assert not list(tmp_path.iterdir())


def _same_to_the_bit(straight: Path, resumed: Path) -> None:
    assert _curve(straight) == _curve(resumed)
    expected, found = (load_file(folder / "model.safetensors") for folder in (straight, resumed))
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


def test_a_batch_that_cannot_be_divided_is_refused(teacher: Path, tmp_path: Path) -> None:
    config = _config(teacher)
    stage = config.stages[0].model_copy(update={"gradient_accumulation": 3})
    with pytest.raises(UserError, match="batch_size 4 found, a multiple of 1 processes x gradient_accumulation 3"):
        worker.train(config.model_copy(update={"stages": [stage]}), tmp_path / "student")
