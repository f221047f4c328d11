"""Fetches the rig's parts from the Debian archive into a folder of their own: `python -m tests.rig.fetch`.

A private apt configuration, nothing is installed on this machine, every package is verified with Debian's keyring.
`--check` fetches nothing: it says why the rig cannot be used here, and nothing if it can.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
# Folder, suite, architecture and packages (with all they depend on).
PARTS = (
    ("host", "bookworm", "amd64", ("adb", "openssh-server", "openssh-client", "g++-aarch64-linux-gnu")),
    ("emulator", "trixie", "amd64", ("qemu-user",)),
    ("llama", "sid", "arm64", ("libllama-dev",)),
    (
        "device",
        "trixie",
        "arm64",
        ("adbd", "openssh-server", "dash", "bash", "coreutils", "util-linux", "sed", "grep", "mawk", "findutils",
         "procps", "libonnxruntime-dev"),
    ),
    ("machine", "trixie", "amd64", ("qemu-system-arm",)),
    ("android", "bookworm", "amd64", ("aapt", "android-framework-res")),
    ("classes", "sid", "amd64", ("libandroid-23-java",)),
    ("kernel", "trixie", "arm64", ("linux-image-cloud-arm64", "busybox-static")),
)  # fmt: skip
DONE = "complete"
ARCHIVE = "DEBIAN_ARCHIVE"


def folder() -> Path:
    """Where the rig lies: $POCKETVLM_RIG, else ~/.cache/pocketvlm/rig."""
    chosen = os.environ.get("POCKETVLM_RIG")
    return Path(chosen) if chosen else Path.home() / ".cache" / "pocketvlm" / "rig"


def obstacle() -> str | None:
    """Why this machine cannot have the rig, or None."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return "the rig's parts are for Linux on x86-64"
    if not KEYRING.is_file() or shutil.which("apt-get") is None:
        return f"the rig needs apt-get and {KEYRING}: a Debian machine, or debian-archive-keyring installed"
    if _archive() is None:
        return f"/etc/apt names no Debian archive; name one: {ARCHIVE}=URL"
    words = ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "binfmt_misc", "none", "/mnt"]
    if subprocess.run(words, capture_output=True, check=False).returncode != 0:
        return "the rig needs Linux 6.7 or later and leave to make user namespaces: its binfmt_misc is a private one"
    return None


def fetch(root: Path) -> None:
    """Fetch and unpack every part that is not there yet."""
    for name, suite, architecture, packages in PARTS:
        if (root / name / DONE).is_file():
            continue
        shutil.rmtree(root / name, ignore_errors=True)
        for archive in _download(root / "packages" / name, suite, architecture, packages):
            if suite == "bookworm" and archive.name.startswith("libc6_"):
                continue  # those programs run with this machine's C library, which is as new or newer
            subprocess.run(["dpkg-deb", "-x", str(archive), str(root / name)], check=True)
        shutil.rmtree(root / "packages" / name)
        (root / name / DONE).touch()
    _finish(root)


def _download(work: Path, suite: str, architecture: str, packages: tuple[str, ...]) -> list[Path]:
    """Download packages and what they depend on, with a configuration that knows no other package."""
    for part in (
        "etc/sources.list.d",
        "etc/preferences.d",
        "etc/apt.conf.d",
        "lists/partial",
        "cache/archives/partial",
    ):
        (work / part).mkdir(parents=True, exist_ok=True)
    (work / "status").write_text("")
    source = f"deb [arch={architecture} signed-by={KEYRING}] {_archive()} {suite} main\n"
    (work / "etc" / "sources.list").write_text(source)
    settings = {
        "Dir::Etc": work / "etc",
        "Dir::Etc::sourcelist": work / "etc" / "sources.list",
        "Dir::Etc::sourceparts": work / "etc" / "sources.list.d",
        "Dir::State": work,
        "Dir::State::lists": work / "lists",
        "Dir::State::status": work / "status",
        "Dir::Cache": work / "cache",
        "APT::Architecture": architecture,
        "APT::Architectures::": architecture,
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "",
        "Debug::NoLocking": "1",
    }
    options = [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]
    subprocess.run(["apt-get", *options, "-q", "update"], check=True)
    subprocess.run(["apt-get", *options, "-q", "-y", "--download-only", "install", *packages], check=True)
    return sorted((work / "cache" / "archives").glob("*.deb"))


def _archive() -> str | None:
    """The Debian archive: $DEBIAN_ARCHIVE, else the one that this machine's own packages come from."""
    if chosen := os.environ.get(ARCHIVE):
        return chosen
    for file in sorted(Path("/etc/apt").glob("sources.list*/*.sources")) + sorted(
        Path("/etc/apt").glob("sources.list*")
    ):
        for line in file.read_text().splitlines() if file.is_file() else []:
            if match := re.match(r"(?:URIs:|deb)\s.*?(https?://\S+/debian)/?(?:\s|$)", line):
                return match[1]
    return None


def _finish(root: Path) -> None:
    """Put right what a package's installation would have done."""
    libraries = root / "host" / "usr" / "aarch64-linux-gnu" / "lib"
    for script in (libraries / "libc.so", libraries / "libm.so"):
        if script.is_file() and b"GROUP" in (text := script.read_bytes())[:2000]:
            script.write_bytes(text.replace(b"/usr/aarch64-linux-gnu/lib/", b""))  # found beside it wherever it lies
    device = root / "device"
    for part in ("proc", "sys", "dev", "root", "tmp", "run/sshd", "data/local/tmp", "opt/shim"):
        (device / part).mkdir(parents=True, exist_ok=True)
    (device / "data" / "local" / "tmp").chmod(0o777)
    for name, target in (("usr/bin/sh", "dash"), ("usr/bin/awk", "mawk")):
        if not (device / name).exists():
            (device / name).symlink_to(target)
    (device / "etc" / "passwd").write_text(
        "root:x:0:0:root:/root:/bin/sh\nsshd:x:101:65534::/run/sshd:/usr/sbin/nologin\n"
    )
    (device / "etc" / "group").write_text("root:x:0:\nnogroup:x:65534:\n")
    (device / "etc" / "os-release").write_text('PRETTY_NAME="Debian GNU/Linux 13 (trixie)"\n')


if __name__ == "__main__":
    why_not = obstacle()
    if sys.argv[1:] == ["--check"]:
        print(why_not or "", end="")
    elif why_not:
        sys.exit(why_not)
    else:
        fetch(folder())
        print(f"the rig lies in {folder()}")
