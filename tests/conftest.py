"""Small randomly initialised models of every family, for shapes and lifecycle; never for claims about quality."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import gc
from pathlib import Path

import pytest
import torch

from tiny_models import VOCABULARY, configs, save_model


@pytest.fixture(scope="module", autouse=True)
def _collect_only_what_is_new():
    """Keep the garbage collections that libraries ask for from going through everything that was imported before."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # else libraries find at the end what they take for leaks


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory):
    """A function: family name -> folder of a saved tiny model with a tokenizer."""
    folders: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in folders:
            folder = tmp_path_factory.mktemp(family)
            save_model(configs()[family](), folder)
            folders[family] = folder
        return folders[family]

    return make


@pytest.fixture(scope="session")
def calibration_data():
    """Twelve tokenized windows of 16 tokens; every third is padded on the right."""
    from datasets import Dataset

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY - 1, (12, 16), generator=generator)
    mask = torch.ones_like(ids)
    mask[::3, 10:] = 0
    return Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": mask.tolist()})


@pytest.fixture
def messages():
    """Everything that is logged during the test from INFO upwards."""
    from loguru import logger

    lines = []
    sink = logger.add(lambda line: lines.append(str(line)), level="INFO")
    yield lines
    logger.remove(sink)
