"""The connection through adb: which devices there are, in which state, and the next step for each."""

import contextlib
import re
import shutil
import subprocess
from pathlib import Path

from device_bench.devices._link import ANSWER_S, Link, Lost
from device_bench.devices.base import call, captured
from vlm.errors import UserError
from vlm.registry import did_you_mean

# What `adb devices` says of a device that cannot be used, and what to do about it.
NEXT_STEP = {
    "unauthorized": "Unlock the phone and accept 'Allow USB debugging' on its screen.",
    "offline": "Reconnect the cable, then type: adb kill-server && adb devices.",
    "no permissions": "Install Android's udev rules (Debian: android-sdk-platform-tools-common), then reconnect.",
    "recovery": "Restart the phone: adb reboot.",
    "sideload": "Restart the phone: adb reboot.",
    "bootloader": "Restart the phone: fastboot reboot.",
    "authorizing": "Wait a few seconds, then try again.",
    "connecting": "Wait a few seconds, then try again.",
}
NETWORK_SERIAL = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9][\w.-]*):\d{1,5}", re.ASCII)
# What adb says when it is about the file; anything else is the connection.
_ABOUT_FILE = ("No space left", "Permission denied", "No such file", "Read-only", "remote object")


class AdbLink(Link):
    """One device, named by its serial number or the only one connected."""

    def __init__(self, serial: str) -> None:
        self.spec = f"adb:{serial}" if serial else "adb"
        self._wanted = serial
        self.serial = serial

    def check(self) -> None:
        """Make sure that the device is connected, allowed and answers; from then on it is this one and no other."""
        self.serial = self._wanted = self._ready_serial()
        try:
            self.run("true")
        except Lost as error:
            raise UserError(
                f"--device {self.spec}: {self.serial} is connected but does not answer ({error}): it has stalled or "
                "the connection broke. Reconnect the cable; if that does not help, restart the device."
            ) from error

    def command(self, script: str) -> list[str]:
        """Run in the device's shell without a terminal."""
        return ["adb", "-s", self.serial, "shell", "-T", "-n", script]

    def send(self, file: Path, to: str, timeout_s: float) -> None:
        """Push a file and make it executable."""
        self._transfer(["push", str(file), to], timeout_s)
        self.words("chmod", "700", to)

    def fetch(self, file: str, to: Path, timeout_s: float) -> None:
        """Pull a file."""
        self._transfer(["pull", file, str(to)], timeout_s)

    def revive(self) -> None:
        """A device on the network does not come back by itself."""
        if NETWORK_SERIAL.fullmatch(self.serial):
            for verb in ("disconnect", "connect"):
                with contextlib.suppress(subprocess.TimeoutExpired):  # the next look at the device tells
                    captured(["adb", verb, self.serial], ANSWER_S)

    def _transfer(self, words: list[str], timeout_s: float) -> None:
        try:
            done = captured(["adb", "-s", self.serial, *words], timeout_s)
        except subprocess.TimeoutExpired as error:
            raise Lost(f"adb {words[0]} did not end in {timeout_s:g} s") from error
        if done.returncode != 0:
            said = (done.stderr + done.stdout).strip().splitlines()
            reason = said[-1] if said else f"adb {words[0]} ended with {done.returncode}"
            if any(text in reason for text in _ABOUT_FILE):
                raise UserError(f"--device {self.spec}: adb {words[0]} failed: {reason}")
            raise Lost(reason)

    def _ready_serial(self) -> str:
        states = self.states()
        if not states:
            raise UserError(
                f"--device {self.spec}: no device is connected. Connect it by USB, switch on USB debugging in its "
                "developer options, and look for it in: adb devices."
            )
        known = ", ".join(f"{serial} ({state})" for serial, state in states.items())
        if not self._wanted and len(states) > 1:
            first = next(iter(states))
            raise UserError(f"--device adb: several devices are connected: {known}. Name one: --device adb:{first}.")
        serial = self._wanted or next(iter(states))
        if serial not in states:
            hint = did_you_mean(serial, states)
            raise UserError(f"--device {self.spec}: no device has serial number {serial}.{hint} Connected: {known}.")
        if (state := states[serial]) != "device":
            step = next((step for name, step in NEXT_STEP.items() if state.startswith(name)), "Look at: adb devices.")
            raise UserError(f"--device {self.spec}: {serial} is in state {state!r}, 'device' is expected. {step}")
        return serial

    def states(self) -> dict[str, str]:
        """Serial -> state of everything connected, as `adb devices` lists it.

        Raises:
            UserError: there is no adb, or it fails.
        """
        if shutil.which("adb") is None:
            raise UserError(
                f"--device {self.spec}: no adb program on the PATH. Install Android's platform-tools "
                "(Debian, Ubuntu: apt install adb; macOS: brew install android-platform-tools)."
            )
        listing = call(["adb", "devices"], ANSWER_S)
        if listing.returncode != 0:
            reason = listing.stderr.strip()
            raise UserError(f"--device {self.spec}: adb devices failed: {reason}. Try: adb kill-server.")
        rows = (line.split("\t", 1) for line in listing.stdout.splitlines() if "\t" in line)
        return {serial.strip(): state.strip() for serial, state in rows}
