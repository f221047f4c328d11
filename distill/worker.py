"""The process that trains one student: `python -m distill.worker CONFIG.yaml OUT`. Prints progress as JSON lines."""

import json
import os
import sys
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from distill.config import Data, DistillConfig, Stage
from distill.features import TowerFeatures
from distill.history import reports, rows_of
from distill.model import AlignKD
from distill.teacher import Teacher
from distill.trainer import DistillTrainer, ProgressLines, training_arguments
from vlm.data.collator import Encoder, Row, collate
from vlm.data.records import Record, read_llava, scene_captions, scene_conversations
from vlm.errors import UserError
from vlm.folders import finished_folder, write_atomic
from vlm.manifest import Preprocessing
from vlm.models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from vlm.models.mobilevlm import MobileVlmForConditionalGeneration, tiny_config
from vlm.tokenizer import Tokenizer

FEATURES_KEPT = 8192  # images whose tower features stay in memory: 74 KB each at 576 patches of 64 numbers


class Rows(torch.utils.data.Dataset[tuple[str, Row]]):
    """Records of a stage as (key, ids), tokenized when asked for."""

    def __init__(self, data: Data, encoder: Encoder) -> None:
        self.encoder = encoder
        if data.kind == "llava":
            self.records = read_llava(Path(data.records or ""), Path(data.images or ""), data.template or "v1")
        else:
            make = scene_captions if data.kind == "scene_captions" else scene_conversations
            self.records = make(data.start, data.count)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[str, Row]:
        record: Record = self.records[index]
        return record.id, self.encoder.row(record)


def batch_of(items: list[tuple[str, Row]]) -> dict[str, Tensor | list[str]]:
    """Collate rows; image references and record keys travel as lists."""
    rows = [row for _, row in items]
    images = [row.image for row in rows if row.image is not None]
    return {**collate(rows), "images": images, "keys": [key for key, _ in items]}


def train(config: DistillConfig, out: Path) -> None:
    """Train all stages into the folder `out`; what an interrupted run left in `<out>.partial` is used."""
    partial = out.with_name(out.name + ".partial")
    same = (partial / "config.yaml").is_file() and (partial / "config.yaml").read_text() == config.dump()
    with finished_folder(out, resume=same) as folder:
        write_atomic(folder / "config.yaml", config.dump())
        work = folder / "work"
        started = time.monotonic()
        torch.set_num_threads(config.threads)
        module, tokenizer_folder, encoder = build(config)
        rows, done = [], 0
        total = sum(stage.steps for stage in config.stages)
        for stage in config.stages:
            rows += rows_of(train_stage(module, config, stage, encoder, work, done, total), stage.name, done)
            done += stage.steps
        save_checkpoint(module.student, tokenizer_folder, folder)
        history = {
            "seed": config.seed,
            "seconds": round(time.monotonic() - started, 1),
            "steps": done,
            "terms": ["sup", *module.terms],
            "rows": rows,
            "reports": reports(rows),
        }
        (folder / "history.json").write_text(json.dumps(history))
        for path in sorted(work.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        work.rmdir()


def build(config: DistillConfig) -> tuple[AlignKD, Path, Encoder]:
    """Build module, tokenizer folder and encoder from a configuration."""
    teacher = load_checkpoint(Path(config.teacher)) if config.teacher else None
    student, tokenizer_folder = build_student(config, teacher)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    encoder = Encoder(
        tokenizer=Tokenizer(tokenizer_folder / "tokenizer.json"),
        bos_id=tokenizer.bos_token_id,
        eos_id=tokenizer.eos_token_id,
        image_token_id=student.config.image_token_id,
        image_tokens=student.config.image_seq_length,
        max_length=student.config.text_config.max_position_embeddings,
    )
    size = student.config.vision_config.image_size
    tower = TowerFeatures(student, teacher.preprocessing if teacher else Preprocessing(size=size), FEATURES_KEPT)
    return AlignKD(student, Teacher(teacher.model) if teacher else None, config, tower), tokenizer_folder, encoder


def build_student(config: DistillConfig, teacher: Checkpoint | None) -> tuple[LlavaForConditionalGeneration, Path]:
    """The student, its vision tower taken over, its decoder random unless a checkpoint is given; and its tokenizer."""
    if isinstance(config.student, str):
        checkpoint = load_checkpoint(Path(config.student))
        return checkpoint.model, checkpoint.folder
    from transformers import CLIPVisionModel

    folder = Path(config.vision or config.teacher or "")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if config.vision:
        tower = CLIPVisionModel.from_pretrained(folder)
    else:
        assert teacher is not None  # guaranteed by DistillConfig
        tower = teacher.model.model.vision_tower
    sizes = config.student.model_dump()
    spread = sizes.pop("initializer_range") or sizes["hidden_size"] ** -0.5
    text = {**sizes, "initializer_range": spread, "vocab_size": len(tokenizer), "pad_token_id": None}
    vision = tower.config.to_dict()
    torch.manual_seed(config.seed)
    student = MobileVlmForConditionalGeneration(tiny_config(vision, text, tokenizer.convert_tokens_to_ids("<image>")))
    student.model.vision_tower.load_state_dict(tower.state_dict())
    return student, folder


def train_stage(
    module: AlignKD, config: DistillConfig, stage: Stage, encoder: Encoder, work: Path, done: int, total: int
) -> list[dict]:
    """Train one stage and return the Trainer's log; a finished stage is loaded, an interrupted one goes on."""
    finished = work / f"{stage.name}.safetensors"
    log = work / f"{stage.name}.json"
    if log.is_file():
        module.load_state_dict(load_file(finished))
        return list(json.loads(log.read_text()))
    checkpoints = work / stage.name
    trainer = DistillTrainer(
        module,
        config,
        stage,
        args=training_arguments(config, stage, checkpoints),
        train_dataset=Rows(stage.data, encoder),
        data_collator=batch_of,
        callbacks=[ProgressLines(stage.name, done, total)],
    )
    trainer.train(resume_from_checkpoint=_last_complete(checkpoints))
    save_file({name: value.contiguous() for name, value in module.state_dict().items()}, finished)
    write_atomic(log, json.dumps(trainer.state.log_history))
    return list(trainer.state.log_history)


def _last_complete(checkpoints: Path) -> str | None:
    """The newest checkpoint whose trainer_state.json, written last, is whole."""
    found = sorted(checkpoints.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]), reverse=True)
    for folder in found:
        try:
            json.loads((folder / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        return str(folder)
    return None


def _stop_with_parent() -> None:
    """End this process when stdin closes, that is when the process that started it is gone."""
    sys.stdin.read()
    os._exit(1)


def main() -> int:
    """Entry point; exit code 2 for what the user must change."""
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    file, out = Path(sys.argv[1]), Path(sys.argv[2])
    try:
        train(DistillConfig.load(file), out)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
