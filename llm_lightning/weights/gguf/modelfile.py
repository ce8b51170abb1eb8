"""Ollama's `Modelfile` beside a GGUF file: template, ends of an answer, context. `ollama create NAME -f Modelfile`.

Ollama recognises some chat templates by their text in the GGUF file. Templates that have a name here are written in its
own language, Go's, so that it has nothing to guess.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MODELFILE = "Modelfile"
_MOST_CONTEXT = 8192
"""Ollama reserves the memory of the whole context, gigabytes for 131,072 tokens; `num_ctx` can be raised there."""

_CHATML = (
    "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}"
    "{{ if .Prompt }}<|im_start|>user\n{{ .Prompt }}<|im_end|>\n{{ end }}"
    "<|im_start|>assistant\n{{ .Response }}"
)
TEMPLATES = {
    "smollm2": f"{_CHATML}<|im_end|>\n",
    "chatml": f"{_CHATML}END<|im_end|>\n",
    "llama3": (
        "{{ if .System }}<|start_header_id|>system<|end_header_id|>\n\n{{ .System }}<|eot_id|>{{ end }}"
        "{{ if .Prompt }}<|start_header_id|>user<|end_header_id|>\n\n{{ .Prompt }}<|eot_id|>{{ end }}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{{ .Response }}<|eot_id|>"
    ),
    "alpaca": (
        "{{ if .System }}{{ .System }}\n\n{{ end }}### Instruction:\n{{ .Prompt }}\n\n### Response:\n{{ .Response }}END"
        "\n\n"
    ),
    "phi3": (
        "{{ if .System }}<|system|>\n{{ .System }}\n{{ end }}<|user|>\n{{ .Prompt }}\n<|assistant|>:\n"
        "{{ .Response }}END\n"
    ),
}
"""END is the end of an answer, where the template does not write it."""
_SYSTEMS = {"smollm2": "You are a helpful AI assistant named SmolLM, trained by Hugging Face"}
"""What a template writes without a system message."""


def modelfile(file: str, template: Mapping[str, Any] | None, ends: Sequence[str], context_length: int) -> str:
    """Return the text of a Modelfile.

    Args:
        file: the name of the GGUF file beside it.
        template: the description of the model's template, if it has one.
        ends: the spelling of each token at which generation stops.
    """
    name = None if template is None else template["name"]
    lines = [f"FROM ./{file}"]
    if template is not None and name in TEMPLATES:
        written = TEMPLATES[name].replace("END", next(iter(ends), ""))
        lines.append(f'TEMPLATE """{written}"""')
        if system := template.get("system") or _SYSTEMS.get(name):
            lines.append(f'SYSTEM """{system}"""')
    elif template is not None:
        lines.append(f"# TEMPLATE: Ollama reads the chat template in {file}.")
    lines += [f'PARAMETER stop "{end}"' for end in ends]
    lines.append(f"PARAMETER num_ctx {min(context_length, _MOST_CONTEXT)}")
    return "\n".join(lines) + "\n"
