"""The report's pages of devices: several labs, heat over time, and no figure of an emulated processor."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from device_bench.devices._method import sustained
from device_bench.evaluate import load_answers, save_answers
from device_bench.metrics import NAMES
from device_bench.report import build, write
from device_bench.report.devices import comparison, device_pages
from device_bench.report.timeline import power, speed, temperature
from device_bench.report.write import raw_samples
from tests.report_fixture import make_run, write_json

SOME = ("onnx-fp32", "gguf-q4_0")
MINUTES = 3


def heat(slower: float) -> dict[str, Any]:
    """Raw samples of a sustained run that begins at 100 tokens per second and loses `slower` of it each minute."""
    ends, when = [(1000.0, 0)], 1000.0
    while when < 1000 + 60 * MINUTES:
        when += 0.1 * (1 + slower * (when - 1000) / 60)
        ends.append((when, 10))
    telemetry = [
        {"time_s": 1000.0 + second, "deciding_c": 30 + second / 60, "power_mw": 4000 if second else None}
        for second in range(60 * MINUTES)
    ]
    return {"ends": ends, "telemetry": telemetry}


@pytest.fixture
def phone(tmp_path: Path) -> Path:
    """A bench folder of another lab: the synthetic run's artifacts on a phone."""
    results = make_run(tmp_path / "made", scenes=3, artifacts=SOME) / "results" / "local"
    for name in SOME:
        tree = json.loads((results / f"{name}.json").read_text())
        raw = json.loads((results / f"{name}.samples.json").read_text())
        raw["sustained"] = heat(0.2)
        found = {**sustained(raw["sustained"]["ends"], []), "first_throttled_s": 95.0, "highest_c": 33.0}
        state = {
            "before": {"governor": "walt", "frequency_mhz": [600.0, 2900.0], "temperature_c": {"skin": 31.5}},
            "processors": [6, 7],
            "others_share": 0.0123,
            "gate": {"waited_s": 42.0},
        }
        tree |= {
            "device": {"kind": "phone", "name": "Acme Phone 9", "soc": "SM0000", "os": "Android 16", "cpus": 8},
            "energy_j": {"value": 1.25, "per_token_j": 0.0375, "source": "power stats"},
            "thermal": {"sustained": found},
            "state": state,
        }
        write_json(results / f"{name}.json", tree)
        write_json(results / f"{name}.samples.json", raw)
    return results.parent.rename(tmp_path / "lab-two")


def test_two_labs_stand_side_by_side_each_with_its_facts(phone: Path, tmp_path: Path) -> None:
    lab = make_run(tmp_path / "one", scenes=3, artifacts=SOME)
    report = build([lab, phone])
    table = comparison(report)
    assert table is not None and table["devices"] == ["synthetic machine", "Acme Phone 9"]
    assert [name for _, name, _ in table["rows"]] == ["ONNX fp32", "GGUF q4_0"]
    assert all(None not in cells for _, _, cells in table["rows"])
    pages = device_pages(report, raw_samples(report, [lab, phone]))
    assert [page.title for page in pages] == ["synthetic machine", "Acme Phone 9"]
    facts = dict(pages[1].facts)
    assert (facts["SoC"], facts["Clocks"], facts["Pinned to"]) == ("SM0000", "600 to 2\u202f900 MHz", "6, 7")
    assert (facts["Measured in"], facts["Cooled down"]) == ("lab-two", "42\u202fs")
    assert facts["Other work"] == "1.2% of the processors' time"
    assert {"Speed without a pause", "Temperature", "Power"} <= {chart["title"] for chart in pages[1].charts}
    assert not {"Speed without a pause", "Temperature"} & {chart["title"] for chart in pages[0].charts}
    shown = dict(zip(pages[1].columns, pages[1].rows[0][2], strict=True))
    assert (shown["Energy", "J per answer"], shown["Throttled", "after"]) == ("1.25", "1\u202fmin 35\u202fs")
    assert shown["Energy", "mJ per token"] == "37.5"
    page = (write([lab, phone], tmp_path / "out") / "index.html").read_text()
    assert page.count('class="device"') == 2 and "Acme Phone 9" in page


def test_a_devices_answers_stand_beside_the_hosts(phone: Path, tmp_path: Path) -> None:
    lab = make_run(tmp_path / "one", scenes=3, artifacts=SOME)
    path = phone / "local" / "gguf-q4_0.answers.jsonl"
    first = load_answers(path)[0]
    save_answers([replace(first, answer="something else", correct=0.0), *load_answers(path)[1:]], path)
    report = build([lab, phone])
    compared = {(a["name"], b["device"]["kind"]): b["host"] for a in report["artifacts"] for b in a["benches"]}
    assert compared["onnx-fp32", "phone"]["answers"]["changed"] == 0 and compared["onnx-fp32", "host"] is None
    (change,) = compared["gguf-q4_0", "phone"]["answers"]["shown"]
    assert change["before"]["answer"] == first.answer and change["after"]["answer"] == "something else"
    pages = device_pages(report, raw_samples(report, [lab, phone]))
    assert not pages[0].flipped and [name for name, _ in pages[1].flipped] == ["GGUF q4_0"]
    page = (write([lab, phone], tmp_path / "out") / "index.html").read_text()
    assert re.search(r"1 of \d+ answers are not the host's", page)


def test_folders_of_one_name_are_told_apart_by_the_folder_above(phone: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "one", scenes=3, artifacts=SOME) / "results"
    labs = [other, phone.rename(tmp_path / "results")]
    report = build(labs)
    assert {artifact["run"] for artifact in report["artifacts"]} == {"synthetic/results", f"{tmp_path.name}/results"}
    pages = device_pages(report, raw_samples(report, labs))
    assert [len(page.charts) for page in pages] == [4, 7]


def test_heat_over_time_is_what_the_samples_say() -> None:
    samples = {"sustained": heat(0.0)}
    rates = speed(samples)
    assert len(rates) == 6 * MINUTES and all(rate == pytest.approx(100, abs=2) for _, rate in rates)
    assert temperature(samples)[-1] == pytest.approx(((60 * MINUTES - 1) / 60, 30 + (60 * MINUTES - 1) / 60))
    assert {watts for _, watts in power(samples)} == {4.0} and len(power(samples)) == 60 * MINUTES - 1
    assert (speed({}), temperature({"telemetry": [{"time_s": 1.0, "deciding_c": None}]})) == ([], [])


def test_an_emulated_device_has_answers_and_no_figures(phone: Path, tmp_path: Path) -> None:
    for path in phone.glob("local/*.json"):
        tree = json.loads(path.read_text())
        if "device" in tree:
            write_json(path, {**tree, "device": {**tree["device"], "kind": "emulated"}})
    report = build(phone)
    for artifact in report["artifacts"]:
        (bench,) = artifact["benches"]
        assert bench["accuracy"] and [bench[name] for name in (*NAMES, "energy_j", "samples")] == [None] * 8
        assert all(bench["reasons"][name].startswith("an emulated processor") for name in NAMES)
    (page,) = device_pages(report, raw_samples(report, [phone]))
    assert page.emulated and page.columns == [("Accuracy", "%")] and not page.charts
    assert comparison(report) is None
    assert "are left out" in (write(phone, tmp_path / "out") / "index.html").read_text()
