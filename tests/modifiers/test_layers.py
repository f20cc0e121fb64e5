"""Which layers modifiers work on: those that stay dense by default, those that calibration does not reach."""

import copy
import json

import pytest
import torch
import transformers as t
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.core import Event, EventType, State
from llmcompressor.modifiers.pruning import WandaPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform import SmoothQuantModifier
from torch.utils.data import DataLoader

from crepe_llm.checkpoints import is_2of4, read_folder
from crepe_llm.modifiers import (
    ADMMModifier,
    CFSPModifier,
    ChannelPermutationModifier,
    CRePEModifier,
    DSnoTModifier,
    MaskedGPTQModifier,
    PHOSearchModifier,
    SparseCheckpointModifier,
    SparsityAllocationModifier,
    WeightCorrectionModifier,
)
from modifier_helpers import SMALL, crepe, linears, load, run, save
from tiny_models import VOCABULARY


def words(folder):
    return t.AutoTokenizer.from_pretrained(folder)


def pruned(module):
    return float((module.weight == 0).float().mean()) > 0.4


@pytest.fixture(scope="module")
def vision_folder(tiny_model_folder, tmp_path_factory):
    """A Gemma 3 that sees: a vision tower, a projector and a language model."""
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention"]
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = t.Gemma3Config(
        text_config={**SMALL, "head_dim": 8, "sliding_window": 8, "layer_types": kinds},
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4, image_token_index=90, boi_token_index=91, eoi_token_index=92,
    )  # fmt: skip
    model = t.Gemma3ForConditionalGeneration(config)
    return save(model, tmp_path_factory.mktemp("vision"), tiny_model_folder("llama"))


@pytest.mark.parametrize(
    ("recipe", "pipeline"),
    [("crepe_2of4", "independent"), ("crepe_2of4", "basic"), ("crepe_2of4_best", "independent")],
)
def test_text_prunes_the_language_model_and_leaves_the_vision_tower(
    recipe, pipeline, vision_folder, calibration_data, messages
):
    dense = load(vision_folder)
    model = run(load(vision_folder), recipe, calibration_data, pipeline=pipeline, processor=words(vision_folder))
    for name, module in linears(model).items():
        assert pruned(module) == ("language_model" in name), name
        if "language_model" not in name:
            assert torch.equal(module.weight, dense.get_submodule(name).weight)
    (line,) = [line for line in messages if "does not reach" in line]
    assert "1 x model.vision_tower.encoder.layers.*.mlp.fc1" in line and "targets" in line


def test_a_model_with_images_is_of_the_family_of_its_text(vision_folder, calibration_data):
    """Gemma 3 normalises what layers give, so that tokens count by their relative errors."""
    made = []
    for fields in ({}, {"token_weighting": "relative"}, {"token_weighting": "uniform"}):
        recipe = [crepe(), WeightCorrectionModifier(method="pcg", **fields)]
        made.append(linears(run(load(vision_folder), recipe, calibration_data, processor=words(vision_folder))))
    default, relative, uniform = ({name: module.weight for name, module in layers.items()} for layers in made)
    assert all(torch.equal(weight, relative[name]) for name, weight in default.items())
    assert any(not torch.equal(weight, uniform[name]) for name, weight in default.items())


def test_a_vision_tower_that_targets_name_is_refused_before_calibration(vision_folder, calibration_data, messages):
    model = load(vision_folder)
    recipe = [crepe(targets=["re:.*vision_tower.*proj", "re:.*language_model.*proj"])]
    with pytest.raises(ValueError, match=r'does not reach, such as model\.vision_tower.*`ignore` \(such as "re:'):
        run(model, recipe, calibration_data, processor=words(vision_folder))
    assert not any(pruned(module) for module in linears(model).values())


def test_a_model_that_cannot_be_run_in_parts_is_run_whole(tiny_model_folder, calibration_data, tmp_path, messages):
    """Qwen2-Audio fails in the pipeline's last part, after the work; its audio tower gets nothing from text."""
    torch.manual_seed(0)
    audio = {
        "num_mel_bins": 8, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "d_model": 32,
        "max_source_positions": 16,
    }  # fmt: skip
    config = t.Qwen2AudioConfig(text_config=t.Qwen2Config(**SMALL), audio_config=audio, audio_token_index=90)
    made = t.Qwen2AudioForConditionalGeneration(config)
    folder = save(made, tmp_path / "model", tiny_model_folder("llama"))
    for pipeline in ("independent", "sequential", None):
        model = type(made).from_pretrained(folder)
        run(model, "crepe_2of4", calibration_data, processor=words(folder), pipeline=pipeline)
        assert any("is run as a whole" in line for line in messages)
        for name, module in linears(model).items():
            assert pruned(module) == ("language_model" in name), name


