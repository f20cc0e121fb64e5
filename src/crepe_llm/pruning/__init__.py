"""Pruning of decoder blocks, layer by layer: what a layer is, the steps that change it, and the pass that runs them."""
