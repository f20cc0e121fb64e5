import pytest
import torch
import transformers as t

from crepe_llm.models.tokens import check_positions, check_vocabulary, learned_positions
from tiny_models import configs


def model_of(config):
    return t.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(("family", "positions"), [("opt", 64), ("gpt2", 64), ("llama", None), ("gemma3", None)])
def test_learned_positions(family, positions):
    assert learned_positions(model_of(configs()[family]())) == positions


def test_positions_of_images_are_no_tokens():
    """The decoder of these is the whole body, in which a vision tower comes first."""
    image = {"image_size": 28, "patch_size": 14, "hidden_size": 32, "embed_dim": 32, "num_hidden_layers": 1}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.device("meta"):
        idefics = t.IdeficsForVisionText2Text(t.IdeficsConfig(**sizes, vocab_size=96, vision_config=image))
        phi = t.Phi4MultimodalForCausalLM(t.Phi4MultimodalConfig(**sizes, num_key_value_heads=2, vocab_size=200100))
    assert learned_positions(idefics) is None and learned_positions(phi) is None


def test_as_many_positions_as_a_model_runs_on():
    import torch

    bart = t.BartConfig(
        vocab_size=96, d_model=32, decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=32,
        max_position_embeddings=40, is_decoder=True, is_encoder_decoder=False,
    )  # fmt: skip
    for config in (bart, configs()["opt"](), configs()["gpt2"]()):
        model = model_of(config)
        positions = learned_positions(model)
        model(input_ids=torch.full((1, positions), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, positions + 1), 5))


def test_refusals_name_the_numbers():
    model = model_of(configs()["gpt2"]())
    check_positions(model, 64)
    check_vocabulary(model, 0, 95)
    with pytest.raises(ValueError, match=r"sequences of 65 tokens.*64 positions.*max_seq_length=64"):
        check_positions(model, 65)
    with pytest.raises(ValueError, match=r"token id 96 is outside the model's vocabulary of 96"):
        check_vocabulary(model, 0, 96)
    with pytest.raises(ValueError, match=r"token id -1 is outside"):
        check_vocabulary(model, -1, 5)
