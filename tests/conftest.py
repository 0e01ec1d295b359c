"""Fixtures for all tests. What fixtures give is never changed by a test."""

import os
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # read when torch loads: a test process per core, not more
    os.environ.setdefault(variable, "1")

import pytest  # noqa: E402
from tiny_folders import compressed_folder  # noqa: E402
from tiny_models import tiny_model  # noqa: E402

from mopcompress.models.language_model import LanguageModel  # noqa: E402

STORIES = Path(__file__).parents[2] / "shared" / "models" / "stories260K"


@pytest.fixture(scope="session")
def tiny_llama() -> LanguageModel:
    """A random Llama: hidden 32, 4 blocks, vocabulary 64, 4 heads on 2 key heads. Build your own to change it."""
    return tiny_model("llama")


@pytest.fixture(scope="session")
def stories() -> Path:
    """A real model of 260 thousand weights. In CI its absence is a failure, elsewhere a skip."""
    if not STORIES.is_dir():
        message = f"{STORIES} is not there"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return STORIES


@pytest.fixture(scope="session")
def quantized_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny folder of 4 bits in groups of 32, with 85 % zeros. Copy it to change it."""
    return compressed_folder(tmp_path_factory.mktemp("quantized") / "model", bits=4, sparsity=0.85)


@pytest.fixture(scope="session")
def pruned_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny folder with 85 % zeros. Copy it to change it."""
    return compressed_folder(tmp_path_factory.mktemp("pruned") / "model", sparsity=0.85)
