"""Two devices of one model are two devices, and a table of medians says whose they are."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from device_bench.gate import _counterpart
from device_bench.report.devices import _devices, _titles
from device_bench.telemetry import device_id
from pocketvlm.commands.bench import MEDIANS, show

PHONE = {"kind": "phone", "name": "Acme Phone 9", "soc": "SM0000", "os": "Android 16"}


def benches(*ids: str) -> list[dict[str, Any]]:
    return [{"device": {**PHONE, "id": each}} for each in ids]


def test_a_serial_number_cannot_be_read_from_an_id() -> None:
    found = device_id("R5CT1234567\0\n")
    assert found == device_id("R5CT1234567") != device_id("R5CT1234568")
    assert found and re.fullmatch(r"[0-9a-f]{12}", found) and device_id("\n") is None


def test_the_gate_compares_each_of_two_phones_with_itself() -> None:
    both = benches("a1", "b2")
    for bench in both:
        assert _counterpart(bench["device"], both) is bench
    assert _counterpart({**PHONE, "id": "c3"}, both) is None
    assert _counterpart({**PHONE, "id": "c3"}, both[1:]) is both[1]


def test_the_report_names_two_phones_of_one_model_apart() -> None:
    report = {"artifacts": [{"run": "lab", "benches": benches("a1", "b2", "a1")}]}
    devices = _devices(report)
    assert _titles(devices.values()) == ["Acme Phone 9 (a1)", "Acme Phone 9 (b2)"]
    assert [len(measured) for measured in devices.values()] == [2, 1]


@pytest.mark.parametrize("kind", ["phone", "emulated"])
def test_medians_name_the_device_and_an_emulated_ones_are_left_out(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = {
        "artifact": {"name": "onnx-fp32"},
        "device": {**PHONE, "kind": kind},
        **{key: {"p50": 123.4} for key in MEDIANS},
        **{"load_ms": 123.4, "peak_rss_mb": 123.4, "accuracy": {"avg": {"score": 61.5}}, "reasons": {}},
    }
    (tmp_path / "a.json").write_text(json.dumps(tree))
    show([tmp_path / "a.json"], False)
    said = capsys.readouterr().out
    assert f"Acme Phone 9 ({kind})" in said and "61.5" in said
    assert said.count("123.4") == (6 if kind == "phone" else 0)
