"""The app's manifest, compiled by Android's own packager against Android's own resources (Debian's builds of both)."""

import os
import subprocess
from pathlib import Path

from tests.rig.fetch import folder
from vlm.runtimes._executorch_library import HARNESS

MANIFEST = HARNESS / "app" / "src" / "main" / "AndroidManifest.xml"
PACKAGE = "org.pocketvlm.bench"


def test_the_manifest_compiles_and_names_the_instrumentation(tmp_path: Path) -> None:
    root = folder() / "android" / "usr"
    libraries = root / "lib" / "x86_64-linux-gnu"
    places = [libraries, libraries / "android", next(root.rglob("7z.so")).parent]
    environment = {**os.environ, "LD_LIBRARY_PATH": ":".join(map(str, places))}
    aapt = str(root / "lib" / "android-sdk" / "build-tools" / "debian" / "aapt")
    resources = str(root / "share" / "android-framework-res" / "framework-res.apk")
    # Gradle puts the package's name in; aapt alone wants it there.
    text = MANIFEST.read_text().replace("<manifest ", f'<manifest package="{PACKAGE}" ')
    (tmp_path / "AndroidManifest.xml").write_text(text)
    package = ["package", "-M", str(tmp_path / "AndroidManifest.xml"), "-I", resources, "-F", str(tmp_path / "app.apk")]
    subprocess.run([aapt, *package, "--min-sdk-version", "26"], env=environment, check=True)
    show = [aapt, "dump", "xmltree", str(tmp_path / "app.apk"), "AndroidManifest.xml"]
    shown = subprocess.run(show, env=environment, capture_output=True, text=True, check=True).stdout
    assert f'android:name(0x01010003)="{PACKAGE}.Bench"' in shown
    assert f'android:targetPackage(0x01010021)="{PACKAGE}"' in shown
