"""Starts and stops the rig's servers on free ports of 127.0.0.1, and puts adb and ssh for them on the PATH."""

import contextlib
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.rig import machine
from tests.rig.fetch import DONE, PARTS, folder
from tests.rig.heat import Heat
from tests.rig.programs import TRIPLET, host_environment, write_programs
from tests.rig.sockets import LOOPBACK, free_port, listening, of_processes

HERE = Path(__file__).parent
SERVERS = r"adbd|sshd|arm64\.py|sleep infinity"
ASKED = "RIG"  # set by `make test-rig`
GETPROP = {
    "ro.product.manufacturer": "Rig",
    "ro.product.model": "emulated arm64",
    "ro.product.cpu.abi": "arm64-v8a",
    "ro.build.version.release": "16",
    "ro.build.id": "RIG1",
    "ro.build.fingerprint": "rig/arm64/arm64:16/RIG1/1:user/test-keys",
    "ro.boot.qemu": "1",
}


def missing() -> str | None:
    """Why the rig is not used now, or None."""
    if not os.environ.get(ASKED):
        return "emulated devices take minutes and 1.5 GB: make test-rig"
    root = folder()
    return None if all((root / part / DONE).is_file() for part, *_ in PARTS) else f"no rig in {root}: make test-rig"


def until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Wait for something to become true."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds} s")
        time.sleep(0.05)


