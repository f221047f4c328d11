"""A whole emulated arm64 computer: Debian's kernel with the device's files as its memory disk, sshd and adbd inside."""

import lzma
import os
import stat
from collections.abc import Iterator
from pathlib import Path

MODULES = ("failover", "net_failover", "virtio_net")
# Of the device's files, what a running system does without, and what it mounts something over.
LEFT_OUT = {"usr/share", "usr/include", "var", "proc", "sys", "dev", "data", "root", "tmp"}
SSH_PORT, ADBD_PORT = 22, 5555
INIT = f"""#!/opt/busybox sh
export PATH=/opt/shim:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
for place in proc:/proc sysfs:/sys devtmpfs:/dev; do /opt/busybox mount -t ${{place%:*}} none ${{place#*:}}; done
mkdir /dev/pts
/opt/busybox mount -t devpts none /dev/pts
for place in /tmp /run /root /data; do /opt/busybox mount -t tmpfs none $place; done
mkdir -p -m 755 /run/sshd /data/local/tmp
for module in {" ".join(MODULES)}; do /opt/busybox insmod /opt/modules/$module.ko; done
/opt/busybox ip link set lo up
/opt/busybox ip link set eth0 up
/opt/busybox ip addr add 10.0.2.15/24 dev eth0
libraries=/usr/lib/aarch64-linux-gnu
ADBD_PORT={ADBD_PORT} $libraries/ld-linux-aarch64.so.1 --library-path $libraries:$libraries/android \\
    /usr/lib/android-sdk/platform-tools/adbd &
exec /usr/sbin/sshd -D -e -f /dev/null -o HostKey=/opt/ssh/host -o AuthorizedKeysFile=/opt/ssh/authorized_keys \\
    -o UsePAM=no -o StrictModes=no -o PidFile=none
"""


def command(root: Path, memory_disk: Path, ssh_port: int, adbd_port: int) -> list[str]:
    """Words that start the computer; its two servers are reached on ports of 127.0.0.1, and it reaches nothing."""
    machine = root / "machine" / "usr"
    libraries = machine / "lib" / "x86_64-linux-gnu"
    forwards = f"hostfwd=tcp:127.0.0.1:{ssh_port}-:{SSH_PORT},hostfwd=tcp:127.0.0.1:{adbd_port}-:{ADBD_PORT}"
    return [
        str(libraries / "ld-linux-x86-64.so.2"),
        *("--library-path", f"{libraries}:{libraries / 'pulseaudio'}"),
        str(machine / "bin" / "qemu-system-aarch64"),
        *("-L", str(machine / "share" / "qemu"), "-M", "virt", "-cpu", "cortex-a76", "-smp", "2", "-m", "2048"),
        *("-nodefaults", "-nographic", "-serial", "stdio", "-no-reboot"),
        *("-kernel", str(next((root / "kernel" / "boot").glob("vmlinuz-*"))), "-initrd", str(memory_disk)),
        *("-append", "console=ttyAMA0 quiet panic=-1"),
        *("-netdev", f"user,id=net,restrict=on,{forwards}", "-device", "virtio-net-pci,netdev=net,romfile="),
    ]


def write_memory_disk(root: Path, to: Path) -> None:
    """Write the device's files, the network's kernel modules and what starts all as an archive that the kernel unpacks.

    Args:
        root: the rig's folder.
        to: the file that is written, in cpio's "newc" format.
    """
    with to.open("wb") as out:
        for number, (name, mode, content) in enumerate(_files(root), start=1):
            out.write(_record(number, name, mode, content))
        out.write(_record(0, "TRAILER!!!", 0, b""))


def _files(root: Path) -> Iterator[tuple[str, int, bytes]]:
    """Name, mode and content of every file of the memory disk, folders before what is in them."""
    device, kernel = root / "device", root / "kernel"
    for base, folders, files in os.walk(device):
        for name in sorted([*folders, *files]):
            path = Path(base) / name
            inside = path.relative_to(device).as_posix()
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                yield inside, mode, os.readlink(path).encode()
            elif stat.S_ISDIR(mode):
                yield inside, mode, b""
            elif "onnxruntime" not in name:  # the runner brings its own
                yield inside, mode, path.read_bytes()
        folders[:] = [name for name in folders if (Path(base) / name).relative_to(device).as_posix() not in LEFT_OUT]
    yield "opt/modules", stat.S_IFDIR | 0o755, b""
    for module in MODULES:
        packed = next((kernel / "usr" / "lib" / "modules").rglob(f"{module}.ko.xz"))
        yield f"opt/modules/{module}.ko", stat.S_IFREG | 0o644, lzma.decompress(packed.read_bytes())
    yield "opt/busybox", stat.S_IFREG | 0o755, (kernel / "usr" / "bin" / "busybox").read_bytes()
    yield "init", stat.S_IFREG | 0o755, INIT.encode()


def _record(number: int, name: str, mode: int, content: bytes) -> bytes:
    """One file: a header of thirteen hexadecimal fields, the name, the content, each filled up to four bytes."""
    words = name.encode() + b"\0"
    fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(words), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + words
    return head + b"\0" * (-len(head) % 4) + content + b"\0" * (-len(content) % 4)
