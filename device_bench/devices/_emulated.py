"""Whether a device is a real one: nobody's speed is that of an emulated processor."""

from device_bench.devices._link import Link

BOARDS = ("dummy-virt", "ranchu", "goldfish")
VENDOR = "/sys/class/dmi/id/sys_vendor"


def is_emulated(link: Link) -> bool:
    """Whether the processor is not a real one: another architecture's kernel beneath, or a virtual machine's board."""
    machine = link.output("uname", "-m").strip()
    beneath = link.output("cat", "/proc/sys/kernel/arch").strip()
    board = link.output("cat", "/proc/device-tree/compatible").replace("\0", " ")
    other = bool(beneath and machine and beneath != machine and not {beneath, machine} <= {"aarch64", "armv8l"})
    return other or any(name in board for name in BOARDS) or link.output("cat", VENDOR).strip() == "QEMU"
