"""Enters an arm64 root on another processor: `python arm64.py ROOT QEMU [--sys FOLDER | --join PID] COMMAND...`.

--sys puts the folders in FOLDER in the place of those in the device's /sys/class. --join enters the namespaces of a
process that is inside already, so that all are one device's processes.

The emulator is registered in a binfmt_misc instance of a private user and mount namespace (Linux 6.7 or later), so that
nothing outside changes and it works with and without root.
"""

import ctypes
import os
import sys
import tempfile

NEW_MOUNTS, NEW_USER = 0x20000, 0x10000000
BIND, RECURSIVE, PRIVATE = 4096, 16384, 1 << 18
MAGIC = r"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00"
MASK = r"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff"
ENVIRONMENT = {"HOME": "/root", "PATH": "/opt/shim:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    """Raise the error of a failed system call."""
    if result != 0:
        raise OSError(ctypes.get_errno(), what)


def mount(source: str, target: str, kind: str | None = None, flags: int = 0) -> None:
    """Mount or bind."""
    check(libc.mount(source.encode(), target.encode(), kind.encode() if kind else None, flags, None), f"mount {target}")


def enter(root: str, emulator: str, system: str | None, command: list[str]) -> None:
    """Become the command inside; called in the child, whose ids the parent has mapped."""
    os.setgid(0)
    os.setuid(0)
    mount("none", "/", None, PRIVATE | RECURSIVE)
    register = tempfile.mkdtemp(prefix="binfmt")
    mount("none", register, "binfmt_misc")
    with open(f"{register}/register", "w") as file:
        file.write(f":aarch64:M::{MAGIC}:{MASK}:{emulator}:F")
    for name in ("sys", "proc", "dev"):
        mount(f"/{name}", f"{root}/{name}", None, BIND | RECURSIVE)
    for name in os.listdir(system) if system else ():
        mount(f"{system}/{name}", f"{root}/sys/class/{name}", None, BIND)
    os.chroot(root)
    os.chdir("/")
    os.execvpe(command[0], command, {**os.environ, **ENVIRONMENT})


def join(root: str, pid: str, command: list[str]) -> None:
    """Become the command beside a process that is inside."""
    spaces = [os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY) for kind in ("user", "mnt")]
    for space in spaces:
        check(libc.setns(space, 0), "setns")
        os.close(space)
    os.setgid(0)
    os.setuid(0)
    os.chroot(root)
    os.chdir("/")
    os.execvpe(command[0], command, {**os.environ, **ENVIRONMENT})


def main(arguments: list[str]) -> int:
    """Run a command inside and return its exit code."""
    root, emulator, *command = arguments
    system = None
    if command[0] == "--join":
        join(root, command[1], command[2:])
    if command[0] == "--sys":
        system, command = command[1], command[2:]
    is_root = os.getuid() == 0
    unshared, mapped = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        libc.prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL: nothing inside outlives this process
        check(libc.unshare(NEW_MOUNTS | NEW_USER), "unshare")
        os.write(unshared[1], b"x")
        os.read(mapped[0], 1)
        if is_root:
            os.setgroups([])
        enter(root, emulator, system, command)
    os.read(unshared[0], 1)
    if not is_root:
        with open(f"/proc/{child}/setgroups", "w") as file:
            file.write("deny")
    for kind, own in (("uid", os.getuid()), ("gid", os.getgid())):
        with open(f"/proc/{child}/{kind}_map", "w") as file:
            file.write(f"0 {own} {65536 if is_root else 1}")
    os.write(mapped[1], b"x")
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) % 256


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