def whisper():
    return t.WhisperForConditionalGeneration(
        t.WhisperConfig(
            vocab_size=VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=8, max_source_positions=16,
            max_target_positions=32, decoder_start_token_id=2, pad_token_id=2, bos_token_id=0, eos_token_id=1,
            suppress_tokens=None, begin_suppress_tokens=None,
        )
    )  # fmt: skip


def t5():
    return t.T5ForConditionalGeneration(
        t.T5Config(
            vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=4,
            decoder_start_token_id=2, pad_token_id=2, eos_token_id=1,
        )
    )  # fmt: skip


def marian():
    """Like mBART and Pegasus it adds a bias to its head's outputs."""
    half = {"d_model": 32, "max_position_embeddings": 64, "vocab_size": VOCABULARY, "pad_token_id": 2}
    for side in ("encoder", "decoder"):
        half |= {f"{side}_layers": 2, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 64}
    return t.MarianMTModel(t.MarianConfig(**half, decoder_start_token_id=2, eos_token_id=1, forced_eos_token_id=1))


@pytest.mark.parametrize("make", [whisper, t5, marian])
@pytest.mark.parametrize("second", [[], [ADMMModifier]])
def test_encoders_are_pruned_with_their_decoders(make, second, tiny_model_folder, tmp_path):
    torch.manual_seed(0)
    model = make()
    folder = save(model, tmp_path / "model", tiny_model_folder("llama"))
    ids = torch.randint(3, 90, (8, 12), generator=torch.Generator().manual_seed(0))
    columns = {"input_ids": ids.tolist(), "decoder_input_ids": ids.flip(0).tolist()}
    if make is whisper:
        columns["input_features"] = torch.randn(8, 8, 32).tolist()
    names = ["input_features", "decoder_input_ids"] if make is whisper else ["input_ids", "decoder_input_ids"]
    model = type(model).from_pretrained(folder)
    oneshot(
        model=model,
        processor=words(folder),
        recipe=[crepe(ignore=["re:.*(lm_head|proj_out)"]), *(kind() for kind in second)],
        dataset=Dataset.from_dict(columns),
        data_collator=lambda rows: {name: torch.tensor([row[name] for row in rows]) for name in names},
        num_calibration_samples=8,
    )
    layers = {n: m for n, m in linears(model).items() if "proj_out" not in n}
    assert sum(".encoder." in f".{name}" for name in layers) == 12
    assert all(pruned(module) for module in layers.values())


@pytest.mark.parametrize("padded", ["attention_mask", "decoder_attention_mask"])
def test_padding_of_an_encoder_is_not_taken_for_its_decoders(padded, tiny_model_folder, tmp_path):
    folder = save(t5(), tmp_path / "model", tiny_model_folder("llama"))
    ids = torch.randint(3, 90, (4, 12))
    batch = {"input_ids": ids, "decoder_input_ids": ids, padded: torch.tensor([[0] * 5 + [1] * 7] * 4)}
    with pytest.raises(ValueError, match=f"{padded} of batch 0 .* has padding, .*: give rows without it"):
        oneshot(
            model=t.T5ForConditionalGeneration.from_pretrained(folder),
            processor=words(folder),
            recipe=[crepe()],
            dataset=DataLoader([batch], batch_size=None),
        )


@pytest.mark.parametrize("make", [whisper, t5])
def test_text_alone_is_refused_where_a_model_needs_more(make, tiny_model_folder, tmp_path):
    folder = save(make(), tmp_path / "model", tiny_model_folder("llama"))
    model = type(make()).from_pretrained(folder)
    kind = type(model).__name__
    with pytest.raises(ValueError, match=rf"{kind} cannot be run on a batch .* which holds input_ids.*: .*; give rows"):
        oneshot(
            model=model,
            processor=words(folder),
            recipe=[crepe()],
            dataset=Dataset.from_dict({"input_ids": [[5, 6, 7, 8]] * 4}),
            num_calibration_samples=4,
        )
    assert not any(pruned(module) for module in linears(model).values())


