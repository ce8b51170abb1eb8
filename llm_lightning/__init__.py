"""Pretrain and finetune GPT models with code you can read.

from llm_lightning import generate_text, load_model

print(generate_text(load_model("outputs/pretraining/my_run"), "Every effort moves you"))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_lightning.experiments.run_list import runs
    from llm_lightning.experiments.start import TrainedRun, train
    from llm_lightning.inference.classify import Classification, classify_text, classify_texts
    from llm_lightning.inference.evaluate import Evaluation, evaluate_labelled, evaluate_text, evaluate_texts
    from llm_lightning.inference.respond import respond
    from llm_lightning.inference.text import generate_text, generate_texts
    from llm_lightning.models.gpt import GPT, GPTConfig
    from llm_lightning.models.lora import use_adapter
    from llm_lightning.weights.load import LoadedModel, load_model

_HOMES = {
    "experiments.run_list": ("runs",),
    "experiments.start": ("TrainedRun", "train"),
    "inference.classify": ("Classification", "classify_text", "classify_texts"),
    "inference.evaluate": ("Evaluation", "evaluate_labelled", "evaluate_text", "evaluate_texts"),
    "inference.respond": ("respond",),
    "inference.text": ("generate_text", "generate_texts"),
    "models.gpt": ("GPT", "GPTConfig"),
    "models.lora": ("use_adapter",),
    "weights.load": ("LoadedModel", "load_model"),
}

__all__ = [
    "GPT",
    "Classification",
    "Evaluation",
    "GPTConfig",
    "LoadedModel",
    "TrainedRun",
    "classify_text",
    "classify_texts",
    "evaluate_labelled",
    "evaluate_text",
    "evaluate_texts",
    "generate_text",
    "generate_texts",
    "load_model",
    "respond",
    "runs",
    "train",
    "use_adapter",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that importing the package takes no time."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"llm_lightning.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
