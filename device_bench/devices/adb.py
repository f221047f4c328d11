"""Android devices through adb: tells their states apart and identifies them."""

import re
import shutil

from device_bench.devices.base import Device, call, memory_mb
from device_bench.telemetry import Identity
from vlm.errors import UserError
from vlm.registry import did_you_mean

TIMEOUT_S = 20.0
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


class AdbDevice(Device):
    """One Android device, named by its serial number or the only one connected."""

    def __init__(self, serial: str) -> None:
        self.spec = f"adb:{serial}" if serial else "adb"
        self._serial = serial

    def identify(self) -> Identity:
        """Identify the device.

        Raises:
            UserError: no adb program, no device, several without a serial, an unknown serial, or one that is not ready.
        """
        serial = self._ready_serial()
        properties = dict(re.findall(r"^\[(.+?)\]: \[(.*)\]\r?$", self._shell(serial, "getprop"), re.MULTILINE))
        version, build = properties.get("ro.build.version.release"), properties.get("ro.build.id", "")
        emulated = "1" in (properties.get("ro.kernel.qemu"), properties.get("ro.boot.qemu"))
        cpus = self._shell(serial, "nproc").strip()
        return Identity(
            kind="emulated" if emulated else "phone",
            name=" ".join(filter(None, map(properties.get, ("ro.product.manufacturer", "ro.product.model")))) or serial,
            soc=properties.get("ro.soc.model") or properties.get("ro.board.platform"),
            os=f"Android {version} {build}".strip() if version else None,
            kernel=self._shell(serial, "uname", "-r").strip() or None,
            arch=properties.get("ro.product.cpu.abi"),
            cpus=int(cpus) if cpus.isdigit() else None,
            memory_mb=memory_mb(self._shell(serial, "cat", "/proc/meminfo")),
        )

    def _ready_serial(self) -> str:
        states = self._states()
        if not states:
            raise UserError(
                f"--device {self.spec}: no device is connected. Connect it by USB, switch on USB debugging in its "
                "developer options, and look for it in: adb devices."
            )
        known = ", ".join(f"{serial} ({state})" for serial, state in states.items())
        if not self._serial and len(states) > 1:
            first = next(iter(states))
            raise UserError(f"--device adb: several devices are connected: {known}. Name one: --device adb:{first}.")
        serial = self._serial or next(iter(states))
        if serial not in states:
            hint = did_you_mean(serial, states)
            raise UserError(f"--device {self.spec}: no device has this serial number.{hint} Connected: {known}.")
        if (state := states[serial]) != "device":
            step = next((step for name, step in NEXT_STEP.items() if state.startswith(name)), "Look at: adb devices.")
            raise UserError(f"--device {self.spec}: {serial} is in state {state!r}, 'device' is expected. {step}")
        return serial

    def _states(self) -> dict[str, str]:
        """Serial -> state of everything connected, as `adb devices` lists it."""
        if shutil.which("adb") is None:
            raise UserError(
                f"--device {self.spec}: no adb program on the PATH. Install Android's platform-tools "
                "(Debian, Ubuntu: apt install adb; macOS: brew install android-platform-tools)."
            )
        listing = call(["adb", "devices"], TIMEOUT_S)
        if listing.returncode != 0:
            reason = listing.stderr.strip()
            raise UserError(f"--device {self.spec}: adb devices failed: {reason}. Try: adb kill-server.")
        rows = (line.split("\t", 1) for line in listing.stdout.splitlines() if "\t" in line)
        return {serial.strip(): state.strip() for serial, state in rows}

    def _shell(self, serial: str, *command: str) -> str:
        done = call(["adb", "-s", serial, "shell", *command], TIMEOUT_S)
        if done.returncode != 0:
            reason = (done.stderr or done.stdout).strip()
            words = " ".join(command)
            raise UserError(f"--device {self.spec}: {words!r} failed there: {reason}. Reconnect it and try again.")
        return done.stdout


def open(target: str) -> AdbDevice:
    """Return the device with serial number `target`, or the only one if it is empty.

    Raises:
        UserError: the serial number could not be one.
    """
    if target and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:\[\]-]*", target):
        raise UserError(f"--device adb:{target}: not a serial number. Copy it from: adb devices.")
    return AdbDevice(target)
