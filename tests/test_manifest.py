"""A damaged or foreign artifact folder is refused, with a message that names the file."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.manifests import write_manifest
from vlm.errors import UserError
from vlm.manifest import MANIFEST, read_manifest
from vlm.runtimes import open_runtime


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    folder = tmp_path / "onnx-int4"
    (folder / "sub").mkdir(parents=True)
    (folder / "decoder.onnx").write_bytes(b"weights" * 100)
    (folder / "sub" / "table.bin").write_bytes(b"table")
    (folder / "tokenizer.json").write_text("{}")
    write_manifest(folder, versions={"onnx": "1.0"}, settings={"layers": 2})
    return folder


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    tree = json.loads((folder / MANIFEST).read_text())
    change(tree)
    (folder / MANIFEST).write_text(json.dumps(tree))


def test_an_intact_artifact_is_read_whole(artifact: Path) -> None:
    manifest = read_manifest(artifact, checksums=True)
    assert [file.path for file in manifest.files] == ["decoder.onnx", "sub/table.bin", "tokenizer.json"]
    assert manifest.bytes == 700 + 5 + 2


def test_the_facts_of_the_loop_come_from_the_manifest(artifact: Path) -> None:
    facts = read_manifest(artifact).facts(artifact)
    assert facts.tokenizer == artifact / "tokenizer.json"
    assert (facts.image_tokens, facts.image_token_id, facts.bos_id, facts.eos_id) == (144, 3, 1, 2)
    assert (facts.context_length, facts.template, facts.preprocessing.size) == (512, "v1", 96)


def test_a_truncated_file_is_named_with_both_sizes(artifact: Path) -> None:
    (artifact / "decoder.onnx").write_bytes(b"weights")
    with pytest.raises(UserError, match=r"decoder\.onnx: 7 bytes found, 700 expected"):
        read_manifest(artifact)


def test_a_changed_file_of_the_same_size_is_found_by_its_checksum(artifact: Path) -> None:
    (artifact / "sub" / "table.bin").write_bytes(b"TABLE")
    read_manifest(artifact)
    with pytest.raises(UserError, match=r"table\.bin: SHA-256 .* expected"):
        read_manifest(artifact, checksums=True)


def test_a_missing_file_is_named(artifact: Path) -> None:
    (artifact / "decoder.onnx").unlink()
    with pytest.raises(UserError, match=r"decoder\.onnx: missing"):
        read_manifest(artifact)


@pytest.mark.parametrize("path", ["../outside.bin", "/etc/hostname", "sub/../../outside.bin"])
def test_a_path_that_leaves_the_folder_is_refused_even_if_the_file_exists(artifact: Path, path: str) -> None:
    (artifact.parent / "outside.bin").write_bytes(b"table")
    edit(artifact, lambda tree: tree["files"][0].update(path=path, bytes=5))
    with pytest.raises(UserError, match="leaves the artifact's folder"):
        read_manifest(artifact)


def test_a_link_that_leaves_the_folder_is_refused(artifact: Path) -> None:
    outside = artifact.parent / "outside.bin"
    outside.write_bytes(b"table")
    (artifact / "sub" / "table.bin").unlink()
    (artifact / "sub" / "table.bin").symlink_to(outside)
    with pytest.raises(UserError, match="leaves the artifact's folder"):
        read_manifest(artifact)


@pytest.mark.parametrize("path", ["../tokenizer.json", "/etc/hostname", "sub/../../tokenizer.json", "link.json"])
def test_a_tokenizer_outside_the_folder_is_refused(artifact: Path, path: str) -> None:
    outside = artifact.parent / "tokenizer.json"
    outside.write_text("{}")
    (artifact / "link.json").symlink_to(outside)
    edit(artifact, lambda tree: tree.update(tokenizer=path))
    with pytest.raises(UserError, match=r"manifest\.json: file path .* leaves the artifact's folder"):
        read_manifest(artifact)


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: tree.update(schema=2),
        lambda tree: tree.update(colour="blue"),
        lambda tree: tree.pop("tokenizer") and tree.pop("engine"),
        lambda tree: tree["files"][0].update(bytes="many"),
    ],
    ids=["schema", "unknown key", "missing key", "wrong type"],
)
def test_a_manifest_of_another_schema_is_refused(artifact: Path, change: Callable[[dict], object]) -> None:
    edit(artifact, change)
    with pytest.raises(UserError, match=r"manifest\.json: not a manifest of schema 1"):
        read_manifest(artifact)


def test_a_half_written_manifest_is_refused(artifact: Path) -> None:
    text = (artifact / MANIFEST).read_text()
    (artifact / MANIFEST).write_text(text[: len(text) // 2])
    with pytest.raises(UserError, match="not a manifest of schema 1"):
        read_manifest(artifact)


def test_a_folder_without_manifest_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished artifact"):
        read_manifest(tmp_path)
    with pytest.raises(UserError, match=r"neither an artifact .* nor a checkpoint"):
        open_runtime(tmp_path)


def test_a_missing_engine_is_named_with_what_to_type(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("onnx", "_onnx_session"):
        monkeypatch.delitem(sys.modules, f"vlm.runtimes.{module}", raising=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"needs onnxruntime.*pip install -c constraints\.txt -e '\.\[onnx\]'"):
        open_runtime(artifact)


def test_a_library_that_is_imported_only_at_opening_is_named_too(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlm.runtimes._mil import coremltools

    (artifact / "vision_encoder.mlpackage").mkdir()
    program = {"itemInfoEntries": {"a": {"path": "model"}}, "rootModelIdentifier": "a"}
    (artifact / "vision_encoder.mlpackage" / "Manifest.json").write_text(json.dumps(program))
    edit(artifact, lambda tree: tree.update(format="coreml", engine="coreml"))
    monkeypatch.setitem(sys.modules, "coremltools", None)
    coremltools.cache_clear()
    with pytest.raises(UserError, match=r"needs coremltools.*pip install -c constraints\.txt -e '\.\[coreml\]'"):
        open_runtime(artifact)


def test_a_file_the_engine_cannot_load_is_named(artifact: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    (artifact / "vision_encoder.onnx").write_bytes(b"this is no graph")
    edit(artifact, lambda tree: tree["settings"].update(kv_heads=4, head_dim=16))
    with pytest.raises(UserError, match=r"vision_encoder\.onnx: ONNX Runtime .* cannot load it"):
        open_runtime(artifact)
