"""One bench at a time on a device: the second is told who has it, and nobody waits for the dead."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from device_bench.devices import _link, ssh
from device_bench.devices._claim import Claim
from tests.shell_link import ShellLink
from vlm.errors import UserError


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> ShellLink:
    monkeypatch.setattr(_link, "POLL_S", 0.001)
    return ShellLink()


def another(link: ShellLink, root: Path) -> Claim:
    """The claim of a bench on another computer."""
    claim = Claim(link, f"{root}.lock")
    claim._host = "elsewhere"
    return claim


def took(claims: list[Claim]) -> list[bool]:
    """Which of several that come at the same moment take the device."""
    start = threading.Barrier(len(claims))

    def takes(claim: Claim) -> bool:
        start.wait()
        try:
            claim.take(60)
        except UserError:
            return False
        return True

    with ThreadPoolExecutor(len(claims)) as pool:
        return list(pool.map(takes, claims))


def test_a_second_bench_is_told_who_has_the_device_until_the_first_is_done(link: ShellLink, tmp_path: Path) -> None:
    first, second = another(link, tmp_path / "x"), Claim(link, str(tmp_path / "x.lock"))
    first.take(90)
    who = f"elsewhere:{os.getpid()}"
    with pytest.raises(UserError, match=rf"in use: another bench \({who}\) has it for at most 2 more min.*x\.lock"):
        second.take(60)
    assert first.is_ours() and not second.is_ours() and second.holder() == who and first.holder() is None
    first.take(60)
    first.release()
    second.take(60)
    assert second.is_ours() and not first.is_ours()


def test_a_claim_that_has_run_out_is_taken_over_and_its_owner_is_told(link: ShellLink, tmp_path: Path) -> None:
    first, second = another(link, tmp_path / "x"), another(link, tmp_path / "x")
    first.take(-1)
    second.take(60)
    with pytest.raises(UserError, match="in use"):
        first.take(60)


@pytest.mark.parametrize("before", [None, "ab12 elsewhere:1 100\n", "ab12"])
def test_of_several_that_find_the_device_free_at_once_one_takes_it(
    link: ShellLink, tmp_path: Path, before: str | None
) -> None:
    for attempt in range(10):
        claims = [another(link, tmp_path / f"x{attempt}") for _ in range(4)]
        if before:
            Path(claims[0].file).write_text(before)
        winners = took(claims)
        assert winners.count(True) == 1 and [claim.is_ours() for claim in claims] == winners
        assert [path.name for path in tmp_path.glob(f"x{attempt}.lock*")] == [f"x{attempt}.lock"]


def test_a_bench_of_this_computer_that_died_is_not_waited_for(link: ShellLink, tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    first, second = Claim(link, str(tmp_path / "x.lock")), Claim(link, str(tmp_path / "x.lock"))
    first.take(600)
    file = Path(first.file)
    file.write_text(file.read_text().replace(f":{os.getpid()} ", f":{child} "))
    second.take(60)
    assert second.is_ours()


def test_a_place_that_cannot_be_written_is_named(link: ShellLink, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing/x\.lock cannot be written: .*"):
        Claim(link, str(tmp_path / "missing" / "x.lock")).take(60)


def test_cleaning_up_leaves_the_files_of_the_bench_that_has_the_device(link: ShellLink, tmp_path: Path) -> None:
    class Board(ssh.SshDevice):
        def root(self) -> str:
            return str(tmp_path / "x")

    other = another(link, tmp_path / f".pocketvlm-bench-{os.getuid()}")
    other.take(60)
    device = Board("me", "board", 22)
    device.link, device.shared = link, str(tmp_path)
    device.workspace.own()
    with pytest.raises(UserError, match="in use"):
        device.claim.take(60)
    device.clean_up()
    assert (tmp_path / "x").is_dir() and other.is_ours()
    other.release()
    device.claim.take(60)
    device.clean_up()
    assert sorted(tmp_path.iterdir()) == []


def login(link: ShellLink, place: Path, user: int) -> Claim:
    """The claim of another user of one machine."""
    claim = Claim(link, str(place / f".bench-{user}.lock"), f"{place}/.bench-*.lock")
    claim._host = "elsewhere"
    return claim


def test_two_logins_of_one_machine_never_have_it_both(link: ShellLink, tmp_path: Path) -> None:
    first, second = login(link, tmp_path, 1000), login(link, tmp_path, 1001)
    first.take(90)
    first.take(90)
    with pytest.raises(UserError, match=r"in use: another bench .* 2 more min.*remove .*\.bench-1000\.lock\* there"):
        second.take(60)
    assert second.holder() and first.holder() is None and not Path(second.file).exists()
    assert Path(first.file).stat().st_mode & 0o444 == 0o444
    first.take(-1)
    second.take(60)
    assert second.is_ours() and first.holder()
    with pytest.raises(UserError, match="in use"):
        first.take(60)
    second.release()
    first.take(60)


def test_a_newcomers_short_look_does_not_end_the_bench_that_has_the_machine(link: ShellLink, tmp_path: Path) -> None:
    first, second = login(link, tmp_path, 1000), login(link, tmp_path, 1001)
    first.take(90)
    end = Path(first.file).read_text().split()[2]
    Path(second.file).write_text(f"abc elsewhere:1 {end}\n")  # it has taken its own and not yet looked at the first
    first.take(90)
    assert first.is_ours() and Path(first.file).exists()
    with pytest.raises(UserError, match="in use"):
        second.take(60)


def test_of_two_logins_that_come_at_once_at_most_one_takes_the_machine(link: ShellLink, tmp_path: Path) -> None:
    for _ in range(10):
        both = [login(link, tmp_path, user) for user in (1000, 1001)]
        assert took(both).count(True) <= 1
        for claim in both:
            claim.release()
