"""Continue one or more prompts, all in one batch.

llm-lightning generate outputs/pretraining/my_run "The value of"
llm-lightning generate gpt2-small "Hello, I am" "Every effort moves you" --greedy --max-new-tokens 25
llm-lightning generate gpt2-small "Dear Sir" --adapter polite/checkpoints/adapter.ckpt --adapter rude_from_peft/

A terminal shows control characters in the text as \\x1b; a file or a pipe gets the text as the model wrote it.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_lightning.cli.arguments import add_model_arguments, open_model
from llm_lightning.inference.defaults import MAX_NEW_TOKENS, TEMPERATURE, TOP_K
from llm_lightning.terminal import say, say_lines, write_raw

if TYPE_CHECKING:
    from llm_lightning.weights.load import LoadedModel

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("prompts", metavar="PROMPT", nargs="*", help="text to continue")
    parser.add_argument(
        "--adapter",
        metavar="PATH",
        action="append",
        default=[],
        help="for CHECKPOINT: an adapter.ckpt, a LoRA run, a folder of PEFT's; several: each prompt once with each",
    )
    parser.add_argument("--prompts-file", type=Path, metavar="FILE", help="more prompts, one per line")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=MAX_NEW_TOKENS,
        metavar="N",
        help="per prompt, at most up to the model's context (default: %(default)s)",
    )
    parser.add_argument("--greedy", action="store_true", help="always the likeliest token")
    parser.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help=f"below 1 sharper, above 1 more random (default: {TEMPERATURE})",
    )
    parser.add_argument(
        "--top-k",
        type=int,
        metavar="K",
        help=f"sample from the K likeliest tokens (default: {TOP_K}, or all with --top-p)",
    )
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="sample from the fewest tokens whose probabilities sum to P"
    )
    parser.add_argument("--seed", type=int, help="the same seed gives the same text (default: another text each time)")
    parser.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="show the text as it grows (default: for a single prompt on a terminal)",
    )


def run(args: argparse.Namespace) -> None:
    prompts = args.prompts + (_read_prompts(args.prompts_file) if args.prompts_file else [])
    if not prompts:
        raise ValueError('no prompt: give one in quotes, such as "Every effort moves you", or --prompts-file FILE')
    if args.stream and len(prompts) > 1:
        raise ValueError(f"--stream shows one text as it grows, and there are {len(prompts)} prompts; give one")
    settings = {"max_new_tokens": args.max_new_tokens, "seed": args.seed, **_sampling(args)}
    adapters = {str(number): path for number, path in enumerate(args.adapter, start=1)}
    loaded = open_model(args, adapters)
    for name, path in adapters.items() or [(None, None)]:
        if name is not None:
            from llm_lightning.models.lora import use_adapter

            use_adapter(loaded.model, name)
        if len(adapters) > 1:
            say_lines([f"=== {path}"])
        _write(loaded, prompts, args.stream, settings)


def _write(loaded: LoadedModel, prompts: list[str], stream: bool | None, settings: dict[str, Any]) -> None:
    from llm_lightning.inference.text import generate_texts

    on_terminal = sys.stdout.isatty()
    if stream or (stream is None and on_terminal and len(prompts) == 1):
        _stream(loaded, prompts[0], settings)
        return
    texts = generate_texts(loaded, prompts, **settings)
    for number, text in enumerate(texts, start=1):
        if len(texts) > 1:
            say(f"--- {number}")
        _show(text + "\n")


def _show(text: str) -> None:
    """Print the model's text; a terminal shows its control characters and does not obey them."""
    if sys.stdout.isatty():
        say(text, end="", flush=True)
    else:
        write_raw(text, flush=True)


def _stream(loaded: LoadedModel, prompt: str, settings: dict[str, Any]) -> None:
    from llm_lightning.inference.text import generate_text
    from llm_lightning.tokenizers.base import StreamDecoder

    decoder = StreamDecoder(loaded.tokenizer)
    _show(loaded.tokenizer.decode(loaded.tokenizer.encode(prompt)))
    try:
        generate_text(loaded, prompt, on_token=lambda _row, token: _show(decoder.feed(token)), **settings)
    finally:
        _show(decoder.finish() + "\n")


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling settings that were typed; logs those that greedy ignores."""
    given = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    if args.greedy or args.temperature == 0:
        ignored = [f"--{name.replace('_', '-')} {value}" for name, value in given.items() if value]
        if ignored:
            log.warning("greedy takes the likeliest token: %s is ignored", ", ".join(ignored))
        return {"temperature": 0.0}
    return {name: value for name, value in given.items() if value is not None}


def _read_prompts(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start}; save it as UTF-8") from error
    return [line for line in lines if line]
