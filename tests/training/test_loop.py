"""The training loop: a resume from a checkpoint, whatever names transformers saves a family's weights under."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    TrainerCallback,
)

from crepe_llm.training import loop
from crepe_llm.training.loop import Plan, train
from crepe_llm.training.work_folder import best_state, keep_best, last_checkpoint
from tiny_models import configs

PLAN = Plan(learning_rate=1e-2, batch=2, micro_batch=2, steps=10, patience=10)
LENGTH = 16


def model_of(family):
    """A small model in fp32; of images its language model trains."""
    torch.manual_seed(0)
    if family != "images":
        return AutoModelForCausalLM.from_config(configs()[family]()).float()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = configs()["gemma3"]().to_dict()
    config = Gemma3Config(
        text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14}, mm_tokens_per_image=4
    )
    model = Gemma3ForConditionalGeneration(config).float()
    for part in (model.model.vision_tower, model.model.multi_modal_projector):
        part.requires_grad_(False)
    return model


def ids(count=16):
    """Windows of which every next token is the one after, in a ring of 16."""
    return (torch.arange(count)[:, None] + torch.arange(LENGTH)) % 16 + 3


def loss_of(model, inputs):
    more = {"token_type_ids": torch.zeros_like(inputs["input_ids"])} if "Gemma3For" in type(model).__name__ else {}
    logits = model(input_ids=inputs["input_ids"], use_cache=False, **more).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs["input_ids"][:, 1:].flatten())


class Kill(TrainerCallback):
    """A kill after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def trained(family, work, callbacks=(), loss=loss_of):
    """The model after its training, and the loop's report."""
    model, windows = model_of(family), ids()
    return model, train(model, windows[:12], windows[12:], loss, PLAN, work, [*callbacks])


def killed(family, work, step):
    """Train until a kill after a step; gives the folder of the last checkpoint."""
    with pytest.raises(KeyboardInterrupt):
        trained(family, work, [Kill(step)])
    return last_checkpoint(work)


@pytest.mark.parametrize("family", ["llama", "mixtral", "images"])
def test_a_resume_gives_the_weights_of_one_run(family, tmp_path):
    """transformers saves Mixtral's experts and Gemma's language model beside images under other names than it has."""
    straight, report = trained(family, tmp_path / "straight")
    assert killed(family, tmp_path / "resumed", 6).endswith("checkpoint-5")
    resumed, other = trained(family, tmp_path / "resumed")
    assert (other.losses, other.held_out) == (report.losses, report.held_out)
    for (name, one), two in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two), name


def test_a_checkpoint_under_other_names_is_refused(tmp_path):
    folder = killed("mixtral", tmp_path / "work", 6)
    model = model_of("mixtral")
    model.load_state_dict(load_file(f"{folder}/model.safetensors"), strict=False)
    model.save_pretrained(folder)  # as transformers' own loop does
    with pytest.raises(
        ValueError, match=r"checkpoint-5 of an interrupted recovery has no weights for \S+, which trains: remo"
    ):
        trained("mixtral", tmp_path / "work")


@pytest.mark.parametrize("checkpoints", [0, 2])  # over the training, so none or one at step 5
def test_a_state_better_than_what_a_resume_comes_to_stays_the_best(checkpoints, tmp_path, monkeypatch):
    """Under a budget of minutes a resume need not take the same steps again; here it takes the opposite ones."""

    def opposite(model, inputs):
        return loss_of(model, inputs) * (-1 if model.training else 1)

    monkeypatch.setattr(loop, "_CHECKPOINTS", checkpoints)
    killed("llama", tmp_path / "work", 8)
    step, kept = best_state(tmp_path / "work")
    assert step == 7
    _, report = trained("llama", tmp_path / "work", loss=opposite)
    step, after = best_state(tmp_path / "work")
    assert (report.best_step, step) == (7, 7)
    assert all(torch.equal(after[name], kept[name]) for name in kept)
    losses = dict(report.held_out)
    assert [*losses] == [*range(11)] and min(losses, key=losses.get) == 7


def test_patience_is_for_what_a_resume_itself_comes_to(tmp_path):
    """A state of a later step than it gets to says nothing of whether it gets worse."""
    work = tmp_path / "work"
    killed("llama", work, 6)
    keep_best(work, 100, best_state(work)[1], 1e-3)
    model, windows = model_of("llama"), ids()
    plan = dataclasses.replace(PLAN, patience=2)
    report = train(model, windows[:12], windows[12:], loss_of, plan, work, [])
    assert (report.steps, report.best_step, report.ended) == (10, 100, "")

    def worse(model, inputs):
        return loss_of(model, inputs) * (-1 if model.training else 1)

    report = train(model_of("llama"), windows[:12], windows[12:], worse, plan, tmp_path / "other", [])
    assert report.steps < 10 and report.ended == "2 evaluations in a row were worse than that of step 0"


def test_a_resume_that_comes_to_a_better_state_keeps_that(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_CHECKPOINTS", 2)
    killed("llama", tmp_path / "work", 8)
    _, report = trained("llama", tmp_path / "work")
    assert (report.best_step, best_state(tmp_path / "work")[0]) == (10, 10)