def test_an_encoder_with_experts_is_run_whole(tiny_model_folder, tmp_path, messages):
    """Tracing Switch Transformers, which llm-compressor's pipeline does, did not end in minutes."""
    torch.manual_seed(0)
    config = t.SwitchTransformersConfig(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=4,
        num_experts=2, decoder_start_token_id=2, pad_token_id=2, eos_token_id=1,
    )  # fmt: skip
    folder = save(t.SwitchTransformersForConditionalGeneration(config), tmp_path / "model", tiny_model_folder("llama"))
    model = t.SwitchTransformersForConditionalGeneration.from_pretrained(folder)
    ids = torch.randint(3, 90, (8, 12), generator=torch.Generator().manual_seed(0)).tolist()
    oneshot(
        model=model,
        processor=words(folder),
        recipe=[crepe(ignore=["re:.*lm_head"])],
        dataset=Dataset.from_dict({"input_ids": ids, "decoder_input_ids": ids}),
        data_collator=lambda rows: {name: torch.tensor([row[name] for row in rows]) for name in rows[0]},
        num_calibration_samples=8,
    )
    assert any("is run as a whole" in line for line in messages)
    assert sum(pruned(module) for module in linears(model).values()) > 24


def test_routers_gates_and_narrow_layers_stay_dense(tiny_model_folder, calibration_data, tmp_path, messages):
    torch.manual_seed(0)
    config = t.Qwen2MoeConfig(
        **SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16
    )
    folder = save(t.Qwen2MoeForCausalLM(config), tmp_path / "model", tiny_model_folder("llama"))
    model = run(load(folder), "crepe_2of4", calibration_data)
    gates = [module for name, module in linears(model).items() if name.endswith("shared_expert_gate")]
    assert len(gates) == 2 and not any(map(pruned, gates))
    assert all(pruned(m) for n, m in linears(model).items() if not n.endswith("shared_expert_gate"))
    (line,) = [line for line in messages if "routers and gates stay dense: " in line]
    assert "2 x model.layers.*.mlp.shared_expert_gate" in line
    named = run(load(folder), [crepe(targets=["Linear", "re:.*shared_expert_gate"])], calibration_data)
    assert all(pruned(m) for n, m in linears(named).items())


@pytest.mark.parametrize("recipe", ["crepe_2of4", "crepe_2of4_admm"])
def test_layers_that_blocks_share_are_pruned_with_the_first(recipe, tiny_model_folder, calibration_data):
    model, alone = load(tiny_model_folder("llama")), load(tiny_model_folder("llama"))
    model.model.layers[1].mlp = model.model.layers[0].mlp
    for each in (model, alone):
        run(each, recipe, calibration_data)
    assert all(pruned(module) for module in linears(model).values())
    for one, other in zip(model.model.layers[1].mlp.parameters(), alone.model.layers[0].mlp.parameters(), strict=True):
        assert torch.equal(one, other)


def test_norms_are_not_rounded(tiny_model_folder, calibration_data):
    """llm-compressor adds 1 to Gemma's while it calibrates, and takes it away again, in the model's dtype."""
    dense = load(tiny_model_folder("gemma3"), torch.bfloat16)
    with torch.no_grad():
        for name, each in dense.named_parameters():
            if "norm" in name:
                each.normal_(0, 0.05)
    model, smoothed = copy.deepcopy(dense), copy.deepcopy(dense)
    run(model, "crepe_2of4_best", calibration_data)
    norms = {name: each for name, each in model.named_parameters() if "norm" in name and "layers" in name}
    assert norms
    order = {name: each.sort().values for name, each in norms.items()}  # of channels, which are permuted
    assert all(torch.equal(dense.get_parameter(name).sort().values, values) for name, values in order.items())
    run(smoothed, [SmoothQuantModifier(smoothing_strength=0.5), crepe()], calibration_data)
    assert any(not torch.equal(dense.get_parameter(name), smoothed.get_parameter(name)) for name in norms)


