"""Serves ``sparse-24-bitmask`` checkpoints in an unmodified vLLM, from compressed weights with sparse kernels.

Checkpoints whose blocks have FFNs of different widths are served too; all others as if this package were not installed.
vLLM calls :func:`register` in every process it starts, through the entry point group ``vllm.general_plugins``.
"""

import logging

QUANTIZATION = "crepe-sparse24"
"""The name under which vLLM knows :class:`~crepe_llm.vllm_plugin.config.Sparse24Config`."""

_logger = logging.getLogger(__name__)


def register() -> None:
    """Tells vLLM about the sparse checkpoint format; calling it again changes nothing.

    A vLLM whose surface this package does not know is left as it is, with a warning: it must go on serving every
    other model.
    """
    try:
        from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

        if QUANTIZATION in QUANTIZATION_METHODS:
            return
        from vllm.model_executor.models import ModelRegistry

        from crepe_llm.models import per_block as configs
        from crepe_llm.vllm_plugin import loading
        from crepe_llm.vllm_plugin import per_block as models
        from crepe_llm.vllm_plugin.config import Sparse24Config
    except ImportError as error:
        _logger.warning(
            "crepe-llm cannot serve sparse-24-bitmask checkpoints with this vLLM (%s); it is made for "
            "vllm>=0.32,<0.34: pip install '.[serve]' in the checkout. Other models are not affected.",
            error,
        )
        return
    register_quantization_config(QUANTIZATION)(Sparse24Config)
    loading.install()
    configs.register()
    for architecture, location in models.architectures().items():
        ModelRegistry.register_model(architecture, location)
