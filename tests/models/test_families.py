import subprocess
import sys

import transformers

from crepe_llm.models import per_block
from crepe_llm.models.channels import family_of
from crepe_llm.models.families import FAMILIES, PER_BLOCK


def test_entries_name_what_exists():
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES
    assert FAMILIES.keys() <= known.keys()
    for family, classes in PER_BLOCK.items():
        assert getattr(transformers, classes.config).model_type == family
        assert getattr(transformers, classes.model).config_class is getattr(transformers, classes.config)


def test_the_table_needs_no_toolkit():
    code = (
        "import sys, crepe_llm.models.families\n"
        "assert not {'torch', 'transformers', 'llmcompressor', 'vllm'} & set(sys.modules)"
    )
    environment = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "PYTHONPATH": ":".join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_the_family_is_that_of_the_text():
    per_block.register()
    assert family_of(transformers.Gemma3Config()) == family_of(transformers.Gemma3TextConfig()) == "gemma3_text"
    assert family_of(transformers.PreTrainedConfig()) == ""  # code of a model's own may name none
    for family in PER_BLOCK:
        registered = transformers.AutoConfig.for_model(f"{family} (pip install crepe-llm)")
        assert family_of(registered) == family
