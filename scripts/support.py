"""Which model families work: pruned, saved, loaded again and served, one small random model each.

    python scripts/support.py                          # every family, without vLLM
    python scripts/support.py --vllm                   # and greedy tokens in vLLM
    python scripts/support.py --families llama gpt2 --recipes crepe_2of4
    python scripts/support.py --report                 # writes docs/support.md from the rows that are there

Each family and recipe has a process of its own. The model (fp32, 2 blocks, hidden size 128) is calibrated on 16 windows
of random tokens, pruned by the shipped recipe, saved, and loaded by transformers, which must neither miss a tensor nor
find one too many; then its logits are compared with those of the model in memory. With --vllm the folder's greedy
tokens are compared with those of the same folder decompressed; that vLLM does not serve a family is said beside what
transformers gave. Rows are appended to --results with their provenance; the page has the newest of each family and
recipe.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

from records import RESULTS, Row, append, read  # noqa: E402

# Raised by every change of how something is checked.
# 2: experts are packed and INT8 ones judged by the median token; what vLLM refuses is no failure of the rest.
# 3: tokens of INT8 layers may differ where vLLM finds two as good as equally likely.
PROTOCOL = 3
RECIPES = ("crepe_2of4", "crepe_2of4_best", "crepe_2of4_int8")
PAGE = ROOT / "docs" / "support.md"
WINDOWS, LENGTH, SECONDS = 16, 32, 900
TOO_LONG = -1000  # the status of a process that was killed for the time that it took
# Logits relative to the largest: those of the same weights in fp32, of INT8 layers, whose inputs are rounded, too, and
# of the median token of INT8 experts: transformers reads these dequantized, so that only the model in memory rounds
# their inputs, and a token may be routed to other experts.
TOLERANCE, INT8_TOLERANCE, INT8_EXPERTS_TOLERANCE = 1e-5, 2e-2, 6e-2

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
HEADS_OF_32 = {"head_dim": 32}
MULTI_HEAD = {"num_key_value_heads": 4}
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LATENT = {
    # The only sizes for which vLLM has latent attention on a CPU.
    **{"kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 32, "qk_rope_head_dim": 64, "v_head_dim": 32},
    **{"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 64, "first_k_dense_replace": 1},
    **{"num_experts_per_tok": 2, "n_shared_experts": 1, **MULTI_HEAD},
}
LATENT_HEADS = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ONE_GROUP = {"n_group": 1, "topk_group": 1}
ROUTED_AND_SHARED = {
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_shared_experts": 1},
    **ONE_GROUP,
}
MAMBA_1 = {"state_size": 16, "expand": 2, "time_step_rank": 8}
MAMBA_2 = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_expand": 2}
GATED_DELTA = {
    **{**HEADS_OF_32, "layer_types": ["linear_attention", "full_attention"]},
    **{"linear_num_value_heads": 4, "linear_num_key_heads": 2},
    **{"linear_key_head_dim": 32, "linear_value_head_dim": 32},
}
# vLLM has the attention of these in bf16 only.
BF16 = ("qwen3_next",)
# Tokens whose log-probabilities differ by less are as good as equally likely: in bf16, and with INT8 inputs, of which
# one that is rounded the other way moves the log-probabilities of all tokens after it by up to 0.02.
ROUNDED_TIE = 0.05
GPT = {"n_positions": 512, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_inner": 256}

# By transformers' model_type what differs from SIZES.
FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": {
        **{**ROUTED, **HEADS_OF_32, "num_dense_layers": 1, "num_shared_experts": 1, **ONE_GROUP},
        **{"score_func": "sigmoid", "route_norm": True, "route_scale": 1.0},  # as published; vLLM reads them
    },
    "apertus": {},
    "arcee": {},
    "bamba": {**MAMBA_2, "attn_layer_indices": [1]},
    "bitnet": {},
    "bloom": {"n_layer": 2, "n_head": 4},
    "cohere": {},
    "cohere2": {},
    "dbrx": {
        **{"d_model": 128, "n_heads": 4, "n_layers": 2, "max_seq_len": 512},
        "ffn_config": {"hidden_size": 128, "ffn_hidden_size": 256, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
    },
    "deepseek_v2": LATENT,
    "deepseek_v3": {**LATENT, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},  # as published; vLLM reads them
    "diffllama": MULTI_HEAD,
    "dots1": {**HEADS_OF_32, **ROUTED_AND_SHARED, "first_k_dense_replace": 1},
    "ernie4_5": HEADS_OF_32,
    "ernie4_5_moe": {
        **{**HEADS_OF_32, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64},
        **{"moe_num_shared_experts": 1, "moe_layer_start_index": 1, "moe_layer_end_index": 1},
    },
    "exaone4": {"sliding_window": 64},
    "exaone_moe": {
        **{**HEADS_OF_32, **ROUTED, **ONE_GROUP, "num_shared_experts": 1, "is_moe_layer": [False, True]},
        "layer_types": ["full_attention", "full_attention"],
    },
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 512},
    "falcon_h1": {**HEADS_OF_32, **MAMBA_2, "mamba_d_ssm": 256},
    "falcon_mamba": MAMBA_1,
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "gemma": HEADS_OF_32,
    "gemma2": HEADS_OF_32,
    "gemma3_text": {**HEADS_OF_32, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16},
    "gemma3n_text": {
        **{**HEADS_OF_32, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16},
        **{"vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 32, "num_kv_shared_layers": 0},
        **{"activation_sparsity_pattern": [0.0, 0.0], "laurel_rank": 16},
    },
    "glm": {**HEADS_OF_32, "pad_token_id": 0},
    "glm4": {**HEADS_OF_32, "pad_token_id": 0},
    "glm4_moe": {**HEADS_OF_32, **ROUTED_AND_SHARED, "first_k_dense_replace": 1},
    "gpt2": GPT,
    "gpt_bigcode": {**GPT, "num_key_value_heads": 1},  # as it is: queries of several heads, one of keys and values
    "gpt_neox": MULTI_HEAD,
    "gpt_oss": {**HEADS_OF_32, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
    "gptj": {**GPT, "rotary_dim": 16},
    "granite": {},
    "granitemoe": LOCAL_EXPERTS,
    "granitemoehybrid": {
        **LOCAL_EXPERTS,
        **MAMBA_2,
        "layer_types": ["mamba", "attention"],
        "shared_intermediate_size": 64,
    },
    "granitemoeshared": {**LOCAL_EXPERTS, "shared_intermediate_size": 64},
    "helium": HEADS_OF_32,
    "hunyuan_v1_dense": HEADS_OF_32,
    "hunyuan_v1_moe": {**HEADS_OF_32, "num_experts": 4, "moe_topk": 2, "num_shared_expert": 1},
    "jamba": {
        **{"num_experts": 4, "num_experts_per_tok": 2, "expert_layer_period": 2, "expert_layer_offset": 1},
        **{"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
        **{"mamba_d_state": 16, "mamba_dt_rank": 8},
    },
    "jetmoe": {**LOCAL_EXPERTS, "kv_channels": 32},
    "lfm2": {
        **{"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        # As published; vLLM reads them.
        **{"conv_dim": 128, "conv_dim_out": 128, "block_dim": 128, "block_ff_dim": 256},
        **{"block_multiple_of": 32, "block_ffn_dim_multiplier": 1.0},
    },
    "lfm2_moe": {**ROUTED, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama": {},
    "mamba": MAMBA_1,
    "mamba2": {"head_dim": 32, "num_heads": 8, "n_groups": 1, "state_size": 16, "expand": 2},
    "minicpm3": {**MULTI_HEAD, "kv_lora_rank": 32, "q_lora_rank": 32, **dict.fromkeys(LATENT_HEADS, 32)},
    "minimax": {**HEADS_OF_32, **LOCAL_EXPERTS, "layer_types": ["linear_attention", "full_attention"]},
    "ministral": HEADS_OF_32,
    "mistral": HEADS_OF_32,
    "mixtral": LOCAL_EXPERTS,
    "mpt": {"d_model": 128, "n_heads": 4, "n_layers": 2, "max_seq_len": 512},
    "nemotron": HEADS_OF_32,
    "nemotron_h": {
        **{**HEADS_OF_32, "layers_block_type": ["mamba", "attention"], "mamba_num_heads": 8, "mamba_head_dim": 32},
        **{"n_groups": 1, "ssm_state_size": 16, "n_routed_experts": 4},
    },
    "olmo": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 16},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "opt": {"ffn_dim": 256, "word_embed_proj_dim": 128},
    "persimmon": MULTI_HEAD,
    "phi": {},
    "phi3": {"original_max_position_embeddings": 512},
    "phimoe": LOCAL_EXPERTS,
    "qwen2": {},
    "qwen2_moe": {**ROUTED, "shared_expert_intermediate_size": 128},
    "qwen3": HEADS_OF_32,
    "qwen3_5_moe_text": {**ROUTED, **GATED_DELTA, "shared_expert_intermediate_size": 64},
    "qwen3_5_text": GATED_DELTA,
    "qwen3_moe": {**ROUTED, **HEADS_OF_32},
    "qwen3_next": {
        **{**ROUTED, **GATED_DELTA, "shared_expert_intermediate_size": 64},
        **{"linear_key_head_dim": 128, "linear_value_head_dim": 128},  # vLLM has no smaller ones on a CPU
        "num_experts_per_tok": 4,  # all: in bf16 rounding sends a token to other experts
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 128, "attention_window_size": 64},
    "seed_oss": HEADS_OF_32,
    "smollm3": {},
    "solar_open": {**HEADS_OF_32, **ROUTED_AND_SHARED},
    "stablelm": {},
    "starcoder2": {},
    "vaultgemma": HEADS_OF_32,
    "xglm": {"d_model": 128, "ffn_dim": 256, "num_layers": 2, "attention_heads": 4},
}


def check(family: str, recipe: str, folder: Path) -> Row:
    """Prune one model, save it, load it and compare; in this process."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from loguru import logger
    from transformers import AutoConfig, AutoModelForCausalLM

    from crepe_llm.checkpoints import read_folder
    from tiny_models import save_model

    logger.remove()
    config = AutoConfig.for_model(family, **SIZES | FAMILIES[family])
    save_model(config, folder / "dense")
    model = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32)
    ids = torch.randint(3, SIZES["vocab_size"], (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(1))
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    oneshot(model=model, recipe=recipe, dataset=data, num_calibration_samples=WINDOWS)
    with torch.no_grad():
        wanted = model.eval()(input_ids=ids[:4]).logits
    model.save_pretrained(folder / "pruned")
    loaded, info = AutoModelForCausalLM.from_pretrained(
        folder / "pruned", dtype=torch.float32, output_loading_info=True
    )
    with torch.no_grad():
        given = loaded.eval()(input_ids=ids[:4]).logits
    apart = (given - wanted).abs().amax(-1) / wanted.abs().max()
    odd = [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[kind]]
    return {
        "packed": len(read_folder(folder / "pruned").layers),
        "odd_keys": len(odd),
        "logits": float(apart.max()),
        "logits_median": float(apart.median()),
    }


def served(family: str, recipe: str, folder: Path) -> str:
    """Whether vLLM gives the same greedy tokens for a packed folder and for its decompressed twin."""
    from crepe_llm.checkpoints import decompress_folder, read_folder
    from vllm_runs import TIE, assert_same, generate

    dtype = "bfloat16" if family in BF16 else "float32"
    tie = ROUNDED_TIE if family in BF16 or recipe.endswith("int8") else TIE
    if not read_folder(folder / "pruned").layers:
        generate(folder / "pruned", dtype)
        return "served dense"
    decompress_folder(folder / "pruned", folder / "twin")
    ours = generate(folder / "pruned", dtype)
    try:
        dense = generate(folder / "twin", dtype)
    except NotImplementedError as error:  # dense INT8 experts on most CPUs
        return f"served; its dense twin is not: {str(error).partition('(')[0].strip()}"
    assert_same(ours, dense, tie)
    return f"tokens equal{' (bf16)' * (family in BF16)}"


class Workers:
    """A process that has imported what every check needs, and forks one for each.

    Args:
        vllm: whether vLLM is imported, too.
    """

    def __init__(self, vllm: bool) -> None:
        command = [sys.executable, "-W", "ignore", __file__, "--workers", *["--vllm"] * vllm]
        quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "VLLM_NO_USAGE_STATS": "1"}
        quiet |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "LLM_COMPRESSOR_LOG_DISABLED": "true", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | quiet
        )

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate()

    def run(self, family: str, recipe: str, vllm: bool) -> Row:
        """The row of one family and recipe; with what its process died of."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps([family, recipe, folder, vllm]), file=self._process.stdin, flush=True)
            status = int(self._process.stdout.readline())
            return row_of(status, *((Path(folder) / name).read_text() for name in ("output", "errors")))


def row_of(status: int, output: str, errors: str) -> Row:
    """The row of a process that has ended with this status (below 0: a signal) and wrote this."""
    rows = [json.loads(line) for line in output.splitlines() if line.startswith('{"packed": ')]
    if status == 0:
        return dict(rows[-1])
    # Without pydantic's last line, and what progress bars leave.
    lines = [line.strip() for line in errors.splitlines() if not re.search(r"For further information|\d+/\d+ \[", line)]
    said = next(filter(None, reversed(lines)), "no message")
    if status < 0:
        said = f"not done after {SECONDS} s" if status == TOO_LONG else f"ended by signal {-status}"
    said = re.sub(r"^[\w.]+: |/\S*/", "", said)[:300]  # no folders of this machine
    return rows[-1] | {"vllm": f"no: {said}"} if rows else {"error": said}


def serve_checks(serving: bool) -> None:
    """Fork a process for each check that a line of the input names; answer with the status that it ended with."""
    import datasets  # noqa: F401
    import llmcompressor  # noqa: F401

    if serving:
        import vllm.entrypoints.llm  # noqa: F401
    for line in sys.stdin:
        child = os.fork()
        if not child:
            _check_and_end(*json.loads(line))
        print(_status_of(child), flush=True)


def _check_and_end(family: str, recipe: str, folder: str, vllm: bool) -> None:
    """One check in a process of its own, whose output goes to files in the folder."""
    status = 1
    try:
        for name, number in (("output", 1), ("errors", 2)):
            os.dup2(os.open(Path(folder) / name, os.O_WRONLY | os.O_CREAT), number)
        found = check(family, recipe, Path(folder))
        print(json.dumps(found), flush=True)
        if vllm:
            print(json.dumps(found | {"vllm": served(family, recipe, Path(folder))}), flush=True)
        status = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _status_of(child: int) -> int:
    """Wait for a process; TOO_LONG where it had to be killed."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return TOO_LONG


