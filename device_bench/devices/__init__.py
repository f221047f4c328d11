"""Places where artifacts are measured; one file each, found by the first word of `--device KIND[:TARGET]`."""

from device_bench.devices.base import Device
from vlm.registry import load


def open_device(spec: str) -> Device:
    """Return the device that `spec` names: local, adb[:SERIAL] or ssh:USER@HOST[:PORT].

    Raises:
        UserError: there is no such kind of device, or its target is not well formed.
    """
    kind, _, target = spec.partition(":")
    device: Device = load("device_bench.devices", kind).open(target)
    return device
