"""The package `gguf`, which knows the types of tensors: imported on first use, because few runs need it."""

from __future__ import annotations

from types import ModuleType


def gguf_package() -> ModuleType:
    """Import the package `gguf`.

    Raises:
        ValueError: if it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise ValueError("GGUF files need the package gguf: pip install 'llm-lightning[gguf]'") from None
    return gguf
