"""Saving what another package's modifiers pruned."""

from typing import Any

from llmcompressor.core import State
from llmcompressor.modifiers import Modifier

from crepe_llm import processes
from crepe_llm.calibration.data import mend_generation_config
from crepe_llm.modifiers.experts import check_experts
from crepe_llm.modifiers.layers import save_sparse

__all__ = ["SparseCheckpointModifier"]


class SparseCheckpointModifier(Modifier):
    """
    Modifier that changes no weight and makes the model save its 2:4 layers in the `sparse-24-bitmask` format. Recipes
    with one of this package's pruning modifiers do so without it; it is for those that prune with llm-compressor's own.

    Sample yaml:

    ```yaml
    pruning_stage:
      pruning_modifiers:
        SparseGPTModifier:
          sparsity: 0.5
          mask_structure: "2:4"
          targets: ["Linear"]
          ignore: ["re:.*lm_head"]
        SparseCheckpointModifier: {}
    ```

    Lifecycle:

    - on_initialize
        - refuse what could not be saved in the end
    - on_finalize
        - wrap the model's save_pretrained
    """

    requires_calibration_data: bool = False

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        processes.require_group()
        mend_generation_config(state.model)
        check_experts(state.model, [])
        return True

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        save_sparse(state.model)
        return True
