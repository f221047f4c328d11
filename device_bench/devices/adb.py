"""Android devices through adb: no app and no NDK, only a folder that is removed at the end."""

import re

from device_bench.devices._adb_link import NETWORK_SERIAL, AdbLink
from device_bench.devices._emulated import is_emulated
from device_bench.devices._remote import RemoteDevice
from device_bench.devices.base import as_folder, memory_mb
from device_bench.sensors import properties
from device_bench.sensors.base import known
from device_bench.telemetry import Identity, device_id
from vlm.errors import UserError

# The one place where adb's user may write and execute.
ROOT = "/data/local/tmp/.pocketvlm-bench"
FIXED_CLOCKS = "cmd power set-fixed-performance-mode-enabled {}"


class AdbDevice(RemoteDevice):
    """One Android device, named by its serial number or the only one connected."""

    android = True

    def __init__(self, serial: str) -> None:
        super().__init__(AdbLink(serial))
        self._fixed_clocks = False

    @property
    def folder_name(self) -> str:
        """The phone's own, whether the user has named it or not: the next one must not replace its results."""
        return as_folder(f"adb:{self.serial}")

    def root(self) -> str:
        """The folder on the device that is ours."""
        return ROOT

    def look(self) -> Identity:
        """Identify the device over a connection that works."""
        text = self.link.output("getprop")
        kernel, cpus = self.link.output("uname", "-r").strip(), self.link.output("nproc").strip()
        memory = memory_mb(self.link.output("cat", "/proc/meminfo"))
        emulated = is_emulated(self.link)
        said, all_of_it = properties.identity(text), properties.properties(text)
        version, build = known(said.android), all_of_it.get("ro.build.id", "")
        return Identity(
            kind="emulated" if said.emulated or emulated else "phone",
            name=known(said.name) or self.serial,
            soc=known(said.soc),
            os=f"Android {version} {build}".strip() if version else None,
            kernel=kernel or None,
            arch=known(said.abi),
            cpus=int(cpus) if cpus.isdigit() else None,
            memory_mb=memory,
            id=device_id(all_of_it.get("ro.serialno") or self.serial),
        )

    def begin_timing(self) -> bool:
        """Ask Android 11 and later for clocks that can be held without heat; older ones have no such mode."""
        self._fixed_clocks = True  # as long as it is unknown whether the command arrived
        self._fixed_clocks = self.link.run(FIXED_CLOCKS.format("true")).code == 0
        return self._fixed_clocks

    def orphaned(self) -> str:
        """The script that restores what a bench that is no more has left."""
        restore = f"{FIXED_CLOCKS.format('false')}; " if self._fixed_clocks else ""
        return restore + super().orphaned()

    def end_timing(self) -> None:
        """Give the clocks back to the system."""
        if self._fixed_clocks:
            self.link.run(FIXED_CLOCKS.format("false"))
            self._fixed_clocks = False

    @property
    def serial(self) -> str:
        """The serial number, known once the device was found."""
        assert isinstance(self.link, AdbLink)
        return self.link.serial


def open(target: str) -> AdbDevice:
    """Return the device with serial number `target`, or the only one if it is empty.

    Raises:
        UserError: the serial number could not be one.
    """
    if target and not NETWORK_SERIAL.fullmatch(target) and not re.fullmatch(r"[A-Za-z0-9][\w.:-]*", target, re.ASCII):
        raise UserError(f"--device adb:{target}: not a serial number. Copy it from: adb devices.")
    return AdbDevice(target)