def verdict(row: Row) -> str:
    """What the page says of one row."""
    if "error" in row:
        return f"no: {_cause(row['error'])}"
    experts = any("expert" in field for field in FAMILIES[row["family"]])
    apart, tolerance = row["logits"], INT8_TOLERANCE if row["recipe"].endswith("int8") else TOLERANCE
    if experts and row["recipe"].endswith("int8"):
        apart, tolerance = row["logits_median"], INT8_EXPERTS_TOLERANCE
    if row["odd_keys"] or not apart <= tolerance:
        return f"no: {row['odd_keys']} tensors missing or too many, logits apart by {apart:.1g}"
    return f"{row['packed']} layers packed" if row["packed"] else "pruned, saved dense"


def page(rows: list[Row]) -> str:
    """docs/support.md."""
    newest = {(row["family"], row["recipe"]): row for row in rows if row["protocol"] == PROTOCOL}
    recipes = [recipe for recipe in RECIPES if any(name == recipe for _, name in newest)]
    served = any("vllm" in row for row in newest.values())
    lines = [
        "# Model families",
        "",
        "Written by `scripts/support.py` from `benchmarks/results/support.jsonl`, never by hand. Each cell is a small",
        "random model of the family, pruned by the shipped recipe, saved and loaded again by transformers with the",
        "same logits and no tensor missing. What vLLM says is of the packed folder beside its decompressed twin. A "
        "family\nthat it cannot run it could not run dense, either."
        if served
        else "same logits and no tensor missing. None of these was served by vLLM yet; what was is in the tests.",
        "",
        f"| family | {' | '.join(recipes)} |" + " vLLM |" * served,
        "|---" * (len(recipes) + 1 + served) + "|",
    ]
    for family in sorted({family for family, _ in newest}):
        mine = [newest.get((family, recipe)) for recipe in recipes]
        cells = [verdict(row) if row else "" for row in mine]
        said = {row["recipe"]: row["vllm"] for row in mine if row and "vllm" in row}
        lines.append(f"| {family} | {' | '.join(cells)} |" + f" {_of_all(said)} |" * served)
    commits = sorted({row["provenance"]["commit"][:7] for row in newest.values()})
    lines += ["", f"Made with commit {', '.join(commits)}."]
    return "\n".join(lines) + "\n"


