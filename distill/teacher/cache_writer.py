"""Writing the offline teacher: a size forecast, shards by any number of processes, a check against the live teacher."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from distill.config import DistillConfig, Stage
from distill.data.rows import Key, Rows
from distill.features import TowerFeatures
from distill.pair import Facts
from distill.probe import Positions, find_positions
from distill.spoken import compared, read_of_teacher
from distill.teacher.cache import MANIFEST, TEACHER, CachedTeacher, Entry, Shard, again, shard_name, tensors_of
from distill.teacher.cache_key import blocks_of, compare, identity
from distill.teacher.live import Teacher
from distill.teacher.signals import Batch
from distill.training.processes import Processes
from vlm.errors import CheckFailed, UserError
from vlm.folders import locked, write_atomic

STARTED = "started.json"  # the identity of a cache that is being written
TOLERANCE = 0.01  # relative distance of an output from the live teacher's: float16 has 0.0005
SAMPLE = 64  # records that the forecast looks at
HALF = torch.float16

OnShard = Callable[[int, int], None]  # shards done and shards in all, of this process


class CacheWriter:
    """Writes the teacher's outputs for every record of every stage; what an interrupted run wrote stays.

    Args:
        config: the run, with a cache.
        teacher: the live one.
        tower: image references -> patch features [I, P, vision_dim].
        image_token_id: the placeholder.
        max_length: the student's context in tokens.
    """

    def __init__(
        self,
        config: DistillConfig,
        teacher: Teacher,
        tower: TowerFeatures,
        image_token_id: int,
        max_length: int,
    ) -> None:
        assert config.cache is not None
        self.config, self.cache, self.teacher, self.tower = config, config.cache, teacher, tower
        self.image_token_id = image_token_id
        self.folder = Path(config.cache.folder)
        self.identity = identity(config, max_length, tower.preprocessing)

    def write(
        self, facts: Facts, probe: Tensor, data: list[tuple[Stage, Rows]], who: Processes, on_shard: OnShard
    ) -> CachedTeacher:
        """Write this process's shards, wait for the others', check the whole.

        Args:
            facts: of the teacher.
            probe: the tower's features of a fixed picture, by which a student's tower is recognised.
            data: the stages' rows.
            who: process number r of n writes the shards r, r + n, ...
            on_shard: told after each shard.
        Raises:
            UserError: the disk does not hold it, or an unfinished cache of something else is there.
            CheckFailed: what was written is not what the live teacher says.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / ".lock") if who.first else nullcontext():
            if who.first and not (self.folder / MANIFEST).is_file():
                self._start(data)
            who.wait()
            if (self.folder / MANIFEST).is_file():  # another run wrote it while this one waited
                return CachedTeacher(self.folder)
            numbered = [(rows, stage, n) for stage, rows in data for n in range(self._shards(rows))]
            own = numbered[who.rank :: who.count]
            for done, (rows, stage, number) in enumerate(own, 1):
                if not (self.folder / shard_name(stage.name, number)).is_file():
                    self._write_shard(rows, stage, number, who.count)
                on_shard(done, len(own))
            who.wait()
            if who.first:
                self._finish(facts, probe, data, who.count)
            who.wait()
        return CachedTeacher(self.folder)

    def forecast(self, data: list[tuple[Stage, Rows]]) -> int:
        """Bytes that the whole cache will take, from the sizes of some records of each stage."""
        total = 0
        for _, rows in data:
            step = max(1, len(rows) // SAMPLE)
            looked = range(0, len(rows), step)
            sizes = [self._bytes(inputs) for i in looked if (inputs := _inputs(rows, [i])) is not None]
            total += round(sum(sizes) * len(rows) / len(looked))
        if self.cache.kind == "exact":
            total += 2 * self.teacher.model.config.text_config.vocab_size * self.teacher.width
        return total

    def _bytes(self, inputs: dict[str, Any]) -> int:
        wanted = int(self._wanted(inputs).sum())
        if self.cache.kind == "compact":
            return wanted * self.cache.top_k * 6
        numbers = wanted * self.teacher.width * self.config.speaks
        if self.config.vision_tokens:
            numbers += int((inputs["input_ids"] == self.image_token_id).sum()) * self.teacher.width
        for _, block, layers in blocks_of(self.config):
            where = self._positions(inputs, block)
            numbers += len(layers) * self.teacher.heads * where.rows.shape[1] * where.columns.shape[1]
        return 2 * numbers

    def _start(self, data: list[tuple[Stage, Rows]]) -> None:
        if (self.folder / STARTED).is_file():
            compare(self.folder, self.identity, STARTED)
        written = sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))
        needed, free = self.forecast(data) - written, shutil.disk_usage(self.folder).free
        if needed > free and not self.cache.force:
            raise UserError(
                f"{self.folder}: the {self.cache.kind} cache of the teacher's outputs needs about {needed / 1e9:.1f} "
                f"GB more, the disk has {free / 1e9:.1f} GB free. Free some space, name another folder in "
                "cache.folder, choose kind: compact, or write it all the same with cache.force=true."
            )
        write_atomic(self.folder / STARTED, json.dumps({"identity": self.identity, "forecast_bytes": needed}))

    def _shards(self, rows: Rows) -> int:
        return -(-len(rows) // self.cache.shard_records)

    def _groups(self, rows: Rows, stage: Stage, number: int, processes: int) -> Iterator[list[int]]:
        """The records of a shard, as many at a time as each process of the training has in memory."""
        start = number * self.cache.shard_records
        stop = min(start + self.cache.shard_records, len(rows))
        size = max(1, stage.per_process(processes))
        for first in range(start, stop, size):
            yield list(range(first, min(first + size, stop)))

    def _write_shard(self, rows: Rows, stage: Stage, number: int, processes: int) -> None:
        file = self.folder / shard_name(stage.name, number)
        tensors: dict[str, Tensor] = {}
        for group in self._groups(rows, stage, number, processes):
            for (_, index), entry in self.outputs(rows, group).items():
                tensors |= tensors_of(index, entry)
        partial = file.with_suffix(".partial")
        save_file(tensors, partial)
        partial.replace(file)

    @torch.no_grad()
    def outputs(self, rows: Rows, indices: list[int]) -> dict[Key, Entry]:
        """The live teacher's outputs for some records, in one batch."""
        inputs = _inputs(rows, indices)
        if inputs is None:
            return {}
        device = self.teacher.model.device
        inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
        enabled = self.config.precision != "fp32"
        dtype = torch.float16 if self.config.precision == "fp16" else torch.bfloat16
        with torch.autocast(device.type, dtype, enabled=enabled):
            batch = Batch(
                input_ids=inputs["input_ids"],
                position_ids=inputs["position_ids"],
                segments=inputs["segments"],
                visible=inputs["attention_mask"],
                images=inputs["images"],
                features=self.tower(inputs["images"], inputs.get("pixels")),
                keys=inputs["keys"],
            )
            return self._split(batch, self._wanted(inputs), inputs)

    def _split(self, batch: Batch, wanted: Tensor, inputs: dict[str, Any]) -> dict[Key, Entry]:
        """The batch's outputs by record; a row is one record."""
        keys = batch.keys
        none = [None] * len(keys)
        answers: list[Any] = none
        ids: list[Any] = none
        tokens: list[Any] = none
        if self.config.speaks:
            states = self.teacher.answers(batch, wanted)
            counts = wanted.sum(-1).tolist()
            if self.cache.kind == "compact" and self.config.logits:
                log_p = (states.head(states.states).float() / self.config.logits.temperature).log_softmax(-1)
                best = log_p.topk(min(self.cache.top_k, log_p.shape[-1]), dim=-1)
                answers, ids = list(best.values.split(counts)), list(best.indices.int().split(counts))
            else:
                answers = list(states.states.split(counts))
        if self.config.vision_tokens and self.cache.kind == "exact":
            found = self.teacher.vision_tokens(batch)  # E_T, [I, V, D_T]; I is 0 for text alone
            images = (batch.input_ids == self.image_token_id).sum(-1) // found.shape[1]  # [B]
            tokens = list(found.split(images.tolist()))
        blocks = self._blocks(batch, inputs) if self.cache.kind == "exact" else [{} for _ in keys]
        return {
            key: Entry(_half(answers[i]), None if ids[i] is None else ids[i].cpu(), _half(tokens[i]), blocks[i])
            for i, key in enumerate(keys)
        }

    def _blocks(self, batch: Batch, inputs: dict[str, Any]) -> list[dict[str, list[Tensor]]]:
        found: list[dict[str, list[Tensor]]] = [{} for _ in batch.keys]
        for name, block, layers in blocks_of(self.config):
            where = self._positions(inputs, block)
            whole = self.teacher.attention(batch, layers, where)  # [B, H_T, M, V] each
            sizes = zip(where.row_mask.sum(-1).tolist(), where.column_mask.sum(-1).tolist(), strict=True)
            for row, (height, width) in enumerate(sizes):
                found[row][name] = [layer[row, :, :height, :width].to("cpu", HALF) for layer in whole]
        return found

    def _wanted(self, inputs: dict[str, Any]) -> Tensor:
        """Where the teacher's answers are read, bool [B, N]."""
        labels, segments = inputs["labels"], inputs["segments"]
        places = compared(self.config, inputs["input_ids"], labels, segments, self.image_token_id)
        return read_of_teacher(places) if places else torch.zeros_like(labels, dtype=torch.bool)

    def _positions(self, inputs: dict[str, Any], block: Any) -> Positions:
        visible = inputs.get("attention_mask")
        return find_positions(inputs["input_ids"], inputs["segments"], visible, self.image_token_id, block)

    def _finish(self, facts: Facts, probe: Tensor, data: list[tuple[Stage, Rows]], processes: int) -> None:
        """Write what is there once, compare a sample with the live teacher, declare the cache complete."""
        weights = {"probe": probe.float().cpu().contiguous()}
        if self.cache.kind == "exact" and self.config.speaks:
            weights["head"] = self.teacher.model.lm_head.weight.to("cpu", HALF).contiguous()
        save_file(weights, self.folder / TEACHER)
        manifest = {
            "schema": 1,
            "identity": self.identity,
            "facts": asdict(facts),
            "heads": self.teacher.heads,
            "width": self.teacher.width,
            "shard_records": self.cache.shard_records,
            "worst_relative_difference": self._check(data, processes),
        }
        write_atomic(self.folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        (self.folder / STARTED).unlink()

    def _check(self, data: list[tuple[Stage, Rows]], processes: int) -> float:
        """Largest relative distance of a written output from the live teacher's, over some batches of each stage."""
        worst = 0.0
        for stage, rows in data:
            shards = self._shards(rows)
            chosen = sorted({shards * i // self.cache.check_batches for i in range(self.cache.check_batches)})
            for number in chosen:
                groups = list(self._groups(rows, stage, number, processes))
                group = groups[number % len(groups)]
                worst = max(worst, self._difference(rows, stage, number, group))
        return worst

    def _difference(self, rows: Rows, stage: Stage, number: int, group: list[int]) -> float:
        file = self.folder / shard_name(stage.name, number)
        shard, worst = Shard(file), 0.0
        for (_, index), live in self.outputs(rows, group).items():
            written = tensors_of(index, shard.entry(index))
            for name, value in tensors_of(index, live).items():
                if name.endswith("/ids"):  # equally likely tokens may change places
                    continue
                distance = float((written[name].float() - value.float()).norm() / value.float().norm().clamp(min=1e-6))
                if not distance <= TOLERANCE:  # a NaN neither
                    raise CheckFailed(
                        f"{file}: {name} is {distance:.2%} away from what the teacher says now, at most "
                        f"{TOLERANCE:.0%} expected. {again(self.folder)}"
                    )
                worst = max(worst, distance)
        return worst


def _inputs(rows: Rows, indices: list[int]) -> dict[str, Any] | None:
    """The collated records that have a turn; None if none has."""
    items = [rows.item(index) for index in indices]
    kept = [(key, row) for key, row in items if row.turns]
    return rows.batch(kept) if kept else None


def _half(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.to("cpu", HALF)
