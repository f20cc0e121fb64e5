"""Small randomly initialised models of every family, for shapes and lifecycle; never for claims about quality."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
import torch

VOCABULARY = 96


def _configs():
    import transformers as t

    llama = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    gemma = {"head_dim": 8, "num_key_value_heads": 1, "layer_types": ["sliding_attention", "full_attention"]}
    opt = {"ffn_dim": 48, "word_embed_proj_dim": 32}
    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY}
    return {
        "llama": lambda: t.LlamaConfig(**llama, tie_word_embeddings=True),
        "qwen2": lambda: t.Qwen2Config(**llama),
        "gemma3": lambda: t.Gemma3TextConfig(**{**llama, **gemma, "sliding_window": 8}),
        "opt": lambda: t.OPTConfig(**{**llama, **opt}),
        "gpt2": lambda: t.GPT2Config(**gpt2, bos_token_id=0, eos_token_id=1, pad_token_id=2),
        "mixtral": lambda: t.MixtralConfig(**llama, num_local_experts=4, num_experts_per_tok=1),
    }


FAMILIES = ["llama", "qwen2", "gemma3", "opt", "gpt2"]


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
            model = transformers.AutoModelForCausalLM.from_config(_configs()[family](), dtype=torch.float32)
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
