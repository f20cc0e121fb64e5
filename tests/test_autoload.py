import subprocess
import sys

import pytest

from crepe_llm._autoload import after_import


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A function: name, source -> an importable module file."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name, source=""):
        (tmp_path / f"{name}.py").write_text(source)
        return name

    yield write
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


def python(program, **kwargs):
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, **kwargs)


def test_the_callback_runs_once_after_the_module(module):
    calls = []
    name = module("autoload_later", "value = 1")
    after_import(name, lambda: calls.append(sys.modules[name].value))
    assert calls == []
    loaded = __import__(name)
    assert calls == [1]
    assert loaded.__spec__.loader is loaded.__loader__ and type(loaded.__loader__).__name__ == "SourceFileLoader"
    __import__(name)
    assert calls == [1]


def test_an_imported_module_calls_back_at_once(module):
    calls = []
    name = module("autoload_before")
    __import__(name)
    after_import(name, lambda: calls.append(1))
    assert calls == [1]


def test_several_callbacks_run_in_order(module):
    calls = []
    name = module("autoload_several")
    after_import(name, lambda: calls.append("first"))
    after_import(name, lambda: calls.append("second"))
    __import__(name)
    assert calls == ["first", "second"]


def test_a_failing_callback_is_a_warning_and_the_import_succeeds(module):
    name = module("autoload_failing")
    after_import(name, lambda: 1 // 0)
    with pytest.warns(RuntimeWarning, match="could not register itself: ZeroDivisionError"):
        __import__(name)


def test_a_failing_module_still_fails_as_it_would(module):
    name = module("autoload_broken", "1 // 0")
    after_import(name, lambda: pytest.fail("the module was never imported"))
    with pytest.raises(ZeroDivisionError):
        __import__(name)


def test_registering_in_the_middle_of_an_import_calls_back_at_its_end(module):
    name = module(
        "autoload_middle",
        "from crepe_llm._autoload import after_import\n"
        "calls = []\n"
        "after_import(__name__, lambda: calls.append(value))\n"
        "assert not calls\n"
        "value = 1",
    )
    assert __import__(name).calls == [1]


def test_an_import_that_fails_in_the_middle_calls_back_when_it_is_repeated(module, tmp_path):
    source = "from crepe_llm._autoload import after_import\nimport sys\n{}\nvalue = 1"
    calls = []
    sys.autoload_test_call = lambda: calls.append(1)
    name = module("autoload_retried", source.format("after_import(__name__, lambda: sys.autoload_test_call())\n1 // 0"))
    with pytest.raises(ZeroDivisionError):
        __import__(name)
    assert calls == []
    module(name, source.format("# a longer line, so that the cached bytecode is out of date"))
    assert __import__(name).value == 1 and calls == [1]
    del sys.autoload_test_call


def test_importing_the_package_imports_nothing_heavy():
    result = python(
        "import sys, crepe_llm\n"
        "print([m for m in ('torch', 'numpy', 'transformers', 'llmcompressor', 'vllm') if m in sys.modules])"
    )
    assert result.stdout.strip() == "[]", result.stderr


def test_without_the_optional_packages_the_rest_works_and_modifiers_name_the_extra():
    result = python("""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("llmcompressor", "vllm", "transformers", "compressed_tensors"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import torch
import crepe_llm.checkpoints, crepe_llm.cli.main, crepe_llm.kernels
from crepe_llm.functional.scores import crepe_scores
from crepe_llm.functional.masks import keep_mask

assert keep_mask(crepe_scores(torch.rand(4, 8), torch.ones(8)), 0.5, "2:4").sum() == 16
try:
    import crepe_llm.modifiers
except ImportError as error:
    print(error)
""")
    assert (
        result.stdout.strip() == 'crepe_llm.modifiers needs llm-compressor: pip install ".[compress]" in the checkout'
    ), result.stderr


@pytest.mark.parametrize("first", ["crepe_llm.modifiers", "crepe_llm.modifiers.pho", "llmcompressor"])
def test_recipes_name_the_modifiers_whatever_was_imported_first(first):
    result = python(f"""
import {first}
import llmcompressor
from llmcompressor.recipe import Recipe

recipe = "a_stage: {{b_modifiers: {{CRePEModifier: {{mask_structure: '2:4'}}}}}}"
print(type(Recipe.create_instance(recipe).modifiers[0]).__module__)
""")
    assert result.stdout.strip().endswith("crepe_llm.modifiers.crepe"), result.stderr
    assert "could not register" not in result.stderr


@pytest.mark.parametrize("first", ["crepe_llm.checkpoints.loading", "crepe_llm.models.per_block"])
def test_checkpoints_are_loaded_whatever_was_imported_first(first):
    result = python(f"""
import {first}
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

print(AUTO_QUANTIZER_MAPPING["compressed-tensors"].__module__, PreTrainedModel._load_pretrained_model._refuses_packed)
""")
    assert result.stdout.strip().endswith("crepe_llm.checkpoints.loading True"), result.stderr
    assert "could not register" not in result.stderr
