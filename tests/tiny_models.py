"""Configurations of small models of every family, and the vocabulary that they share."""

VOCABULARY = 96


def configs(hidden_size=32, intermediate_size=48):
    import transformers as t

    llama = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    gemma = {
        "head_dim": hidden_size // 4,
        "num_key_value_heads": 1,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    opt = {"ffn_dim": intermediate_size, "word_embed_proj_dim": hidden_size}
    gpt2 = {"n_embd": hidden_size, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY}
    return {
        "llama": lambda: t.LlamaConfig(**llama, tie_word_embeddings=True),
        "qwen2": lambda: t.Qwen2Config(**llama),
        "gemma3": lambda: t.Gemma3TextConfig(**{**llama, **gemma, "sliding_window": 8}),
        "opt": lambda: t.OPTConfig(**{**llama, **opt}),
        "gpt2": lambda: t.GPT2Config(**gpt2, bos_token_id=0, eos_token_id=1, pad_token_id=2),
        "mixtral": lambda: t.MixtralConfig(**llama, num_local_experts=4, num_experts_per_tok=1),
    }


def save_model(config, folder):
    """Save a randomly initialised model with a tokenizer of one token a word."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    words = {f"w{index}": index for index in range(VOCABULARY - 1)} | {"<unk>": VOCABULARY - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="w0", eos_token="w1", pad_token="w2"
    ).save_pretrained(folder)


FAMILIES = ["llama", "qwen2", "gemma3", "opt", "gpt2"]


def letters_tokenizer(bos):
    """A tokenizer of one token a letter."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<bos>": 0, "<unk>": 1, "\n": 2, **{chr(c): c - 29 for c in range(32, 123)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", unk_token="<unk>")
