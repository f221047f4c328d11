"""Fixtures: tiny random models, fast enough to build in every test run."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MobileVLM V2 of tiny size with random weights and the built-in tokenizer, saved in Hugging Face layout."""
    from tests.tiny import save_random_checkpoint

    return save_random_checkpoint(tmp_path_factory.mktemp("random") / "checkpoint")


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is fetched or converted goes into the test's own folder."""
    monkeypatch.setenv("POCKETVLM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A tiny CLIP with random weights in a folder of its own, as upstream's checkpoints without a tower need."""
    from tests.upstream import save_clip

    save_clip(tmp_path / "clip")
    return tmp_path / "clip"
