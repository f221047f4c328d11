"""The connection through ssh: one login for all commands, and the next step for each way in which it can fail."""

import atexit
import contextlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from device_bench.devices._link import Link, Lost, quote
from device_bench.devices.base import captured
from vlm.errors import UserError

CONNECT_S = 10
UNREACHABLE = 255  # ssh's own exit code; anything else is the remote command's
# What ssh says when it fails, and what to do about it.
NEXT_STEP = {
    "Could not resolve": "Check the host's name.",
    "Connection refused": "Start the ssh server there (sudo systemctl start ssh) or check the port.",
    "timed out": "Check that the board is on and in the same network.",
    "No route to host": "Check that the board is on and in the same network.",
    "Network is unreachable": "Check this machine's network.",
    "Permission denied": "Install your key there: ssh-copy-id. Passwords cannot be typed during a measurement.",
    "REMOTE HOST IDENTIFICATION HAS CHANGED": "It is another machine, or was installed anew. If you know why, forget "
    "the old key: ssh-keygen -R '{address}'.",
    "Host key verification failed": "Connect once by hand to accept the host's key: ssh {user}@{host} -p {port}.",
}


def by_sh(script: str) -> str:
    """A command that runs `script` by sh under any login shell.

    csh ends a quoted word at a newline and expands ! in it, zsh splits and globs otherwise, fish reads \\' in quotes:
    one line of characters that mean nothing to any of them.
    """
    plain = "".join(f"\\0{ord(char):03o}" if char in "\\'!\n" else char for char in script)
    return f"exec sh -c 'eval \"$(printf %b \"$1\")\"' sh '{plain}'"


class SshLink(Link):
    """One Linux machine with a key-based login."""

    def __init__(self, user: str, host: str, port: int) -> None:
        self.user, self.host, self.port = user, host.strip("[]"), port
        self.spec = f"ssh:{user}@{host}:{port}"
        self._socket: Path | None = None

    def check(self) -> None:
        """Make sure that the machine lets us in."""
        if shutil.which("ssh") is None:
            raise UserError(
                f"--device {self.spec}: no ssh program on the PATH. Install it: apt install openssh-client."
            )
        try:
            done = subprocess.run(
                self.command("true"),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=2 * CONNECT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise UserError(
                f"--device {self.spec}: no answer in {2 * CONNECT_S} s: the machine has stalled. Restart it."
            ) from error
        if done.returncode == UNREACHABLE:
            raise UserError(f"--device {self.spec}: cannot be reached: {self._advice(done.stderr)}")

    def command(self, script: str) -> list[str]:
        """Run by sh, whatever the login's shell is; all commands share one connection."""
        return ["ssh", *self._options(), "-p", str(self.port), "-l", self.user, "--", self.host, by_sh(script)]

    def send(self, file: Path, to: str, timeout_s: float) -> None:
        """Write a file through the shell: no sftp server is needed there."""
        script = f"umask 077; cat > {quote(to)} && chmod 700 {quote(to)}"
        with file.open("rb") as content:
            self._transfer(script, content.fileno(), subprocess.PIPE, timeout_s)

    def fetch(self, file: str, to: Path, timeout_s: float) -> None:
        """Read a file through the shell."""
        with to.open("wb") as content:
            self._transfer(f"cat {quote(file)}", subprocess.DEVNULL, content.fileno(), timeout_s)

    def _transfer(self, script: str, source: int, target: int, timeout_s: float) -> None:
        try:
            done = subprocess.run(
                self.command(script),
                stdin=source,
                stdout=target,
                stderr=subprocess.PIPE,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise Lost(f"the transfer did not end in {timeout_s:g} s") from error
        said = done.stderr.decode(errors="replace").strip()
        if done.returncode == UNREACHABLE:
            raise Lost(said.splitlines()[-1] if said else "the connection closed")
        if done.returncode != 0:
            raise UserError(f"--device {self.spec}: the transfer failed: {said or f'exit code {done.returncode}'}")

    def _options(self) -> list[str]:
        if self._socket is None:
            # A socket's path may have about 100 characters: not below the project's folder.
            folder = tempfile.mkdtemp(prefix="pocketvlm-ssh-")
            self._socket = Path(folder) / "control"
            atexit.register(self.close)
        options = {
            "BatchMode": "yes",
            "ConnectTimeout": CONNECT_S,
            "ServerAliveInterval": 5,
            "ServerAliveCountMax": 3,
            "ControlMaster": "auto",
            "ControlPath": self._socket,
            "ControlPersist": 60,
        }
        return [word for name, value in options.items() for word in ("-o", f"{name}={value}")]

    def close(self) -> None:
        """End the shared connection."""
        if self._socket is not None:
            arguments = ["ssh", "-o", f"ControlPath={self._socket}", "-O", "exit", "--", self.host]
            if shutil.which("ssh"):
                with contextlib.suppress(subprocess.TimeoutExpired):  # it ends by itself after ControlPersist
                    captured(arguments, CONNECT_S)
            shutil.rmtree(os.path.dirname(self._socket), ignore_errors=True)
            self._socket = None

    def revive(self) -> None:
        """Forget a shared connection that broke."""
        self.close()

    def _advice(self, stderr: str) -> str:
        reason = (stderr.strip().splitlines() or ["no message from ssh"])[-1].strip().rstrip(".")
        step = next(
            (step for text, step in NEXT_STEP.items() if text in stderr), "Try by hand: ssh {user}@{host} -p {port}."
        )
        address = f"[{self.host}]:{self.port}" if self.port != 22 else self.host
        return f"{reason}. {step.format(user=self.user, host=self.host, port=self.port, address=address)}"
