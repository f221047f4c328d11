"""Fixtures: tiny random models, fast enough to build in every test run."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MobileVLM V2 of tiny size with random weights and the built-in tokenizer, saved in Hugging Face layout."""
    from tests.tiny import save_random_checkpoint

    return save_random_checkpoint(tmp_path_factory.mktemp("random") / "checkpoint")
