"""A process on a device, driven over this machine's shell: followed over breaks, killed, and nothing of it left."""

import os
import shutil
import time
from pathlib import Path

import pytest

from device_bench.devices import _link, _process
from device_bench.devices._link import quote
from device_bench.devices._process import Interrupted, Process, Watch, kill_all
from tests.shell_link import NASTY, ShellLink
from vlm.errors import CheckFailed


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> ShellLink:
    monkeypatch.setattr(_link, "POLL_S", 0.001)
    return ShellLink()


class Heard:
    """What a followed process told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.times: list[float] = []

    def watch(self, interval_s: float = 0.05) -> Watch:
        return Watch("echo reading", interval_s, self.lines.append, lambda time, lines: self.times.append(time))


def start(link: ShellLink, folder: Path, script: str, timeout_s: float = 30) -> Process:
    folder.mkdir(exist_ok=True)
    return Process(link, str(folder), ["sh", "-c", script], timeout_s)


def alive(folder: Path) -> list[str]:
    found = []
    for place in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if Path(os.readlink(place)).is_relative_to(folder):
                found.append(place.parent.name)
        except OSError:
            continue
    return found


COUNT = "for i in 1 2 3 4 5 6 7 8; do echo line $i >>results.txt; sleep 0.05; done; exit 5"


def test_a_process_is_followed_line_by_line_to_its_exit_code(link: ShellLink, tmp_path: Path) -> None:
    heard = Heard()
    ended = start(link, tmp_path / "job", COUNT).follow(heard.watch())
    assert (ended.code, ended.late) == (5, False)
    assert heard.lines == [f"line {i}" for i in range(1, 9)]
    assert len(heard.times) > 2 and heard.times == sorted(heard.times)
    kill_all(link, str(tmp_path / "job"))
    assert alive(tmp_path / "job") == []


def test_a_connection_that_breaks_loses_no_line_and_doubles_none(link: ShellLink, tmp_path: Path) -> None:
    heard = Heard()
    link.cut_after = [1, 4, 2, 7, 3]
    ended = start(link, tmp_path / "job", COUNT).follow(heard.watch())
    assert ended.code == 5 and link.cut_after == []
    assert heard.lines == [f"line {i}" for i in range(1, 9)]


def test_a_process_that_is_late_is_killed_with_its_children(link: ShellLink, tmp_path: Path) -> None:
    heard = Heard()
    ended = start(link, tmp_path / "job", "sleep 60 & sleep 60", timeout_s=1).follow(heard.watch())
    assert ended.late and ended.code is None
    kill_all(link, str(tmp_path / "job"))
    assert alive(tmp_path / "job") == []


def test_killing_ends_children_that_left_the_session(link: ShellLink, tmp_path: Path) -> None:
    process = start(link, tmp_path / "job", "setsid sleep 60 & sleep 60")
    until = time.monotonic() + 10
    while len(alive(tmp_path / "job")) < 4 and time.monotonic() < until:
        pass
    process.kill()
    assert alive(tmp_path / "job") == []


def test_killing_touches_no_process_of_a_folder_with_a_similar_name(link: ShellLink, tmp_path: Path) -> None:
    start(link, tmp_path / "jobs", "sleep 60")
    start(link, tmp_path / "jXb", "sleep 60")
    kill_all(link, str(tmp_path / "job"))
    kill_all(link, str(tmp_path / "j.b"))
    assert alive(tmp_path / "jobs") and alive(tmp_path / "jXb")
    kill_all(link, str(tmp_path))
    assert not alive(tmp_path)


def test_a_process_that_a_restart_took_away_is_interrupted(
    link: ShellLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = start(link, tmp_path / "job", "sleep 60")
    (tmp_path / "boot").write_text("another\n")
    monkeypatch.setattr(_process, "BOOT", str(tmp_path / "boot"))
    link.cut_after = [1]
    with pytest.raises(Interrupted):
        process.follow(Heard().watch())
    kill_all(link, str(tmp_path / "job"))


def test_a_folder_that_a_restart_took_away_is_interrupted_and_not_followed_for_ever(
    link: ShellLink, tmp_path: Path
) -> None:
    process = start(link, tmp_path / "job", "sleep 60")
    kill_all(link, str(tmp_path / "job"))
    (tmp_path / "job").rename(tmp_path / "gone")
    with pytest.raises(Interrupted):
        process.follow(Heard().watch())


def test_a_process_that_was_killed_has_no_exit_code(link: ShellLink, tmp_path: Path) -> None:
    process = start(link, tmp_path / "job", "sleep 60")
    kill_all(link, str(tmp_path / "job"))
    ended = process.follow(Heard().watch())
    assert ended.code is None and not ended.late


def test_a_process_that_cannot_start_says_so(link: ShellLink, tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match="did not start"):
        Process(link, str(tmp_path / "missing"), ["true"], 10)


def test_words_of_a_process_arrive_as_they_were_given(link: ShellLink, tmp_path: Path) -> None:
    folder = tmp_path / "it's $HOME"
    folder.mkdir()
    process = Process(link, str(folder), ["sh", "-c", 'printf "%s\\0" "$@" >words', "sh", *NASTY], 30)
    assert process.follow(Heard().watch()).code == 0
    assert (folder / "words").read_text().split("\0")[:-1] == NASTY
    assert quote(str(folder)) != str(folder)


def test_what_a_process_writes_to_its_home_stays_in_the_folder(link: ShellLink, tmp_path: Path) -> None:
    process = start(
        link, tmp_path / "job", 'for place in "$HOME" "$XDG_CACHE_HOME" "$TMPDIR"; do cd "$place"; pwd; done'
    )
    assert process.follow(Heard().watch()).code == 0
    assert (tmp_path / "job" / "out").read_text().split() == [str(tmp_path / "job")] * 3


def test_what_a_bench_that_never_came_back_left_is_removed_by_the_device(
    link: ShellLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_process, "ORPHANED_S", 0)
    job, until = tmp_path / "job", time.monotonic() + 20
    job.mkdir()
    Process(link, str(job), ["sleep", "60"], 1, orphaned=f"echo restored >{tmp_path}/clocks; rm -rf {job}")
    while job.exists() and time.monotonic() < until:
        pass
    assert not job.exists() and (tmp_path / "clocks").read_text() == "restored\n"
    kill_all(link, str(job))
    assert alive(job) == []


def test_a_process_whose_folder_was_removed_is_killed_too(link: ShellLink, tmp_path: Path) -> None:
    process = start(link, tmp_path / "job", "sleep 60")
    (tmp_path / "job" / "out").unlink()
    shutil.rmtree(tmp_path / "job")
    assert works_in(process.pid) == f"{tmp_path}/job (deleted)"
    kill_all(link, str(tmp_path / "job"))
    assert works_in(process.pid) is None


def works_in(pid: int) -> str | None:
    """Where a process works; None when there is no such process, or only its exit code for a parent to fetch."""
    try:
        return os.readlink(f"/proc/{pid}/cwd")
    except OSError:
        return None
