"""Wrappers that let the Debian programs of the rig run where they were unpacked."""

import subprocess
from pathlib import Path

TRIPLET = "aarch64-linux-gnu"
HERE = Path(__file__).parent


def host_environment(root: Path) -> dict[str, str]:
    """What programs of the rig's folder "host" need to find their libraries."""
    return {"LD_LIBRARY_PATH": str(root / "host" / "usr" / "lib" / "x86_64-linux-gnu")}


def write_programs(root: Path, work: Path, device: Path) -> None:
    """Write wrappers for adb, ssh and the cross compiler into work/bin, and the device's library that confines adbd."""
    host = root / "host" / "usr"
    (libraries,) = host_environment(root).values()
    config = f"-o UserKnownHostsFile={work / 'known_hosts'} -i {work / 'key'} -o IdentitiesOnly=yes -F none"
    adb = host / "lib" / "android-sdk" / "platform-tools" / "adb"
    programs = {
        "adb": f"HOME={work} LD_LIBRARY_PATH={libraries}:{libraries}/android exec {adb}",
        "ssh": f"LD_LIBRARY_PATH={libraries} exec {host / 'bin' / 'ssh'} {config}",
        "scp": "exit 1",
    }
    for tool in ("g++", "readelf"):
        program = host / "bin" / f"{TRIPLET}-{tool}"
        programs[program.name] = f"LD_LIBRARY_PATH={libraries} exec {program}"
    for name, text in programs.items():
        (work / "bin" / name).write_text(f'#!/bin/sh\n{text} "$@"\n')
        (work / "bin" / name).chmod(0o755)
    library = device / "opt" / "loopback.so"
    if not library.exists():
        words = ["-x", "c", "-shared", "-fPIC", "-O1", "-o", str(library), str(HERE / "loopback.c")]
        subprocess.run([str(work / "bin" / f"{TRIPLET}-g++"), *words], check=True)
