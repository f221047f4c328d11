"""Naming a device, telling the states of one that cannot be used apart, identifying one that answers."""

import stat
import sys
from pathlib import Path

import pytest

from device_bench.devices import open_device
from device_bench.devices._emulated import is_emulated
from tests.shell_link import ShellLink
from vlm.errors import UserError

GETPROP = """[ro.product.manufacturer]: [Acme]
[ro.product.model]: [Phone 9]
[ro.soc.model]: [SM0000]
[ro.build.version.release]: [16]
[ro.build.id]: [AB1C]
[ro.product.cpu.abi]: [arm64-v8a]
"""


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An otherwise empty PATH for fake programs."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def fake(folder: Path, name: str, answers: dict[str, str], code: int = 0, stderr: str = "") -> None:
    """Write a program that prints the answer to the first key found in its arguments, and notes the arguments.

    A script for the device's shell begins with its mark and ends with a line that holds its mark and exit code.
    """
    script = folder / name
    script.write_text(
        f"#!{sys.executable} -S\nimport re, sys\n"
        f"words = ' '.join(sys.argv[1:])\n"
        f"open({str(folder / 'calls')!r}, 'a').write(repr(sys.argv[1:]) + '\\n')\n"
        f"sys.stderr.write({stderr!r})\n"
        f"mark = re.search('@[0-9a-f]{{16}}@', words)\n"
        f"if mark: print(mark[0])\n"
        f"print(next((text for key, text in {answers!r}.items() if key in words), ''))\n"
        f"absent = 'device-tree/comp' in words or 'kernel/arch' in words\n"
        f"if mark and not {code}: print('\\n' + mark[0], int(absent))\n"
        f"sys.exit({code})\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)


def devices(*rows: str) -> dict[str, str]:
    return {
        "devices": "List of devices attached\n" + "\n".join(rows) + "\n",
        "getprop": GETPROP,
        "nproc": "8",
        "uname -m": "aarch64",
        "uname": "6.1.0",
        "meminfo": "MemTotal:        8388608 kB",
    }


def test_a_phone_that_answers_is_identified(programs: Path) -> None:
    fake(programs, "adb", devices("S1\tdevice"))
    identity = open_device("adb").identify()
    assert identity.model_dump() == {
        "kind": "phone", "name": "Acme Phone 9", "soc": "SM0000", "os": "Android 16 AB1C", "kernel": "6.1.0",
        "arch": "arm64-v8a", "cpus": 8, "memory_mb": 8192, "id": "3696ad59777e",
    }  # fmt: skip


def test_the_named_phone_is_the_one_that_is_asked(programs: Path) -> None:
    fake(programs, "adb", devices("S1\tdevice", "S2\tdevice"))
    open_device("adb:S2").identify()
    asked = [line for line in (programs / "calls").read_text().splitlines() if "shell" in line]
    assert asked and all(line.startswith("['-s', 'S2'") for line in asked)


def test_a_phone_that_nobody_named_is_not_mistaken_for_the_next_one(programs: Path) -> None:
    fake(programs, "adb", devices("S1\tdevice"))
    phone = open_device("adb")
    phone.identify()
    assert phone.folder_name == open_device("adb:S1").folder_name == "adb-S1"
    fake(programs, "adb", devices("S2\tdevice"))
    with pytest.raises(UserError, match=r"no device has serial number S1"):
        phone.identify()
    fake(programs, "adb", devices("S1\tdevice", "S2\tdevice"))
    phone.identify()


@pytest.mark.parametrize(
    ("spec", "rows", "expected"),
    [
        ("adb", [], ["no device is connected", "USB debugging"]),
        ("adb", ["S1\tunauthorized"], ["S1", "unauthorized", "accept 'Allow USB debugging'"]),
        ("adb", ["S1\toffline"], ["offline", "adb kill-server"]),
        ("adb", ["S1\tno permissions (user in plugdev group); see [http://x]"], ["no permissions", "udev"]),
        ("adb", ["S1\tdevice", "S2\toffline"], ["several devices", "S1 (device), S2 (offline)", "--device adb:S1"]),
        ("adb:R58N43", ["R58M43\tdevice"], ["no device has serial", "Did you mean 'R58M43'", "Connected: R58M43"]),
        ("adb:S1", ["S1\tunheard-of"], ["unheard-of", "adb devices"]),
    ],
)
def test_each_state_of_a_phone_has_its_message(programs: Path, spec: str, rows: list[str], expected: list[str]) -> None:
    fake(programs, "adb", devices(*rows))
    with pytest.raises(UserError) as error:
        open_device(spec).identify()
    assert all(part in str(error.value) for part in expected), error.value


def test_a_missing_adb_says_what_to_install(programs: Path) -> None:
    with pytest.raises(UserError, match=r"no adb program.*apt install adb"):
        open_device("adb").identify()


def test_an_adb_that_fails_passes_its_reason_on(programs: Path) -> None:
    fake(programs, "adb", {}, code=1, stderr="cannot bind to port")
    with pytest.raises(UserError, match="cannot bind to port"):
        open_device("adb").identify()


def test_a_board_that_answers_is_identified(programs: Path) -> None:
    answers = {
        "uname -m": "aarch64",
        "uname": "Linux 5.15-tegra aarch64",
        "nproc": "6",
        "os-release": 'PRETTY_NAME="Ubuntu 22.04"',
        "meminfo": "MemTotal: 8192000 kB",
        "device-tree": "NVIDIA Jetson Orin Nano\0",
    }
    fake(programs, "ssh", answers)
    identity = open_device("ssh:me@board:2222").identify()
    assert (identity.kind, identity.name, identity.os) == ("jetson", "NVIDIA Jetson Orin Nano", "Ubuntu 22.04")
    assert (identity.kernel, identity.arch, identity.cpus, identity.memory_mb) == ("5.15-tegra", "aarch64", 6, 8000)
    assert "'-p', '2222', '-l', 'me', '--', 'board'" in (programs / "calls").read_text()


@pytest.mark.parametrize(
    ("stderr", "expected"),
    [
        ("ssh: connect to host board port 22: Connection refused", "Start the ssh server"),
        ("ssh: connect to host board port 22: Connection timed out", "same network"),
        ("ssh: Could not resolve hostname board: Name or service not known", "Check the host's name"),
        ("me@board: Permission denied (publickey).", "ssh-copy-id"),
        ("Host key verification failed.", "ssh me@board -p 22"),
        ("something new", "Try by hand: ssh me@board -p 22"),
    ],
)
def test_each_way_not_to_reach_a_board_has_its_message(programs: Path, stderr: str, expected: str) -> None:
    fake(programs, "ssh", {}, code=255, stderr=stderr)
    with pytest.raises(UserError) as error:
        open_device("ssh:me@board").identify()
    assert stderr in str(error.value) and expected in str(error.value)


def test_a_missing_ssh_says_what_to_install(programs: Path) -> None:
    with pytest.raises(UserError, match=r"no ssh program.*openssh-client"):
        open_device("ssh:me@board").identify()


@pytest.mark.parametrize(
    "spec",
    ["ssh:", "ssh:board", "ssh:me@", "ssh:-oProxyCommand=x@board", "ssh:me@-oProxyCommand=x", "ssh:me@board:0",
     "ssh:me@board:99999", "ssh:me@board; ls", "adb:-s", "adb:a b", "local:x"],
)  # fmt: skip
def test_a_target_that_is_not_well_formed_is_refused(spec: str) -> None:
    with pytest.raises(UserError, match="--device"):
        open_device(spec)


def test_an_unknown_kind_of_device_gets_a_suggestion() -> None:
    with pytest.raises(UserError, match=r"Did you mean 'local'.*adb, local, ssh"):
        open_device("locl")


def test_a_phone_that_is_connected_but_silent_has_stalled(programs: Path) -> None:
    fake(programs, "adb", {"devices": "List of devices attached\nS1\tdevice\n"} | {"shell": ""})
    text = (programs / "adb").read_text().replace("if mark and", "if False and")
    (programs / "adb").write_text(text)
    with pytest.raises(UserError, match=r"S1 is connected but does not answer.*stalled.*Reconnect"):
        open_device("adb").identify()


def test_another_host_key_than_the_known_one_is_never_accepted(programs: Path) -> None:
    stderr = "@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed."
    fake(programs, "ssh", {}, code=255, stderr=stderr)
    with pytest.raises(UserError, match=r"another machine.*ssh-keygen -R '\[board\]:2222'"):
        open_device("ssh:me@board:2222").identify()


@pytest.mark.parametrize(
    ("machine", "beneath", "board", "emulated"),
    [
        ("aarch64", "aarch64", "google,shiba", False),
        ("aarch64", "", "", False),  # before Linux 6.1
        ("aarch64", "x86_64", "", True),
        ("armv8l", "aarch64", "", False),  # a 32-bit shell on a 64-bit kernel
        ("aarch64", "aarch64", "linux,dummy-virt", True),
    ],
)
def test_an_emulated_processor_is_found_out(machine: str, beneath: str, board: str, emulated: bool) -> None:
    class Says(ShellLink):
        def output(self, *command: str) -> str:
            return {"uname": machine, "/proc/sys/kernel/arch": beneath}.get(
                command[-1] if command[0] == "cat" else "uname", board
            )

    assert is_emulated(Says()) is emulated
