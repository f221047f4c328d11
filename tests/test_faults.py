"""What can go wrong in a user's hands ends in one clear message, never in a traceback or a wrong result."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from pocketvlm.commands.ask import ask
from pocketvlm.pipeline import RunConfig
from tests.manifests import write_manifest
from vlm.errors import UserError
from vlm.manifest import read_manifest

ROOT = Path(__file__).parents[1]
FULL_DISK_KIB = 192


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A readable image."""
    path = tmp_path / "picture.png"
    Image.new("RGB", (32, 32), "red").save(path)
    return path


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """A folder that is an ONNX artifact as far as its manifest knows."""
    folder = tmp_path / "onnx-fp32"
    folder.mkdir()
    (folder / "decoder.onnx").write_bytes(bytes(1000))
    write_manifest(folder)
    return folder


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: x\nexport: {probs: 3}\n", r"unknown key 'export\.probs'\. Did you mean 'probes'\?"),
        ("name: x\nbensh: {}\n", r"unknown key 'bensh'\. Did you mean 'bench'\?"),
        ("name: x\nbench: {iterations: 0}\n", r"bench\.iterations: .*greater than or equal to 1 \(found 0\)"),
        ("name: ../x\n", r"name: .*found '\.\./x'"),
        ("- a\n", "a mapping of keys to values was expected, found list"),
        ("a: [\n", "not a readable YAML file"),
    ],
)
def test_a_wrong_configuration_names_file_key_and_value(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=said) as error:
        RunConfig.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n truncated"])
def test_an_unreadable_image_is_named(artifact: Path, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{path}: not a readable image"):
        ask(artifact, path, "What is it?")


def test_a_truncated_image_is_named(artifact: Path, tmp_path: Path) -> None:
    path = tmp_path / "half.png"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(UserError, match=rf"{path}: not a readable image"):
        ask(artifact, path, "What is it?")


def test_a_truncated_artifact_is_named(artifact: Path, picture: Path) -> None:
    (artifact / "decoder.onnx").write_bytes(bytes(500))
    with pytest.raises(UserError, match=r"decoder\.onnx: 500 bytes found, 1000 expected"):
        ask(artifact, picture, "What is it?")


def test_a_changed_artifact_fails_its_checksum(artifact: Path) -> None:
    (artifact / "decoder.onnx").write_bytes(b"1" + bytes(999))
    read_manifest(artifact)
    with pytest.raises(UserError, match=r"decoder\.onnx: SHA-256 .* expected"):
        read_manifest(artifact, checksums=True)


def test_a_missing_engine_says_what_to_install(artifact: Path, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for module in ("onnx", "_onnx_session"):
        monkeypatch.delitem(sys.modules, f"vlm.runtimes.{module}", raising=False)
    with pytest.raises(UserError, match=r"needs onnxruntime, which is not installed: .*-e '\.\[onnx\]'"):
        ask(artifact, picture, "What is it?")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 192 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={FULL_DISK_KIB}k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def run_road(run_dir: Path, **limits: int) -> subprocess.CompletedProcess[str]:
    """Run the pipeline with fake stages in a process of its own, under resource limits."""

    def limit() -> None:
        for name, value in limits.items():
            resource.setrlimit(getattr(resource, name), (value, value))

    command = [sys.executable, "-m", "tests.road", str(run_dir)]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False, preexec_fn=limit
    )


def test_a_full_disk_is_said_and_the_run_goes_on_when_there_is_room(small_disk: Path) -> None:
    filler = small_disk / "filler"
    filler.write_bytes(bytes((FULL_DISK_KIB - 24) * 1024))
    full = run_road(small_disk / "run")
    assert full.returncode == 2, full.stderr
    assert "the disk is full" in full.stderr and "Traceback" not in full.stderr
    filler.unlink()
    again = run_road(small_disk / "run")
    assert again.returncode == 0, again.stderr
    assert (small_disk / "run" / "report" / "content").is_file()


def test_a_file_size_limit_is_said(tmp_path: Path) -> None:
    done = run_road(tmp_path / "run", RLIMIT_FSIZE=100)
    assert done.returncode == 2, done.stderr
    assert "ulimit -f" in done.stderr and "Traceback" not in done.stderr


def test_a_stamp_that_is_no_stamp_means_build_again(tmp_path: Path) -> None:
    assert run_road(tmp_path / "run").returncode == 0
    stamp = tmp_path / "run" / "stages" / "report.json"
    stamp.write_text("{")
    assert run_road(tmp_path / "run").returncode == 0
    assert json.loads(stamp.read_text())["finished"]
