"""The folder on a device, driven over this machine's shell: checked, followed over breaks, and nothing left."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from device_bench.devices import _link, _survey, adb, ssh
from device_bench.devices._link import Lost, quote
from device_bench.devices._sensors import Sensors
from device_bench.devices._ssh_link import by_sh
from device_bench.devices._survey import survey
from device_bench.devices._workspace import Workspace
from device_bench.sensors.base import Absent
from device_bench.telemetry import Identity
from tests.shell_link import NASTY, ShellLink
from vlm.errors import UserError


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> ShellLink:
    monkeypatch.setattr(_link, "POLL_S", 0.001)
    return ShellLink()


@pytest.fixture
def space(link: ShellLink, tmp_path: Path) -> Workspace:
    return Workspace(link, str(tmp_path / "device"))


def test_exit_code_output_and_errors_of_a_script_are_kept_apart(link: ShellLink) -> None:
    done = link.run("echo out; echo err >&2; exit 7")
    assert (done.code, done.out, done.err) == (7, "out\n", "err\n")


def test_what_a_logins_start_up_file_prints_is_no_output(link: ShellLink, monkeypatch: pytest.MonkeyPatch) -> None:
    command = link.command
    monkeypatch.setattr(link, "command", lambda script: command(f"echo Welcome to Ubuntu\nprintf '>'\n{script}"))
    assert link.output("echo", "1000") == "1000\n" and link.output("false") == ""


def test_words_arrive_as_they_were_given(link: ShellLink) -> None:
    assert link.words("printf", "%s\\0", *NASTY).out.split("\0")[:-1] == NASTY


def test_a_connection_that_breaks_is_not_taken_for_the_end_of_a_script(link: ShellLink) -> None:
    link.breaks = 1
    with pytest.raises(Lost, match="closed"):
        link.run("true")


def test_a_device_that_does_not_answer_in_time_is_lost(link: ShellLink) -> None:
    with pytest.raises(Lost, match=r"no answer in 0\.2 s"):
        link.run("exec sleep 5", timeout_s=0.2)
    with pytest.raises(Lost, match=r"silent for 0\.2 s"):
        list(link.follow("exec sleep 5", 0.2))


def test_a_line_that_was_cut_off_is_not_taken_for_one(link: ShellLink) -> None:
    assert list(link.follow("printf 'whole\\nhalf of a li'", 5)) == ["whole"]


def test_only_what_changed_is_sent(space: Workspace, link: ShellLink, tmp_path: Path) -> None:
    files = {f"model/{name}": tmp_path / name for name in ("a.bin", "b.bin")}
    for file in files.values():
        file.write_text(file.name)
    assert space.push(files) == ["model/a.bin", "model/b.bin"]
    assert space.push(files) == []
    (tmp_path / "b.bin").write_text("other")
    assert space.push(files) == ["model/b.bin"]
    space.pull("model/b.bin", tmp_path / "back")
    assert (tmp_path / "back").read_text() == "other"


def test_a_file_that_arrives_damaged_is_refused(space: Workspace, link: ShellLink, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_text("content")
    link.damage = True
    with pytest.raises(UserError, match=r"a\.bin arrived with another SHA-256"):
        space.push({"a.bin": tmp_path / "a.bin"})


def test_a_send_that_breaks_is_repeated_when_the_device_is_back(
    space: Workspace, link: ShellLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.bin").write_text("content")
    send = link.send

    def break_once(file: Path, to: str, timeout_s: float) -> None:
        monkeypatch.setattr(link, "send", send)
        link.breaks = 2
        raise Lost("closed")

    monkeypatch.setattr(link, "send", break_once)
    assert space.push({"a.bin": tmp_path / "a.bin"}) == ["a.bin"]
    assert link.revived == 2


def test_a_full_device_is_told_before_anything_is_sent(
    space: Workspace, link: ShellLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.bin").write_bytes(b"0" * 5_000_000)
    (tmp_path / "df").write_text(
        "#!/bin/sh\necho Filesystem 1K-blocks Used Available Use% Mounted on\necho /dev/x 9 8 3072 90% /data\n"
    )
    (tmp_path / "df").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(UserError, match=r"the device is full: 5 MiB are needed.*3 MiB are free"):
        space.push({"a.bin": tmp_path / "a.bin"})
    assert link.sent == []


def test_a_device_that_fills_up_while_sending_is_told_as_full(
    space: Workspace, link: ShellLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.bin").write_text("content")

    def full(file: Path, to: str, timeout_s: float) -> None:
        raise UserError("adb: error: failed to copy: remote couldn't write: No space left on device")

    monkeypatch.setattr(link, "send", full)
    with pytest.raises(UserError, match="the device is full"):
        space.push({"a.bin": tmp_path / "a.bin"})


@pytest.mark.parametrize(
    "name", ["../x", "a/../../x", "/etc/passwd", "a b", "-", ".", "..", "a\nb", "$(id)", "", "a//b"]
)
def test_no_name_leads_out_of_the_folder(space: Workspace, name: str) -> None:
    if name == "-":
        assert space.path(name).endswith("/-")
        return
    with pytest.raises(UserError, match="cannot be a file's name"):
        space.path(name)


@pytest.mark.parametrize("root", ["/", "", "relative/x", "/data", "/data/../x", "/data/a b", "/data/x;id"])
def test_a_folder_that_is_not_plain_is_never_worked_in(link: ShellLink, root: str) -> None:
    with pytest.raises(UserError, match="no folder that can be worked in"):
        Workspace(link, root)


def test_removing_the_folder_is_checked(space: Workspace, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_text("x")
    space.own()
    space.push({"deep/er/a.bin": tmp_path / "a.bin"})
    space.remove()
    assert not Path(space.root).exists()


def test_a_folder_of_the_users_is_refused_and_neither_it_nor_what_runs_there_is_touched(
    link: ShellLink, tmp_path: Path
) -> None:
    device = board(link, tmp_path / "home")
    mine = tmp_path / "home" / "mine"
    (mine / "jobs").mkdir(parents=True)
    (mine / "table.csv").write_text("x")
    for folder in (mine, mine / "jobs"):
        with subprocess.Popen(["sleep", "60"], cwd=folder) as process:
            device.claim.take(60)
            with pytest.raises(UserError, match=r"no bench has made it.*Move it away"):
                device._bring()
            device.clean_up()
            assert process.poll() is None and (mine / "table.csv").read_text() == "x"
            process.kill()
    assert sorted(path.name for path in mine.parent.iterdir()) == ["mine"]


def test_what_runs_beside_our_jobs_is_not_killed(link: ShellLink, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    device = board(link, tmp_path / "home")
    device.claim.take(60)
    device._bring()
    with subprocess.Popen(["sleep", "60"], cwd=device.root()) as process:
        device.clean_up()
        assert process.poll() is None and list((tmp_path / "home").iterdir()) == []
        process.kill()


def test_removing_the_lock_as_its_message_advises_does_not_keep_a_bench_from_cleaning_up(
    link: ShellLink, tmp_path: Path
) -> None:
    (tmp_path / "home").mkdir()
    device = board(link, tmp_path / "home")
    device.claim.take(60)
    device._bring()
    Path(device.claim.file).unlink()
    device.clean_up()
    assert list((tmp_path / "home").iterdir()) == []


def board(link: ShellLink, home: Path) -> ssh.SshDevice:
    class Board(ssh.SshDevice):
        def root(self) -> str:
            return str(home / "mine")

    device = Board("me", "board", 22)
    device.link = link
    return device


@pytest.mark.parametrize("shell", ["sh", "bash", "dash", "zsh", "tcsh", "fish"])
def test_a_script_means_the_same_under_every_login_shell(shell: str) -> None:
    if not shutil.which(shell):
        pytest.skip(f"no {shell} here")
    words = [*NASTY, "!x", "a!b", "\\n", "%s", "\\'"]
    script = f"cd / # it's\nn='1 2'; printf '%s,' $n /nothere*; printf '%s\\0' {quote(*words)}"
    done = subprocess.run([shell, "-c", by_sh(script)], capture_output=True, text=True, check=True)
    assert done.stdout == "1,2,/nothere*," + "".join(f"{word}\0" for word in words)


def test_a_home_behind_a_symbolic_link_is_named_as_the_kernel_names_it(
    link: ShellLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "home").symlink_to("real")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    device = ssh.SshDevice("me", "board", 22)
    device.link = link
    assert device.root() == f"{tmp_path}/real/.pocketvlm-bench"
    assert Workspace(link, device.root()).root == device.root()


def test_fixed_clocks_are_given_back_even_when_the_connection_broke_in_between(
    link: ShellLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cmd").write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\n')
    (tmp_path / "cmd").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(adb, "ROOT", str(tmp_path / "device" / "x"))
    device = adb.AdbDevice("S1")
    device.link = link
    (tmp_path / "device").mkdir()
    device.claim.take(60)
    device.begin_timing()
    link.breaks = 2
    device.clean_up()
    device.clean_up()
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == [f"power set-fixed-performance-mode-enabled {state}" for state in ("true", "false")]


def test_the_doctor_says_what_would_be_measured_and_what_not(
    link: ShellLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = ssh.SshDevice("me", "board", 22)
    device.link = link
    for name, value in {
        "class/thermal/thermal_zone0/type": "cpu-thermal",
        "class/thermal/thermal_zone0/temp": "41500",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{value}\n")
    device.sensors = Sensors(False, str(tmp_path))
    device.sensors.locate(link)
    monkeypatch.setattr(device, "look", lambda: Identity(kind="jetson", name="b", soc=None, os=None, arch="aarch64"))
    monkeypatch.setattr(_survey, "examined", lambda engine, abi: f"{abi} of {engine}")
    found = survey(device)
    assert (found["cool-down"], found["use"]) == ("41.5 degrees now, at most 60 wanted", "free")
    assert found["runner for onnx"] == "arm64-v8a of onnx" and found["speed"] and found["memory"] == "peak RSS"
    for name, reason in {
        "energy": "no power sensor",
        "throttling": "scaling_max_freq",
        "fast processors": "cpuinfo_max",
    }.items():
        absent = found[name]
        assert isinstance(absent, Absent) and reason in absent.reason


def test_the_doctor_says_that_an_emulated_devices_speed_is_nobodys(
    link: ShellLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = ssh.SshDevice("me", "board", 22)
    device.link = link
    monkeypatch.setattr(device, "look", lambda: Identity(kind="emulated", name="b", soc=None, os=None, arch="mips"))
    found = survey(device)
    for name, reason in {"speed": "emulated", "memory": "emulated", "energy": "emulated", "runner": "mips"}.items():
        absent = found[name]
        assert isinstance(absent, Absent) and reason in absent.reason
