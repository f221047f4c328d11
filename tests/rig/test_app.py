"""The app's manifest and its Java, compiled against Android's own resources and classes (Debian's builds of them)."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.rig.fetch import folder
from vlm.runtimes._executorch_library import HARNESS

MAIN = HARNESS / "app" / "src" / "main"
MANIFEST = MAIN / "AndroidManifest.xml"
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


def test_the_java_compiles_against_androids_classes(tmp_path: Path) -> None:
    javac = shutil.which("javac")
    if javac is None:
        pytest.skip("no JDK")
    android = next(path for path in (folder() / "classes").rglob("*.jar") if path.stat().st_size > 2**20)
    # Android 6, older than any that the app runs on; its classes take the place of Java's own.
    words = ["-source", "8", "-target", "8", "-bootclasspath", str(android), "-Xlint:all,-options", "-Werror"]
    sources = [str(path) for path in sorted((MAIN / "java").rglob("*.java"))]
    done = subprocess.run([javac, *words, "-d", str(tmp_path), *sources], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.stem for path in tmp_path.rglob("*.class")) == ["Bench", "Runner"]