@pytest.mark.parametrize("around", [[PHOSearchModifier(tokens=1000)], [ADMMModifier()]], ids=["PHO", "ADMM"])
def test_blocks_that_return_a_list(around, tiny_model_folder, calibration_data, tmp_path):
    torch.manual_seed(0)
    config = t.OpenAIGPTConfig(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    folder = save(t.OpenAIGPTLMHeadModel(config), tmp_path / "model", tiny_model_folder("llama"))
    recipe = [*around, crepe()] if isinstance(around[0], PHOSearchModifier) else [crepe(), *around]
    model = run(load(folder), recipe, calibration_data)
    assert all(pruned(module) for module in linears(model).values())


def test_weights_that_mamba_reads_stay_dense(tiny_model_folder, calibration_data, tmp_path, messages):
    torch.manual_seed(0)
    config = t.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8, time_step_rank=8)
    folder = save(t.MambaForCausalLM(config), tmp_path / "model", tiny_model_folder("llama"))
    rows = calibration_data.select_columns(["input_ids"])
    model = run(load(folder), "crepe_2of4", rows)
    for name, module in linears(model).items():
        assert pruned(module) == (not name.endswith("dt_proj")), name
    assert any("read directly" in line and "dt_proj" in line for line in messages)


def test_conv1d_is_said_and_recorded_to_be_saved_dense(tiny_model_folder, calibration_data, tmp_path, messages):
    out = tmp_path / "out"
    model = run(load(tiny_model_folder("gpt2")), [crepe(), ADMMModifier()], calibration_data, output_dir=str(out))
    record = json.loads((out / "config.json").read_text())["sparsity_config"]
    assert (record["format"], record["sparsity_structure"]) == ("dense", "2:4")
    assert record["targets"] == sorted(linears(model))
    zeros = sum(int((parameter == 0).sum()) for parameter in model.parameters())
    assert record["global_sparsity"] == pytest.approx(zeros / sum(p.numel() for p in model.parameters()))
    with torch.no_grad():
        assert torch.equal(load(out)(torch.arange(3, 9)[None]).logits, model(torch.arange(3, 9)[None]).logits)
    assert sum("8 Conv1D layers such as transformer.h.0.attn.c_attn" in line for line in messages) == 1


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("Qwen2MLP", r"match model\.layers\.0\.mlp, a Qwen2MLP, which is not a linear layer: target .*_proj"),
        ("re:.*mlp.*", r"match model\.layers\.0\.mlp, a Qwen2MLP, which is not a linear layer: target .*_proj"),
        ("model.embed_tokens", r"match model\.embed_tokens, an embedding, which is not a linear layer: target .*"),
    ],
)
def test_targets_that_are_no_linear_layers_are_named(target, message, tiny_model_folder, calibration_data):
    with pytest.raises(ValueError, match=message):
        run(load(tiny_model_folder("qwen2")), [crepe(targets=[target])], calibration_data)


def test_a_head_that_is_pruned_is_said_to_be_saved_dense(tiny_model_folder, calibration_data, messages):
    run(load(tiny_model_folder("qwen2")), [crepe(targets=["lm_head"], ignore=[])], calibration_data)
    assert any("1 output heads such as lm_head are pruned" in line and "saved dense" in line for line in messages)


@pytest.mark.parametrize(
    ("kind", "config", "heads"),
    [
        (t.LlamaForSequenceClassification, t.LlamaConfig, ["score"]),
        (t.LlamaForTokenClassification, t.LlamaConfig, ["score"]),
        (t.RobertaForSequenceClassification, t.RobertaConfig, ["classifier.dense", "classifier.out_proj"]),
    ],
)
def test_heads_of_classifiers_stay_dense(kind, config, heads, tiny_model_folder, calibration_data, messages, tmp_path):
    torch.manual_seed(0)
    folder = save(kind(config(**SMALL, num_labels=12)), tmp_path, tiny_model_folder("llama"))
    model = run(kind.from_pretrained(folder), [crepe()], calibration_data)
    zeros = {name: float((module.weight == 0).float().mean()) for name, module in linears(model).items()}
    assert [name for name, share in zeros.items() if share < 0.1] == heads
    assert any("output heads stay dense: " in line for line in messages)


