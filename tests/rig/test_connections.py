"""The connections against real parts: adb and arm64 adbd, arm64 sshd; states, exit codes, files, loopback."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from device_bench.devices import open_device
from device_bench.devices._survey import survey
from device_bench.sensors.base import Absent
from tests.rig.conftest import over_both, remote
from tests.rig.rig import HERE, Rig, until
from tests.rig.sockets import LOOPBACK, free_port, listening
from vlm.errors import UserError


def test_every_server_listens_on_loopback_alone(rig: Rig) -> None:
    for port in (rig.adb_server, rig.adbd_port, rig.ssh_port):
        assert listening(port) and listening(port) <= LOOPBACK
    assert rig.elsewhere() == set()


@over_both
def test_the_device_is_recognised_as_emulated(spec: str) -> None:
    identity = remote(spec).identify()
    assert (identity.kind, identity.arch in ("arm64-v8a", "aarch64")) == ("emulated", True)


@over_both
def test_exit_codes_errors_and_quoting_survive_the_real_connection(spec: str) -> None:
    link = remote(spec).link
    done = link.run("echo out; echo err >&2; exit 7")
    assert (done.code, done.out, done.err.strip()) == (7, "out\n", "err")
    nasty = ["a b", "$(id)", "`id`", "'", '"', "\\", "*", ";", "\n", "é"]
    assert link.words("printf", "%s\\0", *nasty).out.split("\0")[:-1] == nasty


@over_both
def test_a_device_in_use_is_refused_and_the_doctor_says_so(rig: Rig, spec: str) -> None:
    first, second = remote(spec), remote(spec)
    first.claim.take(60)
    assert isinstance(use := survey(second)["use"], Absent) and "another bench" in use.reason
    with pytest.raises(UserError, match=r"in use: another bench"):
        second.claim.take(60)
    first.clean_up()
    assert survey(second)["use"] == "free" and rig.left() == []


@over_both
def test_a_large_file_arrives_and_returns_unchanged(rig: Rig, spec: str, tmp_path: Path) -> None:
    device = remote(spec)
    (tmp_path / "large").write_bytes(random.Random(0).randbytes(100_000_000))
    device.claim.take(60)
    device.workspace.own()
    try:
        assert device.workspace.push({"job/large": tmp_path / "large"}) == ["job/large"]
        assert device.workspace.push({"job/large": tmp_path / "large"}) == []
        device.workspace.pull("job/large", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == (tmp_path / "large").read_bytes()
    finally:
        device.clean_up()
    assert rig.left() == []


def test_a_phone_that_was_not_allowed_says_what_to_accept(rig: Rig) -> None:
    port = free_port()
    locked = subprocess.Popen([sys.executable, str(HERE / "unauthorized.py"), str(port)])
    try:
        until(lambda: listening(port), 20, "the locked phone")
        assert listening(port) <= LOOPBACK
        rig.adb("connect", f"127.0.0.1:{port}")
        until(lambda: "unauthorized" in rig.adb("devices"), 30, "unauthorized")
        with pytest.raises(UserError, match=r"unauthorized.*Allow USB debugging"):
            open_device(f"adb:127.0.0.1:{port}").identify()
        with pytest.raises(UserError, match=r"several devices are connected.*Name one"):
            open_device("adb").identify()
    finally:
        locked.kill()
        locked.wait()
        rig.disconnect(f"127.0.0.1:{port}")


def test_a_board_whose_key_changed_or_that_is_off_is_refused(rig: Rig) -> None:
    known = rig.work / "known_hosts"
    kept = known.read_text()
    spec = f"ssh:root@127.0.0.1:{rig.ssh_port}"
    try:
        other = (rig.device / "opt" / "ssh" / "user.pub").read_text().split()
        known.write_text(f"[127.0.0.1]:{rig.ssh_port} {other[0]} {other[1]}\n")
        with pytest.raises(UserError, match=r"another machine"):
            open_device(spec).identify()
        known.write_text("")
        with pytest.raises(UserError, match=r"Connect once by hand"):
            open_device(spec).identify()
    finally:
        known.write_text(kept)
    with pytest.raises(UserError, match=r"Start the ssh server"):
        open_device(f"ssh:root@127.0.0.1:{free_port()}").identify()


def test_a_phone_that_is_gone_for_good_is_said_to_be_gone(rig: Rig) -> None:
    device = remote(f"adb:{rig.serial}")
    rig.stop("adbd")
    started = time.monotonic()
    device.link.patience_s = 3
    try:
        with pytest.raises(UserError, match=r"offline|no device|does not answer"):
            device.link.wait()
    finally:
        rig.start_adbd_only()
        device.link.patience_s = 60
        device.link.wait()
    assert time.monotonic() - started < 60
