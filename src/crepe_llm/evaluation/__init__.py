"""Perplexity, zero-shot accuracy, throughput, and the real models and text they are measured on."""
