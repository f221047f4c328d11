"""A precision is a preset with exceptions, and what is misspelt is named."""

import pytest

from export.precision import COMPONENTS, resolve, uniform
from export.run import parse_target
from vlm.errors import UserError

PRESETS = {"fp32": uniform("fp32"), "int4": uniform("int4", vision="int8")}
STORAGES = dict.fromkeys(COMPONENTS, ("fp32", "fp16", "int8", "int4")) | {"vision": ("fp32", "fp16", "int8")}


def test_exceptions_change_only_the_components_they_name() -> None:
    assert resolve("int4,vision=fp16,head=int8", PRESETS, STORAGES) == {
        "vision": "fp16", "projector": "int4", "embedding": "int4", "decoder": "int4", "head": "int8",
    }  # fmt: skip
    assert resolve("int4", PRESETS, STORAGES) == PRESETS["int4"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int5", r"precision 'int5' is unknown\. Did you mean 'int4'"),
        ("int4,visoin=fp16", r"component 'visoin' is unknown\. Did you mean 'vision'"),
        ("int4,vision=int4", r"storage of vision 'int4' is unknown\. Did you mean 'int8'"),
        ("int4,vision", "'vision' found, COMPONENT=STORAGE expected, such as vision=fp32"),
        ("int4,vision=", "'vision=' found, COMPONENT=STORAGE expected"),
        ("int4,", "'' found, COMPONENT=STORAGE expected"),
        ("int4,vision=fp16,vision=int8", "vision is given twice"),
        ("", "no precision was given. Known: fp32, int4"),
    ],
)
def test_what_is_misspelt_is_named_with_a_suggestion(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve(text, PRESETS, STORAGES)


def test_folders_are_named_without_signs() -> None:
    pytest.importorskip("onnxruntime")
    assert parse_target("onnx:int4,vision=fp16").name == "onnx-int4-vision-fp16"
