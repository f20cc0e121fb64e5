"""Zero-shot accuracy by lm-evaluation-harness, on questions that are at hand without a model hub."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["zero_shot"]


def zero_shot(
    model: Any,
    questions: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    dtype: str = "auto",
    batch_size: int = 8,
) -> dict[str, dict[str, float]]:
    """Score a model on multiple-choice questions, the choice of the highest likelihood being its answer.

    Args:
        model: a folder, or what ``lm_eval``'s ``hf`` model takes as `pretrained`.
        questions: by task, as :func:`crepe_llm.samples.questions` gives them: dictionaries of `prompt`,
            `choices` and `label`.
        dtype: of the weights, as transformers names it.
        batch_size: sequences at once.

    Returns:
        By task: `acc` and `acc_norm` (by likelihood per character), fractions from 0 to 1, each with its standard error
        under `acc_stderr` and `acc_norm_stderr`, and the number of questions under `questions`.

    Raises:
        ImportError: lm-eval is missing.
    """
    import torch

    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError("zero-shot accuracy needs lm-evaluation-harness: pip install lm-eval") from error
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for task, rows in questions.items():
            data = folder / f"{task}.jsonl"
            data.write_text("".join(json.dumps(dict(row)) + "\n" for row in rows))
            # JSON is YAML, too.
            (folder / f"{task}.yaml").write_text(json.dumps(_task(task, data)))
        scored = simple_evaluate(
            model="hf",
            model_args={"pretrained": str(model), "dtype": dtype},
            tasks=[_prefixed(task) for task in questions],
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            device="cuda" if torch.cuda.is_available() else "cpu",
            batch_size=batch_size,
            log_samples=False,
        )
    return {
        task: {
            **{
                f"{metric}{suffix}": float(scored["results"][_prefixed(task)][f"{metric}{suffix},none"])
                for metric in ("acc", "acc_norm")
                for suffix in ("", "_stderr")
            },
            "questions": len(rows),
        }
        for task, rows in questions.items()
    }


def _task(task: str, data: Path) -> dict[str, Any]:
    return {
        "task": _prefixed(task),
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "label",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }


def _prefixed(task: str) -> str:
    """A name that no task of the harness has."""
    return f"crepe_{task}"
