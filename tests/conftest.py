"""Small randomly initialised models of every family, for shapes and lifecycle; never for claims about quality."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
import torch

from tiny_models import VOCABULARY, configs


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory):
    """A function: family name -> folder of a saved tiny model with a tokenizer."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    folders: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in folders:
            folder = tmp_path_factory.mktemp(family)
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(configs()[family](), dtype=torch.float32)
            model.save_pretrained(folder)
            words = {f"w{index}": index for index in range(VOCABULARY - 1)} | {"<unk>": VOCABULARY - 1}
            tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
            tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
            transformers.PreTrainedTokenizerFast(
                tokenizer_object=tokenizer, unk_token="<unk>", bos_token="w0", eos_token="w1", pad_token="w2"
            ).save_pretrained(folder)
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