def _cause(text: str) -> str:
    """The first sentence of a message, without the cure that may follow, in whole words."""
    sentence = text.partition(". ")[0].partition(": add ")[0]
    return textwrap.shorten(sentence, 140, placeholder=" ...").replace("|", "/")


def _of_all(said: dict[str, str]) -> str:
    """What vLLM says of a family's recipes: once where it is the same for all."""
    short = {recipe: _cause(text) for recipe, text in said.items()}
    alike: dict[str, list[str]] = {}
    for recipe, text in short.items():
        alike.setdefault(text, []).append(recipe)
    if len(alike) < 2:
        return "".join(alike)
    return "; ".join(f"{', '.join(recipes)}: {text}" for text, recipes in alike.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="FAMILY")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--vllm", action="store_true", help="serve every model, too")
    parser.add_argument("--results", type=Path, default=RESULTS / "support.jsonl")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--report", action="store_true", help="check nothing")
    options = parser.parse_args()
    failed = 0 if options.report else check_all(options)
    options.page.write_text(page(read(options.results)))
    return 1 if failed else 0


def check_all(options: argparse.Namespace) -> int:
    """Append a row for each family and recipe; how many have failed."""
    failed = 0
    with Workers(options.vllm) as workers:
        for family in options.families:
            for recipe in options.recipes:
                key = {"family": family, "recipe": recipe}
                row = append(options.results, PROTOCOL, key | workers.run(family, recipe, options.vllm))
                print(f"{family}, {recipe}: {verdict(row)}; {row.get('vllm', 'not served')}", flush=True)
                failed += verdict(row).startswith("no")
    return failed


if __name__ == "__main__":
    if sys.argv[1:2] == ["--workers"]:
        serve_checks("--vllm" in sys.argv)
    else:
        sys.exit(main())
