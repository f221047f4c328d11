"""Timings and their statistics, and what is read from the system's own files."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tests.fake_engine
from device_bench.measure import Work, latency_pass, latency_stats, run_once, summarise
from device_bench.telemetry import OtherLoad, cpu_seconds, field, identify_host, machine_state, status_mb
from tests.manifests import fake_artifact
from vlm.data.scenes.draw import render
from vlm.data.scenes.scene import make_scene
from vlm.errors import UserError
from vlm.runtimes.base import Runtime

SAMPLES = st.lists(st.floats(0.001, 1e6), min_size=1, max_size=60)


@settings(max_examples=60, deadline=None)
@given(SAMPLES)
def test_summary_equals_numpy(samples: list[float]) -> None:
    stats = summarise(samples)
    expected = dict(zip(("p50", "p90", "p95", "p99"), np.percentile(samples, [50, 90, 95, 99]), strict=True))
    expected |= {"min": np.min(samples), "max": np.max(samples), "mean": np.mean(samples), "std": np.std(samples)}
    expected |= {"mad": np.median(np.abs(np.array(samples) - np.median(samples)))}
    expected |= {"cv": np.std(samples) / np.mean(samples)}
    for name, value in expected.items():
        assert getattr(stats, name) == pytest.approx(value, rel=1e-9, abs=1e-6), name
    assert stats.n == len(samples)


def test_summary_does_not_depend_on_the_order_of_the_samples() -> None:
    assert summarise([3, 1, 2]) == summarise([1, 2, 3])


def test_nothing_measured_has_no_statistics() -> None:
    with pytest.raises(ValueError, match="no samples"):
        summarise([])


def test_rates_are_tokens_over_the_seconds_of_each_iteration() -> None:
    stats = latency_stats(
        {
            "vision_ms": [5.0, 7.0],
            "ttft_ms": [20.0, 30.0],
            "prefill_ms": [100.0, 200.0],
            "prefill_tokens": [50.0, 50.0],
            "decode_ms": [10.0, 30.0, 5.0, 5.0],
        }
    )
    assert (stats["prefill_tok_s"].min, stats["prefill_tok_s"].max) == pytest.approx((250, 500))
    assert (stats["decode_tok_s"].min, stats["decode_tok_s"].max) == pytest.approx((50, 200))
    assert {name: value.n for name, value in stats.items()} == dict.fromkeys(stats, 2)


def test_only_our_processors_count_and_stolen_time_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sysconf", lambda name: 100)
    stat = "cpu  9 9 9 9 9 9 9 9 0 0\ncpu0 100 0 50 800 20 10 5 15 0 0\ncpu1 700 0 0 300 0 0 0 0 0 0\nintr 1\n"
    assert cpu_seconds(stat, [0]) == (1.8, 10.0)
    assert cpu_seconds(stat, [0, 1]) == (8.8, 20.0)


def test_load_of_others_leaves_out_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([(100.0, 1000.0, 5.0), (108.0, 1020.0, 8.0)])  # busy, all, own: 8 s busy of 20, 3 of them ours
    monkeypatch.setattr(OtherLoad, "_now", staticmethod(lambda: next(readings)))
    assert OtherLoad().share() == pytest.approx(0.25)


def test_load_of_others_is_unknown_without_proc_stat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("device_bench.telemetry.read", lambda path: None)
    assert OtherLoad().share() is None


def test_what_cannot_be_read_is_none_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("device_bench.telemetry.read", lambda path: None)
    state = machine_state()
    unreadable = {key for key, value in state.items() if value is None}
    assert unreadable == {"governor", "frequency_mhz", "temperature_c"} == set(state["reasons"])


def test_field_finds_the_value_of_a_key() -> None:
    assert field('NAME="x"\nPRETTY_NAME="Some Linux 12"\n', "PRETTY_NAME", "=") == "Some Linux 12"
    assert field("VmHWM:\t  1024 kB\n", "VmHWM") == "1024 kB"
    assert field(None, "anything") is None


def test_this_machine_identifies_itself() -> None:
    identity = identify_host()
    assert identity.kind == "host" and identity.os
    assert identity.cpus and identity.memory_mb


def test_peak_memory_covers_what_was_freed_again() -> None:
    if status_mb("VmHWM") is None:
        pytest.skip("no /proc/self/status on this system")
    before = status_mb("VmRSS") or 0
    ballast = np.ones(80 * 2**20, np.uint8)
    assert len(ballast)
    del ballast
    assert (status_mb("VmHWM") or 0) > before + 70


@pytest.fixture
def fake_runtime(tmp_path: Path) -> Runtime:
    """The fake engine in this process, with an artifact of context length 256."""
    return tests.fake_engine.open(fake_artifact(tmp_path), 1)


def test_the_end_token_counts_again_after_a_timed_request(fake_runtime: Runtime) -> None:
    before = fake_runtime.facts
    timings = run_once(fake_runtime, Work(render(make_scene(1)), "Describe the image.", 3))
    assert fake_runtime.facts == before
    assert len(timings.decode_ms) == 3 and timings.ttft_ms >= timings.vision_ms + timings.prefill_ms > 0


def test_warm_up_is_not_among_the_samples(fake_runtime: Runtime) -> None:
    done: list[float] = []
    samples = latency_pass(fake_runtime, Work(render(make_scene(1)), "Describe.", 2), 3, 2, done.append)
    assert len(samples["ttft_ms"]) == 2 and len(samples["decode_ms"]) == 4
    assert done == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_a_request_that_does_not_fit_says_how_long_the_context_must_be(fake_runtime: Runtime) -> None:
    with pytest.raises(UserError, match=r"context length 256 found.*needed"):
        run_once(fake_runtime, Work(render(make_scene(1)), "Describe the image.", 250))
