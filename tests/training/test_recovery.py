"""Recovery fine-tuning: what is trained, that it helps, resumes and merges; and what is refused."""

import errno
import json
import math
import shutil
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, Trainer

from crepe_llm.checkpoints import folders
from crepe_llm.cli.main import main
from crepe_llm.functional.structured import recovery_ranks
from crepe_llm.models import per_block
from crepe_llm.models.ffn import cut, find_ffns
from crepe_llm.samples.windows import token_windows
from crepe_llm.training.loop import DivergedError
from crepe_llm.training.recovery import RecoverySettings, recover
from tiny_models import letters_tokenizer

TEXT = "the quick brown fox jumps over the lazy dog. " * 60
IMPORTANCE = [0.1, 0.3]


def config(family):
    if family == "gpt2":
        return GPT2Config(
            vocab_size=96, n_embd=32, n_layer=2, n_head=2, n_positions=64, resid_pdrop=0, initializer_range=0.2
        )
    return LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.2,
    )


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """A function: family -> folder of a small model whose FFNs were cut to different widths."""
    folders = {}

    def make(family="llama"):
        if family not in folders:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config(family))
            for ffn, width in zip(find_ffns(model), (24, 40), strict=True):
                cut(ffn, torch.arange(width))
            model.config.block_importance = IMPORTANCE
            per_block.convert(model, [24, 40])
            folders[family] = tmp_path_factory.mktemp("models") / family
            model.save_pretrained(folders[family])
            letters_tokenizer(True).save_pretrained(folders[family])
        return folders[family]

    return make


def run(source, tmp_path, name="out", windows=None, length=32, **options):
    def cut_text(tokenizer):
        return token_windows(tokenizer, [TEXT], length, tokens=None if windows is None else windows * length)

    (tmp_path / name).mkdir(exist_ok=True)
    settings = RecoverySettings(**{"rank": 4, "batch": 2, "learning_rate": 1e-2, **options})
    return recover(source, tmp_path / name, tmp_path / f"{name}-work", cut_text, settings)


def with_zeros(source, folder, step):
    """A copy whose second query projection has zeros in every `step`-th column."""
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[:, ::step] = 0
    model.save_pretrained(folder)
    letters_tokenizer(True).save_pretrained(folder)
    return folder


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_training_lowers_the_loss_by_updates_of_the_ranks_asked_for(family, pruned, tmp_path):
    source = pruned(family)
    result = run(source, tmp_path, epochs=2)
    assert result.last_loss < 0.8 * result.first_loss
    assert result.ranks == recovery_ranks(IMPORTANCE, 4, "important") and result.ranks[0] < 4 < result.ranks[1]
    before, after = weights(source), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = 0
    for name in before:
        difference = (after[name] - before[name]).double()
        block = next((index for index in (0, 1) if f".{index}." in name), None)
        if block is None or difference.dim() < 2:
            assert torch.equal(after[name], before[name]), name
        else:
            singular = torch.linalg.svdvals(difference)
            rank = int((singular > 1e-4 * singular[0]).sum())
            assert rank == min(result.ranks[block], *difference.shape), name
            changed += 1
    assert changed == {"llama": 14, "gpt2": 8}[family]
    assert not (tmp_path / "out-work").exists()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again).__name__.startswith("PerBlock") and again.config.block_importance == IMPORTANCE
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the").input_ids


def test_the_first_loss_is_that_of_the_pruned_model(pruned, tmp_path):
    source = pruned()
    result = run(source, tmp_path, windows=2, batch=2, learning_rate=1e-9)
    assert result.steps == 1
    from crepe_llm.evaluation.perplexity import perplexity

    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source)
    expected = perplexity(model, token_windows(tokenizer, [TEXT], 32, tokens=64), corpus="", progress=False).nll
    assert result.first_loss == pytest.approx(expected, abs=1e-4)


def test_after_a_divergence_another_rate_may_follow(pruned, tmp_path):
    with pytest.raises(DivergedError, match=r"diverges at a learning rate of 1e\+30; take a lower one"):
        run(pruned("llama"), tmp_path, learning_rate=1e30)
    run(pruned("llama"), tmp_path)


@pytest.mark.parametrize(
    "fields", [{"epochs": 1.5}, {"learning_rate": math.inf}, {"seed": -1}, {"dtype": "foo"}, {"rank": 0}]
)
def test_settings_out_of_range_are_refused(fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))}="):
        RecoverySettings(**fields)


