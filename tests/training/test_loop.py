"""The training loop: a resume from a checkpoint, whatever names transformers saves a family's weights under."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    TrainerCallback,
)

from crepe_llm.training.loop import Plan, train
from crepe_llm.training.work_folder import last_checkpoint
from tiny_models import VOCABULARY, configs

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
    """Windows of which every next token is the one after."""
    return (torch.arange(count)[:, None] * 5 + torch.arange(LENGTH)) % (VOCABULARY - 3) + 3


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


def trained(family, work, plan=PLAN, callbacks=()):
    """The model after its training, and the loop's report."""
    model, windows = model_of(family), ids()
    return model, train(model, windows[:12], windows[12:], loss_of, plan, work, [*callbacks])


def killed(family, work, step, plan=PLAN):
    """Train until a kill after a step; gives the folder of the last checkpoint."""
    with pytest.raises(KeyboardInterrupt):
        trained(family, work, plan, [Kill(step)])
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