@pytest.mark.parametrize("targets", ["Linear", ["Linear"], "re:.*_proj"])
def test_targets_may_be_one_text(targets, tiny_model_folder, calibration_data):
    model = run(load(tiny_model_folder("llama")), [crepe(targets=targets, ignore="lm_head")], calibration_data)
    assert all(pruned(module) for module in linears(model).values())


@pytest.mark.parametrize("kind", [CRePEModifier, CFSPModifier, ChannelPermutationModifier])
def test_processes_that_have_not_found_each_other_are_refused(kind, tiny_model_folder, calibration_data, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    fields = {"sparsity": 0.25} if kind is CFSPModifier else {}
    recipe = [kind(**{"mask_structure": "2:4"} if kind is CRePEModifier else fields), crepe()]
    with pytest.raises(ValueError, match=r"torchrun has started 2 processes.*processes\.start\(\)"):
        run(load(tiny_model_folder("llama")), recipe[: 1 + (kind is ChannelPermutationModifier)], calibration_data)


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_rows_beyond_learned_positions_are_refused(family, tiny_model_folder):
    data = Dataset.from_dict({"input_ids": [[5] * 70] * 4, "attention_mask": [[1] * 70] * 4})
    with pytest.raises(ValueError, match=r"sequences of 70 tokens.*embeddings for 64 positions"):
        run(load(tiny_model_folder(family)), "crepe_2of4", data)
    run(load(tiny_model_folder(family)), "crepe_2of4", data, max_seq_length=64)


def test_token_ids_outside_the_vocabulary_are_refused(tiny_model_folder):
    rows = [[5, 6, 7, 8], [5, 6, 7, VOCABULARY]]
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * 4] * 2})
    loader = DataLoader([{"input_ids": torch.tensor(row)} for row in rows], batch_size=1)
    for given in (data, loader):
        with pytest.raises(ValueError, match=rf"token id {VOCABULARY} is outside the model's vocabulary"):
            oneshot(model=load(tiny_model_folder("llama")), recipe="crepe_2of4", dataset=given)


