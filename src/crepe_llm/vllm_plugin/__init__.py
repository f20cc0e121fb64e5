"""vLLM plugin that serves 2:4 checkpoints with sparse kernels."""


def register() -> None:
    """The `vllm.general_plugins` entry point. Idempotent; runs in every vLLM process."""
