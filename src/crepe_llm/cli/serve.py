"""`crepe serve`: vLLM's server on a checkpoint."""

import argparse
from typing import Any

from crepe_llm.cli.common import HelpFormatter


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "serve",
        help="serve a model with vLLM, 2:4 weights compressed",
        description=(
            "Start vLLM's OpenAI-compatible server on a checkpoint folder or Hugging Face id. 2:4 checkpoints are "
            "served from compressed weights with sparse kernels, all others as vLLM does alone. On a CPU, a quarter of "
            "the available memory is given to the key-value cache unless you say otherwise."
        ),
        epilog=(
            "examples:\n"
            "  crepe serve smollm2-2of4\n"
            "  crepe serve DIR --port 8001 --dtype bfloat16 --max-model-len 2048     any option of `vllm serve`\n"
        ),
        formatter_class=HelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="a checkpoint folder or a Hugging Face id")
    parser.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER, help="options for vLLM")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from crepe_llm.vllm_plugin.serve import serve

    serve(options.model, options.arguments)
