"""Configuration of the export stage."""

from pydantic import Field, field_validator, model_validator

from vlm.config import Config
from vlm.errors import UserError
from vlm.manifest import artifact_folder
from vlm.registry import require

DEFAULT_TARGETS = (
    "onnx:fp32",
    "onnx:int4",
    "executorch:fp32",
    "executorch:8da4w",
    "coreml:fp16",
    "coreml:int4",
    "gguf:f16",
    "gguf:q4_0",
)


class ExportConfig(Config):
    """Which artifacts to write and how to prove them.

    Attributes:
        targets: "<format>:<precision>" each, for example "onnx:int4"; none of them twice.
        context_length: longest sequence an artifact takes, prompt with vision tokens and answer, in tokens.
        probes: questions on which parity is measured; the worst one counts.
        allow_drift: keep an artifact that fails parity; its manifest and the report say so.
        threads: CPU threads while parity is measured.
        calibration_scenes: pictures with questions and answers for whose activations 4-bit weights are rounded (GPTQ);
            0 rounds to the nearest.
        calibration_records: LLaVA-format file (.json list or .jsonl) whose first records are looked at instead of the
            built-in training scenes.
        calibration_images: the folder that its image paths begin at.
        force: start also where the forecast says that memory or disk will not do.
    """

    targets: list[str] = Field(default=list(DEFAULT_TARGETS), min_length=1)
    context_length: int = Field(512, ge=8)
    probes: int = Field(16, ge=1)
    allow_drift: bool = False
    threads: int = Field(2, ge=1)
    calibration_scenes: int = Field(16, ge=0)
    calibration_records: str | None = None
    calibration_images: str | None = None
    force: bool = False

    @field_validator("targets")
    @classmethod
    def _formats_exist_and_folders_differ(cls, targets: list[str]) -> list[str]:
        for number, target in enumerate(targets):
            require("export.formats", target.partition(":")[0])
            if artifact_folder(target) in map(artifact_folder, targets[:number]):
                raise UserError(f"target {target!r}: {artifact_folder(target)} is asked for twice. Give it once.")
        return targets

    @model_validator(mode="after")
    def _records_have_images(self) -> "ExportConfig":
        if (self.calibration_records is None) != (self.calibration_images is None):
            raise UserError("calibration_records and calibration_images: one found, both expected. Give both or none.")
        return self
