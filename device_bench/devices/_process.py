"""A process on a device that outlives its connection: started in a session of its own, followed, killed, verified."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from device_bench.devices._link import Link, Lost, quote
from vlm.errors import CheckFailed, UserError

SILENCE_S = 30.0
PATIENCE = 10  # connections in a row that end without a word
BOOT = "/proc/sys/kernel/random/boot_id"
# The session's leader: notes its id and the runner's, lets nothing outlive the deadline or itself, leaves the exit code
# in a file.
_LEADER = (
    "echo $$ >pid.part; mv pid.part pid; (sleep {seconds}; : >late; kill -9 -- -$$) & "
    '"$@" >out 2>err & echo $! >runner; wait $!; echo $? >exit.part; mv exit.part exit; kill -9 -- -$$'
)
# Long after the deadline, in a session of its own: nobody came to end this process, so nobody will clean up.
ORPHANED_S = 600
# What an engine writes to its user's home, such as ONNX Runtime's telemetry, stays in the folder that is removed.
_START = """
cd {folder} || exit 9
export HOME={folder} XDG_CACHE_HOME={folder} TMPDIR={folder} ORT_DISABLE_TELEMETRY=1
rm -f pid runner exit late out err leader results.txt
setsid sh -c {leader} sh {command} </dev/null >/dev/null 2>leader &
setsid sh -c {orphaned} </dev/null >/dev/null 2>&1 &
i=0
while ! [ -s pid ] && [ $i -lt 100 ]; do sleep 0.1; i=$((i+1)); done
cat pid {boot}
"""
# Every second: the clock, the sensors, new whole lines of the results, and whether the process still lives.
_FOLLOW = """
cd {folder} || exit 9
n={seen}
while :; do
state=died
[ -d /proc/{pid} ] && state=
[ -e late ] && state=late
[ -e exit ] && state=ended
echo "@time $(cat /proc/uptime)"
{sensors}
m=$(cat results.txt 2>/dev/null | wc -l)
if [ "${{m:-0}}" -gt $n ]; then
echo @results; sed -n "$((n+1)),${{m}}p" results.txt; n=$m; echo @end
fi
if [ -n "$state" ]; then echo "@$state $(cat exit 2>/dev/null)"; exit; fi
sleep {interval}
done
"""


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code; None where it left none."""

    code: int | None
    late: bool


class Interrupted(Exception):
    """The device restarted, or lost the process with the connection: what is not answered must be asked again."""


@dataclass(frozen=True)
class Watch:
    """What is looked at while a process runs.

    Attributes:
        sensors: a script that prints readings, run once per interval on the device.
        interval_s: seconds between two readings.
        on_line: gets every new line of results.txt.
        on_reading: gets the device's uptime in seconds and what the sensors printed.
    """

    sensors: str
    interval_s: float
    on_line: Callable[[str], None]
    on_reading: Callable[[float, list[str]], None]


class Process:
    """A process started in a folder on the device."""

    def __init__(self, link: Link, folder: str, command: Sequence[str], timeout_s: float, orphaned: str = ":") -> None:
        """Start it; `orphaned` is a script that the device runs if nobody has killed it long after its deadline.

        Raises:
            Lost: the connection broke.
            CheckFailed: it did not start.
        """
        self.link, self.folder = link, folder
        seconds = max(1, round(timeout_s))
        leader, late = _LEADER.format(seconds=seconds), f"sleep {seconds + ORPHANED_S}; {orphaned}"
        script = _START.format(
            folder=quote(folder),
            leader=quote(leader),
            orphaned=quote(late),
            command=quote(*command),
            boot=quote(BOOT),
        )
        done = link.run(script)
        words = done.out.split()
        if done.code != 0 or len(words) != 2 or not words[0].isdigit():
            reason = (done.err or done.out).strip().splitlines()[-1:] or ["no process id was left"]
            raise CheckFailed(f"--device {link.spec}: the process did not start: {reason[0]}")
        self.pid, self._boot = int(words[0]), words[1]
        self._seen, self._heard = 0, False

    def follow(self, watch: Watch) -> Ended:
        """Follow it to its end; where the connection breaks, wait for it and follow on.

        Raises:
            Interrupted: the process is gone without an end.
            UserError: the device does not come back.
        """
        broke, heard_nothing = False, 0
        while heard_nothing < PATIENCE:
            self._heard = False
            try:
                ended = self._follow_once(watch)
            except Lost:
                ended = None
            if ended is not None:
                if ended.code is None and not ended.late and broke:
                    raise Interrupted
                return ended
            broke, heard_nothing = True, 0 if self._heard else heard_nothing + 1
            self._find_again()
        raise Interrupted  # the folder is gone, or whatever else ends every script at once

    def kill(self) -> None:
        """Kill the whole session and make sure that nothing of it lives.

        Raises:
            Lost: the connection broke.
            UserError: something still lives.
        """
        kill_all(self.link, self.folder)

    def _find_again(self) -> None:
        while True:
            self.link.wait()
            try:
                if self.link.output("cat", BOOT).strip() != self._boot:
                    raise Interrupted
                return
            except Lost:
                continue

    def _follow_once(self, watch: Watch) -> Ended | None:
        """Follow over one connection; None where it ended before the process did."""
        script = _FOLLOW.format(
            folder=quote(self.folder),
            pid=self.pid,
            seen=self._seen,
            sensors=watch.sensors,
            interval=watch.interval_s,
        )
        time: float | None = None
        readings: list[str] = []
        in_results = False
        for line in self.link.follow(script, SILENCE_S + watch.interval_s):
            self._heard = True
            if match := re.fullmatch(r"@(ended|late|died) ?(\d*)", line):
                if time is not None:
                    watch.on_reading(time, readings)
                return Ended(int(match[2]) if match[2] else None, match[1] == "late")
            if line in ("@results", "@end"):
                in_results = line == "@results"
            elif in_results:
                self._seen += 1
                watch.on_line(line)
            elif match := re.fullmatch(r"@time (\d+\.?\d*) .*", line):
                if time is not None:
                    watch.on_reading(time, readings)
                time, readings = float(match[1]), []
            else:
                readings.append(line)
        return None


def kill_all(link: Link, folder: str) -> None:
    """Kill every process that works in a folder on the device, and make sure that none is left.

    Raises:
        Lost: the connection broke.
        UserError: one is still there.
    """
    # By where they work, not by a number: after a restart a number may be somebody else's.
    place = folder.replace(".", "[.]")
    works_there = f"-> {place}\\(/.*\\)\\{{0,1\\}}\\( (deleted)\\)\\{{0,1\\}}$"
    find = f"ls -l /proc/*/cwd 2>/dev/null | sed -n 's|.*/proc/\\([0-9]*\\)/cwd {works_there}|\\1|p'"
    script = f"""
i=0
while [ $i -lt 50 ]; do
alive=$({find})
[ -z "$alive" ] && exit 0
kill -9 $alive 2>/dev/null
sleep 0.1; i=$((i+1))
done
echo $alive; exit 1
"""
    done = link.run(script, 60)
    if done.code != 0:
        raise UserError(
            f"--device {link.spec}: process {done.out.strip()} in {folder} cannot be killed. Restart the device."
        )
