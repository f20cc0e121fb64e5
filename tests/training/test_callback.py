"""Masks under transformers' Trainer and TRL's SFTTrainer, run for real."""

import copy

import pytest
import torch
from datasets import Dataset
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from crepe_llm.checkpoints import read_folder
from crepe_llm.checkpoints.converting import compress_folder
from crepe_llm.training.callback import KeepMasksCallback
from crepe_llm.training.masked import find_masks
from sparse_models import linears, prune_2of4
from tiny_models import VOCABULARY, configs, letters_tokenizer, save_model


@pytest.fixture
def packed(tmp_path):
    """The folder of a small packed 2:4 model, and its masks."""
    save_model(configs()["llama"](), tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    masks = prune_2of4(model)
    model.save_pretrained(tmp_path / "plain")
    compress_folder(tmp_path / "plain", tmp_path / "packed")
    return tmp_path / "packed", masks


def arguments(folder, **options):
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        learning_rate=1e-2,
        weight_decay=0.1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        report_to=[],
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        **options,
    )


def rows(count=16):
    ids = torch.randint(3, VOCABULARY, (count, 16), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def assert_trained_under(model, masks, before):
    for name, module in linears(model).items():
        assert not module.weight[~masks[name]].any(), name
        assert not torch.equal(module.weight.detach(), before[f"{name}.weight"]), name


def test_a_loaded_packed_model_under_trainer(packed, tmp_path):
    folder, masks = packed
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    callback = KeepMasksCallback()
    Trainer(model=model, args=arguments(tmp_path / "out"), train_dataset=rows(), callbacks=[callback]).train()
    assert_trained_under(model, masks, before)
    assert callback.held.broken() == []


def test_bf16_autocast_checkpointing_and_a_resume(packed, tmp_path):
    folder, masks = packed

    def trained(name, **options):
        model = AutoModelForCausalLM.from_pretrained(folder)
        options |= {"bf16": True, "gradient_checkpointing": True, "save_steps": 2}
        trainer = Trainer(
            model=model,
            args=arguments(tmp_path / name, **options),
            train_dataset=rows(),
            callbacks=[KeepMasksCallback()],
        )
        return model, trainer

    straight, trainer = trained("straight")
    before = {name: tensor.clone() for name, tensor in straight.state_dict().items()}
    trainer.train()
    assert_trained_under(straight, masks, before)
    resumed, trainer = trained("straight")
    trainer.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    for (name, one), other in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_a_model_from_oneshot_goes_on_and_takes_its_best_state(tmp_path):
    """It packs what it saves, and a Trainer reads its checkpoints as plain weights."""
    save_model(configs()["llama"](), tmp_path / "dense")

    def trained(**options):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
        oneshot(model=model, recipe="magnitude_2of4")
        options = arguments(tmp_path / "out", save_steps=1, **options)
        data = {"train_dataset": rows(), "eval_dataset": rows()}
        return model, Trainer(model=model, args=options, callbacks=[KeepMasksCallback()], **data)

    straight, trainer = trained()
    trainer.train()
    resumed, trainer = trained()
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    for (name, one), other in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other), name
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    model, trainer = trained(eval_strategy="steps", eval_steps=1, lr_scheduler_type="constant", **best)
    trainer.args.learning_rate = 1.0  # it gets worse
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric
    copied = copy.deepcopy(model)
    trainer.train()
    copied.save_pretrained(tmp_path / "copied")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "copied")
    for (name, one), other in zip(copied.named_parameters(), reloaded.parameters(), strict=True):
        assert torch.equal(one, other), name
    model.save_pretrained(tmp_path / "final")
    assert read_folder(tmp_path / "final").layers and not read_folder(tmp_path / "out" / "checkpoint-4").layers


def test_a_mask_that_breaks_is_told_at_the_end(packed, tmp_path):
    folder, masks = packed
    model = AutoModelForCausalLM.from_pretrained(folder)
    name = next(iter(masks))

    class Vandal(KeepMasksCallback):
        def on_train_end(self, args, state, control, **kwargs):
            with torch.no_grad():
                model.get_submodule(name).weight.fill_(1.0)
            super().on_train_end(args, state, control, **kwargs)

    trainer = Trainer(model=model, args=arguments(tmp_path / "out"), train_dataset=rows(), callbacks=[Vandal()])
    with pytest.raises(ValueError, match=f"the first being {name}"):
        trainer.train()


def test_trl_sft_trainer(packed, tmp_path):
    from trl import SFTConfig, SFTTrainer

    folder, masks = packed
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokenizer = letters_tokenizer(False)
    tokenizer.pad_token = tokenizer.eos_token = "<unk>"
    options = SFTConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=3,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        max_length=32,
        packing=False,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=model,
        args=options,
        train_dataset=Dataset.from_list([{"text": "the quick brown fox jumps over the lazy dog"}] * 8),
        processing_class=tokenizer,
        callbacks=[KeepMasksCallback()],
    )
    trainer.train()
    assert_trained_under(model, masks, before)
    trainer.save_model(str(tmp_path / "saved"))
    assert find_masks(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")).keys() == masks.keys()
