"""benchmarks.peers: every exporter's script speaks one protocol, and one that fails is named in the table."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from benchmarks.peers import child
from benchmarks.peers.__main__ import HERE, Tool, measure, tools


def test_a_prompt_is_read_at_once_and_the_rest_one_by_one(tmp_path: Path) -> None:
    read: list[list[int]] = []

    def step(ids: list[int]) -> np.ndarray:
        read.append(ids)
        return np.full(4, ids[-1], np.float64)

    found = child.read(step, [5, 6, 7, 8, 9], 3, tmp_path / "logits.npy")
    assert read == [[5, 6, 7], [8]]  # nothing follows the last token
    np.testing.assert_array_equal(np.load(tmp_path / "logits.npy")[:, 0], [7, 8])
    assert found["prefill"] > 0 and found["decode"] > 0


def test_an_exporter_that_fails_is_a_row_with_its_last_line(tmp_path: Path) -> None:
    tool = Tool("optimum-onnx fp32", "optimum_onnx.py", sys.executable, {})
    row = measure(tool, tmp_path / "no-model", tmp_path, torch.zeros(2, 4), 1)
    assert row.problem and row.size_mb is None and row.kl is None


def test_only_tools_that_were_given_are_run() -> None:
    assert [tool.name for tool in tools(None, None, None, None, ["gguf:q4_0"])] == ["pocketvlm gguf:q4_0"]
    everything = tools(Path("a"), Path("b"), Path("c"), Path("d"), [])
    assert [(HERE / tool.script).is_file() for tool in everything] == [True] * 4


def test_the_scripts_need_nothing_of_this_project(tmp_path: Path) -> None:
    """They run in environments that have only their exporter."""
    code = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); import child, genai, optimum_executorch, optimum_onnx\n"
        "print(json.dumps([n for n in sys.modules if n.split('.')[0] in ('vlm', 'export', 'pocketvlm', 'torch')]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(HERE)], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60
    )
    assert json.loads(done.stdout) == []
