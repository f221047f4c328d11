"""Linux boards through ssh: nothing is installed there, and the one folder that is made is removed at the end."""

import re
from functools import cached_property

from device_bench.devices._claim import Claim
from device_bench.devices._emulated import is_emulated
from device_bench.devices._link import quote
from device_bench.devices._remote import RemoteDevice
from device_bench.devices._ssh_link import SshLink
from device_bench.devices.base import memory_mb
from device_bench.telemetry import Identity, device_id, field
from vlm.errors import UserError

# Neither user nor host may start with a dash: ssh would take it for an option.
TARGET = re.compile(
    r"(?P<user>[A-Za-z0-9_][\w.-]*)@(?P<host>[A-Za-z0-9][\w.-]*|\[[0-9A-Fa-f:.]+\])(:(?P<port>\d{1,5}))?", re.ASCII
)
LOCK = ".pocketvlm-bench-{}.lock"


class SshDevice(RemoteDevice):
    """One Linux machine with a key-based login."""

    def __init__(self, user: str, host: str, port: int) -> None:
        super().__init__(SshLink(user, host, port))
        self._host = host
        self.shared = "/tmp"  # where all logins can leave and read a file

    @cached_property
    def claim(self) -> Claim:
        """The right to use the machine, which no other login has meanwhile."""
        user = self.link.output("id", "-u").strip()
        return Claim(self.link, f"{self.shared}/{LOCK.format(user)}", f"{quote(self.shared)}/{LOCK.format('*')}")

    def root(self) -> str:
        """The folder on the machine that is ours, in the login's home."""
        # Without symbolic links, as /proc/PID/cwd names it.
        return f"{self.link.run('cd && pwd -P').out.strip()}/.pocketvlm-bench"

    def look(self) -> Identity:
        """Identify the device over a connection that works."""
        system = self.link.output("uname", "-srm").split()
        model = self.link.output("cat", "/proc/device-tree/model").strip().strip("\0") or None
        cpus = self.link.output("nproc").strip()
        processor, release, memory = (
            self.link.output("cat", path) for path in ("/proc/cpuinfo", "/etc/os-release", "/proc/meminfo")
        )
        serial = self.link.output("cat", "/proc/device-tree/serial-number") or self.link.output(
            "cat", "/etc/machine-id"
        )
        emulated = is_emulated(self.link)
        jetson = model is not None and ("NVIDIA" in model or "Jetson" in model)
        return Identity(
            kind="emulated" if emulated else "jetson" if jetson else "host",
            name=model or self._host,
            soc=field(processor, "model name"),
            os=field(release, "PRETTY_NAME", "="),
            kernel=system[1] if len(system) == 3 else None,
            arch=system[2] if len(system) == 3 else None,
            cpus=int(cpus) if cpus.isdigit() else None,
            memory_mb=memory_mb(memory),
            id=device_id(serial or self._host),
        )


def open(target: str) -> SshDevice:
    """Return the machine USER@HOST[:PORT], port 22 if not given.

    Raises:
        UserError: the target is not of this form.
    """
    match = TARGET.fullmatch(target)
    port = int((match and match["port"]) or 22)
    if match is None or not 0 < port < 65536:
        raise UserError(f"--device ssh:{target}: expected ssh:USER@HOST[:PORT], for example ssh:nvidia@10.0.0.5:22.")
    return SshDevice(match["user"], match["host"], port)
