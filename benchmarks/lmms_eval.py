"""Asks a checkpoint through lmms-eval and through this project: `python -m benchmarks.lmms_eval CHECKPOINT --data DIR`.

Needs lmms-eval and decord, which this project does not install. lmms-eval's own `llava_hf` loads the checkpoint with
transformers' Auto classes and answers ScienceQA questions with a picture as a local task; the answers are compared
with those of `pocketvlm eval`.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from device_bench.evaluate import evaluate, questions
from device_bench.subset import subset
from device_bench.tasks.base import BenchQuestion, Sample
from vlm.errors import UserError
from vlm.runtimes import open_runtime

FAMILY, NEW_TOKENS, TASK = "scienceqa", 16, "pocketvlm_local"
# LLaVA tokenizes each side of the image alone, so that a blank stands before the line break; not every tokenizer of
# transformers puts it there by itself.
BLANK = "\u2581"
YAML = f"""task: {TASK}
dataset_path: json
dataset_kwargs:
  data_files: {{test: FILE}}
test_split: test
output_type: generate_until
doc_to_visual: !function task.pictures
doc_to_text: !function task.prompt
doc_to_target: truth
process_results: !function task.results
generation_kwargs: {{max_new_tokens: {NEW_TOKENS}, temperature: 0, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
FUNCTIONS = '''"""Functions that the task names."""

from PIL import Image


def pictures(doc):
    return [Image.open(doc["picture"]).convert("RGB")]


def prompt(doc, lmms_eval_specific_kwargs=None):
    return doc["prompt"]


def results(doc, results):
    return {"exact_match": float(results[0] == doc["truth"])}
'''


def write_task(asked: list[BenchQuestion], folder: Path) -> None:
    """Write questions as a task of lmms-eval."""
    rows = [{"picture": one.image, "prompt": one.prompt, "truth": one.truth} for one in asked]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task.py").write_text(FUNCTIONS)
    (folder / "task.yaml").write_text(YAML.replace("FILE", str(folder / "questions.jsonl")))


def through_lmms_eval(checkpoint: Path, folder: Path) -> list[str]:
    """The answers of lmms-eval's llava_hf, in the order of the questions.

    Raises:
        UserError: lmms-eval is not installed.
    """
    from transformers import AutoTokenizer

    import vlm.models.mobilevlm as mobilevlm

    try:
        from lmms_eval.evaluator import simple_evaluate
        from lmms_eval.models.simple import llava_hf
        from lmms_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(f"{error}. Type: pip install lmms-eval decord, in an environment of its own.") from error
    llava_hf.model_map[mobilevlm.MobileVlmConfig.model_type] = mobilevlm.MobileVlmForConditionalGeneration
    if AutoTokenizer.from_pretrained(checkpoint).tokenize("<image>\n")[1] != BLANK:
        spaced = "message['content'].replace('<image>\\n', '<image> \\n')"
        llava_hf.VICUNA_CHAT_TEMPLATE = llava_hf.VICUNA_CHAT_TEMPLATE.replace("message['content']", spaced)
    found: Any = simple_evaluate(
        model="llava_hf",
        force_simple=True,
        model_args=f"pretrained={checkpoint},device=cpu,device_map=cpu",
        tasks=[TASK],
        task_manager=TaskManager(include_path=str(folder), model_name="llava_hf"),
        batch_size=1,
        log_samples=True,
    )
    rows = sorted(found["samples"][TASK], key=lambda row: int(row["doc_id"]))
    return [str(row["filtered_resps"][0]).strip() for row in rows]


def compare(asked: list[BenchQuestion], theirs: list[str], ours: list[Sample]) -> int:
    """Print how many answers are equal and the first few that are not; returns how many are not."""
    differing = [
        f"  {one.id}: {text!r}, here {sample.answer!r}"
        for one, text, sample in zip(asked, theirs, ours, strict=True)
        if text != sample.answer
    ]
    print(f"{len(asked) - len(differing)} of {len(asked)} answers equal", *differing[:5], sep="\n")
    return len(differing)


def main() -> None:
    """Ask both ways and print what differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder with ScienceQA's questions and pictures")
    parser.add_argument("--limit", type=int, default=100)
    options = parser.parse_args()
    try:
        runtime = open_runtime(options.checkpoint, 1)
        asked = subset([one for one in questions([FAMILY], 1, options.data) if one.image], options.limit, 0)
        room = runtime.facts.context_length - NEW_TOKENS
        asked = [one for one in asked if len(runtime.prompt(one.prompt)) <= room]
        with tempfile.TemporaryDirectory() as folder:
            write_task(asked, Path(folder))
            theirs = through_lmms_eval(options.checkpoint, Path(folder))
    except UserError as error:
        sys.exit(f"{error}")
    compare(asked, theirs, evaluate(runtime, asked, NEW_TOKENS))


if __name__ == "__main__":
    main()
