"""The app around the runner, as far as Android's SDK is not needed: its parts agree, and Java can run the runner."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.runner_jobs import answers
from vlm.errors import UserError
from vlm.runtimes._executorch_library import HARNESS, find_sdk

APP = HARNESS / "app"
JAVA = APP / "src" / "main" / "java"
PACKAGE = "org.pocketvlm.bench"
ANDROID = "{http://schemas.android.com/apk/res/android}"
STUBS = Path(__file__).parent / "android"  # the few classes of Android that the app uses
# As `am instrument [-e job FOLDER]` does.
MAIN = """
public final class Main {
    public static void main(String[] words) {
        android.os.Bundle arguments = new android.os.Bundle();
        if (words.length > 0) {
            arguments.putString("job", words[0]);
        }
        new org.pocketvlm.bench.Bench().onCreate(arguments);
    }
}
"""


def test_manifest_gradle_java_and_the_library_name_the_same_things() -> None:
    manifest = ElementTree.parse(APP / "src" / "main" / "AndroidManifest.xml").getroot()
    (instrumentation,) = manifest.findall("instrumentation")
    name, target = (instrumentation.attrib[ANDROID + key] for key in ("name", "targetPackage"))
    assert target == PACKAGE and (JAVA / (name.replace(".", "/") + ".java")).is_file()
    gradle = (APP / "build.gradle").read_text()
    assert f"namespace '{PACKAGE}'" in gradle and f"applicationId '{PACKAGE}'" in gradle
    for source in JAVA.rglob("*.java"):
        assert f"package {PACKAGE};" in source.read_text() and source.parent == JAVA / PACKAGE.replace(".", "/")
    (library,) = re.findall(r'loadLibrary\("(\w+)"\)', (JAVA / PACKAGE.replace(".", "/") / "Runner.java").read_text())
    assert f"targets '{library}'" in gradle
    assert f"add_library({library} SHARED src/jni.cpp)" in (HARNESS / "CMakeLists.txt").read_text()


@pytest.fixture(scope="module")
def java(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Words that run a job folder in a Java process through the app's classes and its library."""
    javac, cmake = shutil.which("javac"), shutil.which("cmake")
    if javac is None or cmake is None:
        pytest.skip("no JDK or no cmake: nothing to compile the app's Java and its library with")
    home = Path(os.path.realpath(javac)).parents[1]
    if not (home / "include" / "jni.h").is_file():
        pytest.skip(f"{home} has no jni.h")
    try:
        sdk = find_sdk()
    except UserError as error:
        pytest.skip(str(error))
    work = tmp_path_factory.mktemp("java")
    (work / "Main.java").write_text(MAIN)
    sources = [str(path) for folder in (JAVA, STUBS) for path in sorted(folder.rglob("*.java"))]
    commands = [
        [javac, "-Xlint:all", "-Werror", "-d", str(work), str(work / "Main.java"), *sources],
        [cmake, "-S", str(HARNESS), "-B", str(work / "build"), f"-DCMAKE_PREFIX_PATH={sdk}", "-DJNI=ON"],
        [cmake, "--build", str(work / "build"), "--target", "pocketvlm_bench"],
    ]
    for command in commands:
        done = subprocess.run(
            command, env={**os.environ, "JAVA_HOME": str(home)}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    program = str(home / "bin" / "java")
    return [program, "-Xss1m", f"-Djava.library.path={work / 'build'}", "-cp", str(work), "Main"]


def test_the_instrumentation_gets_the_answers_of_the_runner_and_its_exit_codes(
    java: list[str], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from tests.executorch_artifacts import artifact_folder, compiled_engine
    from vlm.runtimes._executorch_library import RUNNER
    from vlm.runtimes.executorch import MODEL

    folder = artifact_folder(tmp_path_factory, "fp32")
    job = f"model {folder / MODEL}\nthreads 1\neos 999999\nmax_new_tokens 6\nrequest q - 1 5 9 13\n"
    said, found = [], []
    for name, command in {"program": [str(compiled_engine() / RUNNER)], "java": java}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "job.txt").write_text(job)
        done = subprocess.run([*command, str(tmp_path / name)], capture_output=True, text=True, check=True)
        said.append(done.stdout)
        found.append(answers(tmp_path / name))
    assert found[0] == found[1] and len(found[0]["q"]) == 6
    assert said[1] == "INSTRUMENTATION_CODE: -1 code=0\n"
    (tmp_path / "wrong").mkdir()
    for words in ([str(tmp_path / "wrong")], []):
        done = subprocess.run([*java, *words], capture_output=True, text=True, check=False)
        assert done.stdout == "INSTRUMENTATION_CODE: 0 code=2\n"