@pytest.mark.parametrize(
    "recipe",
    [
        [crepe()],
        [CFSPModifier(sparsity=0.25, round_to=4)],
        [WandaPruningModifier(sparsity=0.5, mask_structure="2:4"), SparseCheckpointModifier()],
    ],
    ids=lambda recipe: type(recipe[0]).__name__,
)
def test_a_generation_config_that_cannot_be_saved_is_mended(
    recipe, tiny_model_folder, calibration_data, tmp_path, messages
):
    model = load(tiny_model_folder("llama"))
    model.generation_config.temperature = 0.6
    run(model, recipe, calibration_data, output_dir=str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["do_sample"] is True
    assert sum("it is saved with do_sample: true" in line for line in messages) == 1


def test_a_destination_that_cannot_be_written_costs_no_work(tiny_model_folder, calibration_data, tmp_path):
    (tmp_path / "file").touch()
    model = load(tiny_model_folder("llama"))
    with pytest.raises(NotADirectoryError, match="file is a file"):
        run(model, "crepe_2of4", calibration_data, output_dir=str(tmp_path / "file" / "out"))
    assert not any(pruned(module) for module in linears(model).values())


def test_quantized_weights_are_refused_by_name(tiny_model_folder, calibration_data):
    model = load(tiny_model_folder("llama"))
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    batch = {"input_ids": torch.tensor([[5, 6]])}
    with pytest.raises(ValueError, match=r"weight of model\.layers\.1\.mlp\.up_proj is int8: the model is quantized"):
        crepe(targets=["re:.*up_proj"]).on_initialize(State(model=model), calib_data=[batch])


def test_layers_that_an_adapter_wraps_are_refused(tiny_model_folder, calibration_data):
    peft = pytest.importorskip("peft")
    for wrap in (lambda model, lora: peft.get_peft_model(model, lora), lambda model, lora: model.add_adapter(lora)):
        model = load(tiny_model_folder("llama"))
        model = wrap(model, peft.LoraConfig(target_modules=["q_proj"])) or model
        with pytest.raises(ValueError, match=r"2 layers such as \S+q_proj are wrapped by an adapter \(PEFT\)"):
            run(model, "crepe_2of4", calibration_data, processor=words(tiny_model_folder("llama")))
        # The wrapped model cannot be traced, which leaves nothing patched: other models still run, caches included.
        assert load(tiny_model_folder("llama"))(torch.arange(3, 9)[None]).past_key_values is not None


def test_what_could_not_be_saved_or_read_again_costs_no_work(tiny_model_folder, calibration_data):
    model = load(tiny_model_folder("llama"), torch.bfloat16)
    model.model.norm.half()
    with pytest.raises(ValueError, match=r"norm\.weight is float16 and \S+ is bfloat16: .* cast the model first"):
        run(model, "crepe_2of4", calibration_data)
    model = load(tiny_model_folder("llama"))
    with pytest.raises(NotADirectoryError, match="an empty text: name a folder"):
        run(model, "crepe_2of4", calibration_data, output_dir="")
    loader = DataLoader([torch.tensor([5, 6, 7])] * 4)
    with pytest.raises(ValueError, match=r"batch of the calibration data is of the class Tensor: batches are dict"):
        oneshot(model=model, recipe="crepe_2of4", dataset=loader)
    assert not any(pruned(module) for module in linears(model).values())


def test_weights_that_no_packed_format_holds_are_said_to_be_saved_dense(tiny_model_folder, calibration_data, messages):
    run(load(tiny_model_folder("llama"), torch.float64), "crepe_2of4", calibration_data)
    assert sum("14 layers of float64 such as model.layers.0.self_attn.q_proj" in line for line in messages) == 1


def low_level(model, given, fed):
    """A modifier driven as llm-compressor's own tests do it; `fed(data)` is what the model is run on."""
    state, modifier = State(), crepe()
    state.update(model=model, calib_data=given)
    modifier.initialize(state)
    modifier.update_event(state, Event(type_=EventType.CALIBRATION_START))
    with torch.no_grad():
        for batch in fed(state.data.calib):
            model(**batch)
    modifier.update_event(state, Event(type_=EventType.SEQUENTIAL_EPOCH_END), modules=list(model.modules()))
    modifier.update_event(state, Event(type_=EventType.CALIBRATION_END))
    modifier.finalize(state)
    return model


@pytest.mark.parametrize("kind", ["loader", "list", "own loader"])
def test_modifiers_driven_without_oneshot(kind, tiny_model_folder, calibration_data):
    """Padding does not count, whatever holds the data and whoever iterates it."""
    batches = [
        {name: torch.tensor(calibration_data[start : start + 4][name]) for name in ("input_ids", "attention_mask")}
        for start in range(0, 12, 4)
    ]
    loader = DataLoader(batches, batch_size=None)
    fed = (lambda data: loader) if kind == "own loader" else (lambda data: data)
    model = low_level(load(tiny_model_folder("llama")), batches if kind == "list" else loader, fed)
    expected = run(load(tiny_model_folder("llama")), [crepe()], calibration_data, pipeline="basic")
    for (name, one), (_, other) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_what_is_missing_without_data(tiny_model_folder):
    state = State(model=load(tiny_model_folder("llama")))
    with pytest.raises(ValueError, match=r"CRePEModifier needs calibration data, and was given none.*state\.update"):
        crepe().initialize(state)


def test_data_that_can_be_read_once_is_refused(tiny_model_folder):
    state = State(model=load(tiny_model_folder("llama")))
    with pytest.raises(ValueError, match=r"calib_data is of the class generator, which can be read once.*DataLoader"):
        crepe().initialize(state, calib_data=(batch for batch in [{"input_ids": torch.tensor([[5, 6]])}]))


def test_patterns_that_match_nothing_are_named(tiny_model_folder, calibration_data, messages):
    recipe = [
        crepe(targets=["re:.*q_proj", "re:.*k_porj"], ignore=["re:.*dwon_proj", "lm_head"]),
        QuantizationModifier(targets="Lineer", scheme="FP8_DYNAMIC"),
    ]
    run(load(tiny_model_folder("llama")), recipe, calibration_data)
    said = [line for line in messages if "matches no module of LlamaForCausalLM" in line]
    for field, pattern in (("targets", "re:.*k_porj"), ("ignore", "re:.*dwon_proj"), ("targets", "Lineer")):
        assert any(f"{field} has {pattern!r}" in line for line in said)
    assert len(said) == 3


FOUND = {"row": 1.0, "column": 1.0, "neighbourhood": 0.0, "kernel_size": 3, "activation_exponent": 0.5}
FINDS_NOTHING = {
    "a search that is done": lambda: [PHOSearchModifier(found=FOUND)],
    "an allocation without data": lambda: [SparsityAllocationModifier(method="atp", sparsity=0.6)],
}


@pytest.mark.parametrize("before", FINDS_NOTHING)
def test_what_is_checked_once_is_checked_after_modifiers_that_look_at_no_layer(
    before, tiny_model_folder, vision_folder, calibration_data, messages
):
    unstructured = crepe(mask_structure="0:0", sparsity=None if "allocation" in before else 0.6)
    fields = unstructured.model_dump(include={"mask_structure", "sparsity"})
    misspelt = crepe(**fields, ignore=["re:.*qq_proj", "lm_head"])
    run(load(tiny_model_folder("llama")), [*FINDS_NOTHING[before](), misspelt], calibration_data)
    assert len([line for line in messages if "re:.*qq_proj" in line and "matches no module" in line]) == 1
    data = Dataset.from_dict({"input_ids": [[5, 6, 7, VOCABULARY]] * 2, "attention_mask": [[1] * 4] * 2})
    with pytest.raises(ValueError, match="is outside the model's vocabulary"):
        run(load(tiny_model_folder("llama")), [*FINDS_NOTHING[before](), crepe(**fields)], data)
    seeing = run(
        load(vision_folder),
        [*FINDS_NOTHING[before](), crepe(**fields)],
        calibration_data,
        processor=words(vision_folder),
    )
    zeros = {name: bool((module.weight == 0).any()) for name, module in linears(seeing).items()}
    assert all(found == ("language_model" in name) for name, found in zeros.items())


@pytest.mark.parametrize("second", [WeightCorrectionModifier, DSnoTModifier])
def test_the_toolkits_masks_replace_those_of_an_earlier_pruning(second, tiny_model_folder, calibration_data):
    """Everything outside of CRePE's masks is zero after Wanda, too: its zeros must not count as kept weights."""
    lighter = {"mask_structure": "0:0", "sparsity": 0.3}
    wanda = {"sparsity": 0.5, "mask_structure": "2:4", "targets": ["Linear"], "ignore": ["re:.*lm_head"]}
    recipe = [crepe(**lighter), WandaPruningModifier(**wanda), second()]
    model = run(load(tiny_model_folder("llama")), recipe, calibration_data)
    assert all(is_2of4(module.weight) for module in linears(model).values())
    model = run(load(tiny_model_folder("llama")), [crepe(**lighter)], calibration_data)
    run(model, [WandaPruningModifier(**wanda)], calibration_data)
    quantize = MaskedGPTQModifier(targets=["Linear"], ignore=["lm_head"], scheme="W8A8")
    run(model, [quantize], calibration_data)
    assert all(is_2of4(module.weight) for module in linears(model).values())


def test_weights_that_no_layer_holds_are_named(tiny_model_folder, calibration_data, tmp_path, messages):
    torch.manual_seed(0)
    model = t.DbrxForCausalLM(
        t.DbrxConfig(
            d_model=32,
            n_heads=4,
            n_layers=2,
            max_seq_len=64,
            vocab_size=96,
            attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        )
    )
    folder = save(model, tmp_path / "model", tiny_model_folder("llama"))
    run(load(folder), "crepe_2of4", calibration_data, output_dir=str(tmp_path / "out"))
    (line,) = [line for line in messages if "no linear layer holds them" in line]
    assert "2 x transformer.blocks.*.ffn.experts.mlp.w1" in line
    packed = read_folder(tmp_path / "out").layers
    assert set(packed) == {
        f"transformer.blocks.{block}.norm_attn_norm.attn.{name}" for block in (0, 1) for name in ("Wqkv", "out_proj")
    }


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (torch.zeros(0, dtype=torch.long), "batch 0 of the calibration data has no token: leave empty rows out"),
        (torch.tensor([3.0, 4.0]), "input_ids of batch 0 of the calibration data are torch.float32"),
    ],
)
def test_batches_of_a_user_s_loader_are_checked(ids, said, tiny_model_folder):
    with pytest.raises(ValueError, match=said):
        oneshot(model=load(tiny_model_folder("llama")), recipe=[crepe()], dataset=DataLoader([{"input_ids": ids}]))
