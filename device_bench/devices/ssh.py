"""Linux boards through ssh: tells why one cannot be reached and identifies it."""

import re
import shutil

from device_bench.devices.base import Device, call, memory_mb
from device_bench.telemetry import Identity, field
from vlm.errors import UserError

CONNECT_S = 10
UNREACHABLE = 255  # ssh's own exit code; anything else is the remote command's
# Neither user nor host may start with a dash: ssh would take it for an option.
TARGET = re.compile(
    r"(?P<user>[A-Za-z0-9_][\w.-]*)@(?P<host>[A-Za-z0-9][\w.-]*|\[[0-9A-Fa-f:.]+\])(:(?P<port>\d{1,5}))?", re.ASCII
)
# What ssh says when it fails, and what to do about it.
NEXT_STEP = {
    "Could not resolve": "Check the host's name.",
    "Connection refused": "Start the ssh server there (sudo systemctl start ssh) or check the port.",
    "timed out": "Check that the board is on and in the same network.",
    "No route to host": "Check that the board is on and in the same network.",
    "Network is unreachable": "Check this machine's network.",
    "Permission denied": "Install your key there: ssh-copy-id. Passwords cannot be typed during a measurement.",
    "Host key verification failed": "Connect once by hand to accept the host's key: ssh {user}@{host} -p {port}.",
}
FACTS = {
    "system": ["uname", "-srm"],
    "cpus": ["nproc"],
    "release": ["cat", "/etc/os-release"],
    "memory": ["cat", "/proc/meminfo"],
    "model": ["cat", "/proc/device-tree/model"],
    "processor": ["cat", "/proc/cpuinfo"],
}


class SshDevice(Device):
    """One Linux machine with a key-based login."""

    def __init__(self, user: str, host: str, port: int) -> None:
        self.user, self.host, self.port = user, host.strip("[]"), port
        self.spec = f"ssh:{user}@{host}:{port}"

    def identify(self) -> Identity:
        """Identify the machine.

        Raises:
            UserError: no ssh program, or the machine cannot be reached or does not let us in.
        """
        if shutil.which("ssh") is None:
            raise UserError(
                f"--device {self.spec}: no ssh program on the PATH. Install it: apt install openssh-client."
            )
        facts = {name: self._output(command) for name, command in FACTS.items()}
        system = facts["system"].split()
        model = facts["model"].strip().strip("\0") or None
        return Identity(
            kind="jetson" if model and ("NVIDIA" in model or "Jetson" in model) else "host",
            name=model or self.host,
            soc=field(facts["processor"], "model name"),
            os=field(facts["release"], "PRETTY_NAME", "="),
            kernel=system[1] if len(system) == 3 else None,
            arch=system[2] if len(system) == 3 else None,
            cpus=int(facts["cpus"]) if facts["cpus"].strip().isdigit() else None,
            memory_mb=memory_mb(facts["memory"]),
        )

    def _output(self, command: list[str]) -> str:
        """Output of a command there; empty where it fails, as it does where there is no such file."""
        options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_S}", "-p", str(self.port), "-l", self.user]
        done = call(["ssh", *options, "--", self.host, *command], 2 * CONNECT_S)
        if done.returncode == UNREACHABLE:
            reason = done.stderr.strip().splitlines()[-1:] or ["no message from ssh"]
            steps = (step for text, step in NEXT_STEP.items() if text in done.stderr)
            step = next(steps, "Try by hand: ssh {user}@{host} -p {port}.")
            step = step.format(user=self.user, host=self.host, port=self.port)
            raise UserError(f"--device {self.spec}: cannot be reached: {reason[0].strip()} {step}")
        return done.stdout if done.returncode == 0 else ""


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
