"""Real models and text from package registries, and the windows of tokens that calibration and evaluation use."""
