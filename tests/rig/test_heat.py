"""The measuring method on a device whose temperature and power follow what its processes really do."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from device_bench.devices import _method
from device_bench.devices._link import Link
from device_bench.devices._method import cool_down, energy, integral_mj, observe
from device_bench.sensors.base import Absent
from tests.rig.conftest import remote
from tests.rig.rig import Rig

SECONDS = 20
BUSY = "i=0; while [ $i -lt {count} ]; do i=$((i+1)); done"


@contextmanager
def working(link: Link) -> Iterator[None]:
    """Let the device compute and rest in turn meanwhile."""
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            link.run(BUSY.format(count=300_000), 60)
            over.wait(2)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_energy_is_the_models_integral_within_two_percent_and_above_idle(rig: Rig) -> None:
    device = remote(f"ssh:root@127.0.0.1:{rig.ssh_port}")
    with rig.heat.following():
        idle = observe(device.link, device.sensors, 5)
        with working(device.link):
            busy = observe(device.link, device.sensors, SECONDS)
    start, end = busy[0].time_s, busy[-1].time_s
    found = integral_mj(busy, start, end)
    assert found == pytest.approx(rig.heat.integral_mj(start, end), rel=0.02)
    assert max(reading.power_mw for reading in busy) > 1.5 * max(reading.power_mw for reading in idle)
    above = energy(idle, busy, start, end, answers=1, tokens=1)
    assert not isinstance(above, Absent) and above.source == "battery battery: current_now x voltage_now"


def test_a_device_that_computed_is_waited_for_until_it_is_cool(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_method, "POLL_S", 1.0)
    device = remote(f"ssh:root@127.0.0.1:{rig.ssh_port}")
    limit = rig.heat.ROOM_C + rig.heat.WARMTH * rig.heat.IDLE_MW + 4
    with rig.heat.following():
        with working(device.link):
            warm = observe(device.link, device.sensors, 8)[-1]
        assert isinstance(warm.deciding_c, float)
        gate = cool_down(lambda: observe(device.link, device.sensors, 0)[0], min(limit, warm.deciding_c - 0.5), 60)
    assert gate.problem is None and gate.waited_s >= 1 and gate.first_c and gate.last_c
    assert gate.first_c > gate.last_c
