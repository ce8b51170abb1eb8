"""Pretrain and finetune GPT models with code you can read.

from llm_lightning import generate_text, load_model

print(generate_text(load_model("outputs/pretraining/my_run"), "Every effort moves you"))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_lightning.cli.classify import Classification, classify_text, classify_texts
    from llm_lightning.cli.evaluate import Evaluation, evaluate_labelled, evaluate_text
    from llm_lightning.cli.generate import generate_text, generate_texts
    from llm_lightning.models.gpt import GPT, GPTConfig
    from llm_lightning.models.lora import use_adapter
    from llm_lightning.weights.load import LoadedModel, load_model

_HOMES = {
    "GPT": "llm_lightning.models.gpt",
    "Classification": "llm_lightning.cli.classify",
    "Evaluation": "llm_lightning.cli.evaluate",
    "GPTConfig": "llm_lightning.models.gpt",
    "LoadedModel": "llm_lightning.weights.checkpoint",
    "classify_text": "llm_lightning.cli.classify",
    "classify_texts": "llm_lightning.cli.classify",
    "evaluate_labelled": "llm_lightning.cli.evaluate",
    "evaluate_text": "llm_lightning.cli.evaluate",
    "generate_text": "llm_lightning.cli.generate",
    "generate_texts": "llm_lightning.cli.generate",
    "load_model": "llm_lightning.weights.checkpoint",
    "use_adapter": "llm_lightning.models.lora",
}

__all__ = [
    "GPT",
    "Classification",
    "Evaluation",
    "GPTConfig",
    "LoadedModel",
    "classify_text",
    "classify_texts",
    "evaluate_labelled",
    "evaluate_text",
    "generate_text",
    "generate_texts",
    "load_model",
    "use_adapter",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that importing the package itself takes no time."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
