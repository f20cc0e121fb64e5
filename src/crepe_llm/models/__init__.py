"""What is known of model families, once: blocks, shared channels, feed-forward networks, per-block widths."""
