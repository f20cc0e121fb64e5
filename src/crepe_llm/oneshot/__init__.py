"""llm-compressor's `oneshot` with recipes by name, and with its arguments checked before the work."""
