"""The 2:4 checkpoint format `sparse-24-bitmask`: packing, saving and loading."""