class Rig:
    """An emulated arm64 device and the programs of this machine that talk to it.

    Args:
        work: an empty folder for keys, logs and wrappers.
    """

    def __init__(self, work: Path) -> None:
        self.root, self.work = folder(), work
        self.device = self.root / "device"
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self.heat = Heat(work / "class", lambda: list(self._emulated()))
        self._turn = (self.root / "turn").open("w")
        fcntl.flock(self._turn, fcntl.LOCK_EX)  # two rigs would have one device's files
        self.bin = work / "bin"
        self.bin.mkdir(parents=True)
        self.adb_server, self.adbd_port, self.ssh_port = free_port(), free_port(), free_port()
        self.serial = f"127.0.0.1:{self.adbd_port}"
        write_programs(self.root, work, self.device)
        self.say("getprop", "\n".join(f"[{key}]: [{value}]" for key, value in GETPROP.items()))

    @property
    def environment(self) -> dict[str, str]:
        """What must be set for `adb` and `ssh` to find the rig."""
        return {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "ANDROID_ADB_SERVER_PORT": str(self.adb_server),
            "LLAMACPP_ROOT": str(self.root / "llama"),
            "ONNXRUNTIME_HEADERS": str(self.device / "usr" / "include" / "onnxruntime"),
        }

    def say(self, program: str, output: str) -> None:
        """Put a program on the device's PATH that prints something."""
        shim = self.device / "opt" / "shim" / program
        shim.write_text(f"#!/bin/sh\ncat <<'END_OF_OUTPUT'\n{output}\nEND_OF_OUTPUT\n")
        shim.chmod(0o755)

    def start_adbd(self) -> None:
        """Start the device's adbd, confined to 127.0.0.1, and connect adb to it."""
        self.start_adbd_only()
        self.connect()

    def connect(self, serial: str = "") -> None:
        """Connect adb to a device, the rig's own if none is named, if it is not connected."""
        serial = serial or self.serial

        def connected() -> bool:
            if self.adb("-s", serial, "get-state").strip() == "device":
                return True
            self.adb("disconnect", serial)
            self.adb("connect", serial)
            return False

        until(connected, 60, "adb connect")

    def disconnect(self, serial: str) -> None:
        """Let adb forget a device."""
        self.adb("disconnect", serial)
        until(lambda: serial not in self.adb("devices"), 20, "disconnect")

    def start_adbd_only(self) -> None:
        """Start adbd; whoever waits for the device connects."""
        libraries = f"/usr/lib/{TRIPLET}"
        adbd = "/usr/lib/android-sdk/platform-tools/adbd"
        command = [f"{libraries}/ld-linux-aarch64.so.1", "--preload", "/opt/loopback.so"]
        command += ["--library-path", f"{libraries}:{libraries}/android", adbd]
        self._start("adbd", self._inside(command), {"ADBD_PORT": str(self.adbd_port)}, self.adbd_port)

    def start_sshd(self) -> None:
        """Start the device's sshd on 127.0.0.1 with keys of its own."""
        keys = self.device / "opt" / "ssh"
        keys.mkdir(parents=True, exist_ok=True)
        for name in ("host", "user"):
            if not (keys / name).exists():
                self._tool("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / name))
        shutil.copy(keys / "user.pub", keys / "authorized_keys")
        shutil.copy(keys / "user", self.work / "key")
        (self.work / "key").chmod(0o600)
        options = {
            "HostKey": "/opt/ssh/host",
            "AuthorizedKeysFile": "/opt/ssh/authorized_keys",
            "ListenAddress": f"127.0.0.1:{self.ssh_port}",
            "PasswordAuthentication": "no",
            "UsePAM": "no",
            "StrictModes": "no",
            "PidFile": "none",
        }
        words = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
        self._start("sshd", self._inside(["/usr/sbin/sshd", "-D", "-e", "-f", "/dev/null", *words]), {}, self.ssh_port)
        self._know(self.ssh_port)

    def start_machine(self) -> tuple[str, int]:
        """Start a whole computer with the device's files and keys; returns its serial number and its sshd's port."""
        ssh_port, adbd_port = free_port(), free_port()
        memory_disk = self.work / "memory-disk"
        machine.write_memory_disk(self.root, memory_disk)
        self._start("machine", machine.command(self.root, memory_disk, ssh_port, adbd_port), {}, adbd_port)
        self._know(ssh_port)
        until(lambda: self.ssh(ssh_port, "true").returncode == 0, 120, "the machine's sshd")
        serial = f"127.0.0.1:{adbd_port}"
        self.connect(serial)
        return serial, ssh_port

    def ssh(self, port: int, script: str) -> subprocess.CompletedProcess[str]:
        """Run a script over ssh."""
        words = [str(self.bin / "ssh"), "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", "-p", str(port)]
        return subprocess.run([*words, "root@127.0.0.1", script], capture_output=True, text=True, check=False)

    def _know(self, port: int) -> None:
        kind, key, *_ = (self.device / "opt" / "ssh" / "host.pub").read_text().split()
        with (self.work / "known_hosts").open("a") as file:
            file.write(f"[127.0.0.1]:{port} {kind} {key}\n")

    def stop(self, name: str) -> None:
        """Kill a server with all that it started."""
        process = self._running.pop(name)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def close(self) -> None:
        """Stop everything and forget the device's files."""
        if self.adb_started:
            self.adb("kill-server")
        for name in sorted(self._running, key=lambda name: name == "init"):
            self.stop(name)
        self._turn.close()

    adb_started = False

    def adb(self, *words: str) -> str:
        """Run adb and return what it prints."""
        self.adb_started = True
        done = subprocess.run(
            [str(self.bin / "adb"), *words],
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done.stdout

    def elsewhere(self) -> set[str]:
        """Addresses other than 127.0.0.1 on which a process of this one, of the device or the adb server listens."""
        servers = [server for server in Path("/proc").glob("[0-9]*") if self._is_adb_server(server)]
        return of_processes({*self._emulated(), *map(int, (server.name for server in servers))}) - LOOPBACK

    def _is_adb_server(self, process: Path) -> bool:
        try:
            return str(self.adb_server).encode() in (process / "cmdline").read_bytes()
        except OSError:
            return False

    def left(self) -> list[str]:
        """Our files and processes on the device."""
        return self.files() + self.processes()

    def files(self) -> list[str]:
        """What lies where devices let us write."""
        places = [self.device / place for place in ("data/local/tmp", "root", "tmp")]
        return sorted(path.name for place in places for path in place.iterdir())

    def processes(self) -> list[str]:
        """Command lines of the emulated processes that are no server."""
        return [words for words in self._emulated().values() if not re.search(SERVERS, words)]

    def unplug(self, name: str) -> None:
        """Kill a server with all its connections."""
        self.stop(name)
        for pid, words in self._emulated().items():
            if name in words:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def plug(self, name: str) -> None:
        """Start a server again; whoever waits for the device connects."""
        {"adbd": self.start_adbd_only, "sshd": self.start_sshd}[name]()

    def _emulated(self) -> dict[int, str]:
        """Command lines of all processes on the device, by their id."""
        found = {}
        for place in Path("/proc").glob("[0-9]*"):
            try:
                inside = os.readlink(place / "root") == str(self.device)
                words = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if inside and words:
                found[int(place.name)] = words
        return found

    def _inside(self, command: list[str]) -> list[str]:
        """A command on the device: beside its first process, which keeps its namespaces as long as the rig lives."""
        emulator = self.root / "emulator" / "usr" / "bin" / "qemu-aarch64"
        enter = [sys.executable, str(HERE / "arm64.py"), str(self.device), str(emulator)]
        if "init" not in self._running:
            words = [*enter, "--sys", str(self.heat.folder), "/usr/bin/sleep", "infinity"]
            self._running["init"] = subprocess.Popen(words, stdin=subprocess.DEVNULL, start_new_session=True)
            until(self._first_process, 30, "the device's first process")
        return [*enter, "--join", str(self._first_process()), *command]

    def _first_process(self) -> int | None:
        parent = self._running["init"].pid
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        inside = [int(pid) for pid in children if os.readlink(f"/proc/{pid}/root") == str(self.device)]
        return inside[0] if inside else None

    def _start(self, name: str, command: list[str], more: Mapping[str, str], port: int) -> None:
        with (self.work / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(
                command,
                env={**os.environ, **more},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        until(lambda: listening(port), 60, f"{name} on port {port}")
        if not listening(port) <= LOOPBACK:
            self.stop(name)
            raise RuntimeError(f"{name} listens on {listening(port)}, not on 127.0.0.1 alone")

    def _tool(self, name: str, *words: str) -> None:
        program = str(self.root / "host" / "usr" / "bin" / name)
        subprocess.run([program, *words], env={**os.environ, **host_environment(self.root)}, check=True)
