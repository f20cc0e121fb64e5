"""The files that tell of a model's weights and lie beside them: its card, its report and the curve of its recovery."""

__all__ = ["ABOUT_WEIGHTS", "BLOCKS", "CARD", "ERRORS", "LOSSES", "PAGE", "RECOVERY", "RECOVERY_PLOT", "ZEROS"]

CARD = "README.md"
# The losses of a recovery.
RECOVERY, RECOVERY_PLOT = "recovery.json", "loss.png"
# A report and its plots.
PAGE = "report.html"
ZEROS, BLOCKS, ERRORS, LOSSES = "sparsity.png", "blocks.png", "errors.png", "losses.png"

# None of it is true of other weights.
ABOUT_WEIGHTS = (CARD, RECOVERY, RECOVERY_PLOT, PAGE, ZEROS, BLOCKS, ERRORS, LOSSES)
