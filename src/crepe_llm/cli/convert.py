"""`crepe compress` and `crepe decompress`: a checkpoint's 2:4 layers packed, and unpacked again."""

import argparse
from pathlib import Path
from typing import Any

from crepe_llm.cli.common import HelpFormatter
from crepe_llm.cli.models import weight_bytes
from crepe_llm.cli.results import add_json, check_json, write_json


def add_compress(subparsers: Any) -> None:
    _add_conversion(
        subparsers,
        "compress",
        "pack the 2:4 layers of a checkpoint",
        "Convert a folder of safetensors whose linear layers hold 2:4 zeros into the sparse-24-bitmask format, one "
        "file at a time. Layers that are not 2:4 stay as they are. The output folder is complete or absent.",
        "crepe compress PRUNED PACKED",
    )


def add_decompress(subparsers: Any) -> None:
    _add_conversion(
        subparsers,
        "decompress",
        "unpack a 2:4 checkpoint into plain weights",
        "Convert a sparse-24-bitmask checkpoint into plain weights with zeros, which every reader loads, one file "
        "at a time. The output folder is complete or absent.",
        "crepe decompress PACKED PLAIN",
    )


def _add_conversion(subparsers: Any, name: str, summary: str, description: str, example: str) -> None:
    parser = subparsers.add_parser(
        name,
        help=summary,
        description=description,
        epilog=f"example:\n  {example}\n",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("source", metavar="DIR", type=Path, help="a folder with config.json and safetensors")
    parser.add_argument("destination", metavar="OUT", type=Path, help="a folder that does not hold a model yet")
    add_json(parser)
    parser.set_defaults(run=run, conversion=name)


def run(options: argparse.Namespace) -> None:
    from crepe_llm.checkpoints import compress_folder, decompress_folder

    check_json(options)
    if not options.source.is_dir():
        raise NotADirectoryError(f"{options.source} is not a folder: name a folder with config.json and safetensors")
    convert = {"compress": compress_folder, "decompress": decompress_folder}[options.conversion]
    layers = convert(options.source, options.destination, progress=True)
    before, after = (weight_bytes(folder) for folder in (options.source, options.destination))
    what = "packed" if convert is compress_folder else "unpacked"
    print(
        f"{options.destination}: {len(layers)} layers {what}, {before / 1e6:.1f} MB of safetensors became "
        f"{after / 1e6:.1f} MB"
    )
    write_json(
        options,
        {
            "source": options.source,
            "output": options.destination,
            "layers": len(layers),
            "bytes_before": before,
            "bytes": after,
        },
    )
