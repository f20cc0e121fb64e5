"""Training what is kept, under its mask."""
