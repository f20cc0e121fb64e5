"""Pure tensor functions: scores, masks, statistics and what is computed from them. They import nothing of ours outside this room."""
