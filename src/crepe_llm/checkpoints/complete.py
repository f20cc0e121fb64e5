"""Loading a model only if its files hold all of it."""

from typing import Any

from transformers import AutoModelForCausalLM

__all__ = ["load_complete"]


def load_complete(name: str, **options: Any) -> Any:
    """A causal language model, as transformers loads it with these options.

    Raises:
        ValueError: its files lack a tensor. transformers gives it random values, and only logs that.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **options)
    model, found = loaded
    missing = sorted(found["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
        raise ValueError(
            f"the weights of {name} lack {missing[0]}{more}, which would get random values: fetch or export "
            "the model again"
        )
    return model
