"""Pure tensor functions: scores, masks, statistics and what is computed from them; they import torch and numpy only."""