def test_an_interrupted_recovery_goes_on_and_ends_the_same(pruned, tmp_path, monkeypatch):
    straight = run(pruned(), tmp_path, "straight", windows=40)
    step, calls = Trainer.training_step, []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 25:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(pruned(), tmp_path, "resumed", windows=40)
    with pytest.raises(ValueError, match="an interrupted recovery with other settings"):
        (tmp_path / "resumed").rmdir()
        run(pruned(), tmp_path, "resumed", windows=40, rank=5)
    with pytest.raises(ValueError, match="an interrupted recovery with other settings"):
        (tmp_path / "resumed").rmdir()
        run(pruned(), tmp_path, "resumed", windows=80, length=16)  # the same tokens
    (tmp_path / "resumed").rmdir()
    resumed = run(pruned(), tmp_path, "resumed", windows=40)
    assert 40 < len(calls) < 60  # not from the start again
    assert (resumed.steps, resumed.ranks) == (straight.steps, straight.ranks) == (20, straight.ranks)
    one, other = weights(tmp_path / "straight"), weights(tmp_path / "resumed")
    for name in one:
        assert torch.allclose(one[name], other[name], atol=1e-5), name


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_windows_beyond_the_context_are_refused(family, pruned, tmp_path):
    with pytest.raises(ValueError, match="the window of 65 tokens exceeds the model's context of 64"):
        run(pruned(family), tmp_path, length=65)
    assert not (tmp_path / "out-work").exists()


def test_a_generation_config_that_transformers_refuses_to_save_is_mended(pruned, tmp_path):
    folder = shutil.copytree(pruned(), tmp_path / "pruned")
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 0.9}))
    run(folder, tmp_path, windows=2)
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (saved["temperature"], saved["do_sample"]) == (0.6, True)


@pytest.mark.parametrize("allocation", ["unimportant", "uniform"])
def test_ranks_can_go_the_other_way_or_nowhere(allocation, pruned, tmp_path):
    ranks = run(pruned(), tmp_path, windows=2, allocation=allocation).ranks
    assert ranks == recovery_ranks(IMPORTANCE, 4, allocation)
    assert ranks[0] > ranks[1] if allocation == "unimportant" else ranks == [4, 4]


def test_half_precision_is_trained_in_fp32_and_saved_as_it_was(pruned, tmp_path):
    result = run(pruned(), tmp_path, dtype="bfloat16")
    assert result.last_loss < 0.8 * result.first_loss
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_the_command_writes_a_model_or_nothing(pruned, tmp_path, capsys):
    text = tmp_path / "fox.txt"
    text.write_text(TEXT)
    command = ["recover", str(pruned()), "--text", str(text), "--length", "32", "--windows", "4", "--batch", "2"]
    assert main([*command, "--out", str(tmp_path / "made")]) == 0
    assert f"{tmp_path / 'made'}: loss" in capsys.readouterr().out
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in (tmp_path / "made").iterdir()}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fox.txt", "made"]
    assert main([*command, "--output", str(tmp_path / "made")]) == 2
    assert "exists already" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--output", str(tmp_path / "other"), "--rank", "0"])
    assert "argument --rank: 0 is not a whole number from 1 on" in capsys.readouterr().err


def test_a_command_that_fails_after_its_training_goes_on(pruned, tmp_path, capsys, monkeypatch):
    text = tmp_path / "fox.txt"
    text.write_text(TEXT)
    command = ["recover", str(pruned()), "--text", str(text), "--length", "32", "--windows", "20", "--batch", "2"]
    command += ["--output", str(tmp_path / "made")]
    flush, calls = folders._flush_all, []

    def failing(folder):
        calls.append(folder)
        if len(calls) == 1:
            raise OSError(errno.EIO, "the disk hiccups")
        flush(folder)

    monkeypatch.setattr(folders, "_flush_all", failing)
    step, steps = Trainer.training_step, []
    monkeypatch.setattr(Trainer, "training_step", lambda *args, **kwargs: steps.append(1) or step(*args, **kwargs))
    assert main(command) == 2
    assert f"{tmp_path / '.made-recovery'} keeps what was trained: the same command" in capsys.readouterr().err
    assert main(command) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fox.txt", "made"]
    assert 20 < len(steps) < 25  # windows; not 40, from the start again


def test_the_zeros_of_a_dequantised_model_do_not_make_it_sparse(pruned, tmp_path):
    assert run(with_zeros(pruned(), tmp_path / "dequantised", 5), tmp_path, "a").steps > 0


def test_sparse_quantized_and_foreign_checkpoints_are_refused(pruned, tmp_path):
    with_zeros(pruned(), tmp_path / "sparse", 2)
    with pytest.raises(ValueError, match=r"is sparse: 50% of model\.layers\.1\.self_attn\.q_proj are zeros"):
        run(tmp_path / "sparse", tmp_path, "a")
    path = tmp_path / "sparse" / "config.json"
    for field in ("quantization_config", "sparsity_config"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {field: {"format": "sparse-24-bitmask"}}))
        with pytest.raises(ValueError, match=rf"sparse or quantized \({field} in config.json\)"):
            run(tmp_path / "sparse", tmp_path, field)
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != field}))
    dense = AutoModelForCausalLM.from_config(config("llama"))
    dense.save_pretrained(tmp_path / "dense")
    letters_tokenizer(True).save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="no block_importance of 2 blocks, which CFSPModifier writes"):
        run(tmp_path / "dense", tmp_path, "b")
    assert run(tmp_path / "dense", tmp_path, "c", windows=2, allocation="uniform").steps == 1
    with pytest.raises(ValueError, match=r"absent is not a folder with a model"):
        run(tmp_path / "absent", tmp_path, "d")


def test_without_peft_the_extra_is_named(pruned, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r'pip install "\.\[recover\]" in the checkout'):
        run(pruned(), tmp_path)
