"""GGUF files, and the transformers models and tokenizers built from them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    import torch

__all__ = ["Gguf", "convert_weights", "gemma3_config", "gemma3_tokenizer", "llama_config", "smollm2_tokenizer"]

_ORDINARY, _CONTROL, _USER_DEFINED = 1, 3, 4  # GGUF's token types


class Gguf:
    """A GGUF file: `file[key]` is a metadata value, `tensor(name)` a dequantised fp32 tensor."""

    def __init__(self, path: Path) -> None:
        import gguf

        self._reader = gguf.GGUFReader(path)
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.architecture: str = self["general.architecture"]

    def __getitem__(self, key: str) -> Any:
        return self._reader.fields[key].contents()

    def hyperparameter(self, key: str) -> Any:
        return self[f"{self.architecture}.{key}"]

    def tensor(self, name: str) -> "torch.Tensor":
        import gguf
        import torch

        tensor = self._tensors[name]
        return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())


def llama_config(source: Gguf) -> Any:
    from transformers import LlamaConfig

    rope = {"rope_type": "default", "rope_theta": source.hyperparameter("rope.freq_base")}
    return LlamaConfig(**_common_fields(source), rope_parameters=rope)


def gemma3_config(source: Gguf) -> Any:
    from transformers import Gemma3TextConfig

    # What the GGUF does not say (the pattern of sliding layers, their rotary base) has the family's default values.
    return Gemma3TextConfig(
        **_common_fields(source),
        head_dim=source.hyperparameter("attention.key_length"),
        query_pre_attn_scalar=source.hyperparameter("attention.key_length"),
        sliding_window=source.hyperparameter("attention.sliding_window"),
    )


def _common_fields(source: Gguf) -> dict[str, Any]:
    return {
        "vocab_size": len(source["tokenizer.ggml.tokens"]),
        "hidden_size": source.hyperparameter("embedding_length"),
        "intermediate_size": source.hyperparameter("feed_forward_length"),
        "num_hidden_layers": source.hyperparameter("block_count"),
        "num_attention_heads": source.hyperparameter("attention.head_count"),
        "num_key_value_heads": source.hyperparameter("attention.head_count_kv"),
        "max_position_embeddings": source.hyperparameter("context_length"),
        "rms_norm_eps": source.hyperparameter("attention.layer_norm_rms_epsilon"),
        "bos_token_id": source["tokenizer.ggml.bos_token_id"],
        "eos_token_id": source["tokenizer.ggml.eos_token_id"],
        "pad_token_id": source["tokenizer.ggml.padding_token_id"],
        "tie_word_embeddings": True,
    }


def convert_weights(source: Gguf, config: Any) -> Any:
    """Build the transformers model of `config` in fp32 and fill every parameter from the GGUF."""
    import gguf
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.tie_weights()
    architecture = {"llama": gguf.MODEL_ARCH.LLAMA, "gemma3": gguf.MODEL_ARCH.GEMMA3}[source.architecture]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    with torch.no_grad():
        for name, parameter in tqdm(list(model.named_parameters()), desc="dequantising", unit=" tensors"):
            value = source.tensor(names.get_name(name, try_suffixes=(".weight",)) or name)
            if source.architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
                # GGUF interleaves the two halves of each head's rotary pairs; transformers keeps them apart.
                heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
                value = value.view(heads, -1, 2, value.shape[1]).transpose(1, 2).reshape(value.shape)
            if source.architecture == "gemma3" and name.endswith("norm.weight"):
                value = value - 1  # GGUF stores the whole factor, transformers its difference from one
            parameter.copy_(value)
    return model


def smollm2_tokenizer(source: Gguf) -> Any:
    """Byte-level BPE after single digits, as SmolLM2 was trained with."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = source["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in source["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = source["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|im_end|>",
        chat_template=source["tokenizer.chat_template"],
        model_max_length=source.hyperparameter("context_length"),
    )


def gemma3_tokenizer(source: Gguf) -> Any:
    """Gemma 3's BPE, with the merges that the GGUF leaves out recovered from the tokens and their scores."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    # The GGUF writes runs of spaces as such; the vocabulary has them after normalisation.
    tokens = [token.replace(" ", "▁") for token in source["tokenizer.ggml.tokens"]]
    types = source["tokenizer.ggml.token_type"]
    merges = _merges(tokens, source["tokenizer.ggml.scores"], types)
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern=" ", behavior="merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", tokens.index("<bos>"))]
    )
    special = {"<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>"}
    special.add("<end_of_image>")
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=token in special)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=source.hyperparameter("context_length"),
    )


def _merges(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    """Recover the merges of a SentencePiece BPE: every split of a token into two tokens, best token first.

    Runs of white space are user-defined tokens without a score; they merge first, the longest first.
    """
    vocabulary = set(tokens)
    ranked = []
    for index, (token, score, kind) in enumerate(zip(tokens, scores, types, strict=True)):
        if kind not in (_ORDINARY, _USER_DEFINED):
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                rank = (0.0, -cut, -len(right), index) if kind == _USER_DEFINED else (1.0, -score, index, -cut)
                ranked.append((rank, left, right))
    ranked.sort(key=lambda merge: merge[0])
    return [(left, right) for _, left, right in ranked]
