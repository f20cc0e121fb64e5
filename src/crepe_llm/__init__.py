"""Sparsity for llm-compressor and vLLM.

Importing this package is cheap (no torch, no llm-compressor) and makes two toolkits aware of it, each at
the moment it is imported itself, or at once where it already was:

- llm-compressor learns the modifiers of :mod:`crepe_llm.modifiers`, so that recipes can name them, and the names of
  the recipes that ship with this package;
- transformers learns to load ``sparse-24-bitmask`` checkpoints, and those whose blocks have FFNs of different widths
  (:mod:`crepe_llm.checkpoints`).

Both also happen without any import of this package, through the ``torch.backends`` entry point
``crepe_llm:_autoload`` that ``import torch`` calls (switch off with ``TORCH_DEVICE_BACKEND_AUTOLOAD=0``).
"""

import importlib
import sys

from crepe_llm._autoload import after_import

__version__ = "0.1.0"


def _register_modifiers() -> None:
    # Whoever imports the modifiers first is importing them now, and they register when that is done.
    importlib.import_module("crepe_llm.modifiers")


def _register_oneshot() -> None:
    _once_imported("crepe_llm.oneshot.checked", "register")


def _register_loader() -> None:
    _once_imported("crepe_llm.checkpoints.loading", "register")


def _register_refusal() -> None:
    _once_imported("crepe_llm.checkpoints.loading", "register_refusal")


def _register_per_block() -> None:
    _once_imported("crepe_llm.models.per_block", "register")


def _once_imported(module: str, function: str) -> None:
    """Import a module, and call a function of it: now, or when whoever is importing the module has done so."""
    importlib.import_module(module)
    after_import(module, lambda: getattr(sys.modules[module], function)())


def _autoload() -> None:
    """The ``torch.backends`` entry point: importing this package has already done the work."""


# Each trigger is a module whose import completes only after everything that the callback itself imports.
after_import("llmcompressor.entrypoints.oneshot", _register_modifiers)
after_import("llmcompressor.entrypoints.oneshot", _register_oneshot)
after_import("transformers.quantizers.auto", _register_loader)
after_import("transformers.modeling_utils", _register_refusal)
after_import("transformers.models.auto.configuration_auto", _register_per_block)
