"""One bench at a time on a device: a file there says which process of which computer has it.

Two benches would slow each other down and remove each other's files. The file is made in one step (`set -C`), carries
the moment until which it counts on the device's own clock, and is renewed before every pass, so that a bench that died
keeps nobody waiting for ever. A file that is there is replaced only by who could make the folder named after its
holder, and after another look at it: of two who find it run out, one takes it. Whoever took it reads it back.
Where several logins share a device, each has a file of its own that all can read, since nobody may replace another's.
Whoever has newly taken its own then looks at all: of two logins at the same moment both may be refused, never none.
Whoever renews in time does not look: a newcomer sees that file, and must not end a bench by having one for a moment.
"""

import errno
import os
import re
import secrets
import socket

from device_bench.devices._link import Link, quote
from vlm.errors import UserError

MARGIN_S = 300  # beyond what a pass may take, for what lies between two
_TAKE = """
umask 022
now=$(date +%s); end=$((now+{seconds})); line="{token} {who} $end"; i=0
held=; until=0; kept=
read held who until 2>/dev/null <{file}
[ "$held" = {token} ] && [ "${{until:-0}}" -gt "$now" ] && kept=1
take() {{
while [ $i -lt 30 ]; do
i=$((i+1)); held=; who=; until=0
(set -C; echo "$line" >{file}) 2>/dev/null
read held who until 2>/dev/null <{file}
[ "$held $until" = "{token} $end" ] && return 0
turn=$held
case $held in
{token}|{dead}) ;;
''|*[!0-9a-f]*) [ $i -lt 20 ] && turn= || turn=nobody;;
*) [ "${{until:-0}}" -gt "$now" ] && echo "$held $who $((until-now))" && return 3;;
esac
if [ "$turn" ] && mkdir {file}.$turn 2>/dev/null; then
again=; read again rest 2>/dev/null <{file}
[ "$again" = "$held" ] && echo "$line" >{file}.{token}.new && mv {file}.{token}.new {file}
rmdir {file}.$turn
else sleep 0.1; fi
done
echo "${{held:-nobody}} ${{who:--}} 60"; return 3
}}
echo "$line" >{file}.{token}.new || exit 1
take; code=$?; rm -f {file}.{token}.new
[ $code = 0 ] || exit $code
[ "$kept" ] && exit 0
for other in {everybody}; do
held=; who=; until=0
[ "$other" = {file} ] || read held who until 2>/dev/null <"$other"
case $held in ''|*[!0-9a-f]*|{dead}) continue;; esac
[ "${{until:-0}}" -gt "$now" ] && rm -f {file} && echo "$held $who $((until-now)) $other" && exit 3
done
exit 0
"""
_HELD = 3


class Claim:
    """The right to use a device.

    Args:
        link: the connection.
        file: path of the file there.
        everybody: pattern of the files of all logins.
    """

    def __init__(self, link: Link, file: str, everybody: str | None = None) -> None:
        self._link, self.file, self._everybody = link, file, everybody or quote(file)
        self._taken = False
        self._token, self._host = secrets.token_hex(8), re.sub(r"[^\w.-]", "-", socket.gethostname()) or "unknown"

    def take(self, seconds: float) -> None:
        """Take the device for so long, or keep it if it is ours.

        Raises:
            UserError: another bench has it; the message names it.
            Lost: the connection broke.
        """
        if (holder := self._try(seconds)) and self._is_dead(holder):
            holder = self._try(seconds, dead=holder[0])
        if holder:
            minutes = -(-int(holder[2]) // 60)
            raise UserError(
                f"--device {self._link.spec}: in use: another bench ({holder[1]}) has it for at most {minutes} more "
                f"min. Wait for it; if it is no more, remove {(holder[3:] or [self.file])[0]}* there."
            )
        self._taken = True

    def holder(self) -> str | None:
        """Which bench of another process has the device now, or None."""
        now, *lines = self._link.run(f"date +%s; cat {self._everybody} 2>/dev/null").out.splitlines()
        for held in map(str.split, lines):
            valid = len(held) == 3 and held[2].isdigit() and now.isdigit() and int(held[2]) > int(now)
            if valid and held[0] != self._token:
                return held[1]
        return None

    def is_ours(self) -> bool:
        """Whether this bench took the device and no other has since; a file that somebody removed changes nothing."""
        return self._taken and self._link.output("cat", self.file).split()[:1] in ([], [self._token])

    def release(self) -> None:
        """Let others have the device."""
        self._link.words("rm", "-f", self.file)

    def _try(self, seconds: float, dead: str = "-") -> list[str] | None:
        """Take it; or who has it: a secret, computer and process, remaining seconds, the file if another login's."""
        who = f"{self._host}:{os.getpid()}"
        words = {"token": self._token, "who": who, "seconds": round(seconds), "dead": dead}
        script = _TAKE.format(**words, file=quote(self.file), everybody=self._everybody)
        done = self._link.run(script)
        if done.code == _HELD:
            return done.out.split()
        if done.code != 0:
            reason = done.err.strip().splitlines()[-1:] or ["no reason given"]
            raise UserError(f"--device {self._link.spec}: {self.file} cannot be written: {reason[0]}.")
        return None

    def _is_dead(self, holder: list[str]) -> bool:
        """Whether it is a process of this computer that has ended."""
        host, _, pid = holder[1].rpartition(":")
        if host != self._host or not pid.isdigit():
            return False
        try:
            os.kill(int(pid), 0)
        except OSError as error:
            return error.errno == errno.ESRCH
        return False
