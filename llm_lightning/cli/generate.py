"""Continue one or more prompts, all in one batch; with --chat, answer them as questions.

llm-lightning generate outputs/pretraining/my_run "The value of"
llm-lightning generate gpt2-small "Hello, I am" "Every effort moves you" --greedy --max-new-tokens 25
llm-lightning generate outputs/sft/my_run "What is the capital of Japan?" --chat
llm-lightning generate gpt2-small "Dear Sir" --adapter polite/checkpoints/adapter.ckpt --adapter rude_from_peft/

A terminal shows control characters in the text as \\x1b; a file or a pipe gets the text as the model wrote it.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from llm_lightning.cli.arguments import add_file_arguments, add_model_arguments, file_options, named_file, open_model
from llm_lightning.inference.defaults import ANSWER_TOKENS, MAX_NEW_TOKENS, TEMPERATURE, TOP_K
from llm_lightning.terminal import counted, say, say_lines, write_raw

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
    parser.add_argument(
        "--chat",
        action="store_true",
        help="each prompt is a question, in the template of the model's training, else its own; show the answer alone",
    )
    parser.add_argument("--system", metavar="TEXT", help="with --chat: the system message (default: the template's)")
    parser.add_argument("--prompts-file", metavar="FILE", help="more prompts, one per line; - reads the standard input")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"per prompt, at most up to the context (default: {MAX_NEW_TOKENS}, with --chat {ANSWER_TOKENS})",
    )
    parser.add_argument("--greedy", action="store_true", help="always the likeliest token")
    parser.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help=f"below 1 sharper, above 1 more random (default: {TEMPERATURE}, with --chat greedy)",
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
    add_file_arguments(parser)


def run(args: argparse.Namespace) -> None:
    prompts = args.prompts + (_read_prompts(args) if args.prompts_file else [])
    if not prompts:
        raise ValueError('no prompt: give one in quotes, such as "Every effort moves you", or --prompts-file FILE')
    if args.stream and len(prompts) > 1:
        raise ValueError(f"--stream shows one text as it grows, and there are {len(prompts)} prompts; give one")
    if args.system is not None and not args.chat:
        raise ValueError("--system is a message of a conversation; give --chat, too")
    adapters = {str(number): path for number, path in enumerate(args.adapter, start=1)}
    loaded = open_model(args, adapters)
    if not args.chat:
        _warn_of_template(loaded)
    make = _texts_of(args)
    for name, path in adapters.items() or [(None, None)]:
        if name is not None:
            from llm_lightning.models.lora import use_adapter

            use_adapter(loaded.model, name)
        if len(adapters) > 1:
            say_lines([f"=== {path}"])
        _write(loaded, prompts, args, make)


def _texts_of(args: argparse.Namespace) -> Callable[..., list[str]]:
    """What makes texts of a model and prompts, with the settings that were typed."""
    from llm_lightning.inference.text import answer_texts, generate_texts

    settings = {"seed": args.seed, "max_new_tokens": args.max_new_tokens, **_sampling(args)}
    given = {name: value for name, value in settings.items() if value is not None}
    return partial(answer_texts, system=args.system, **given) if args.chat else partial(generate_texts, **given)


def _write(loaded: LoadedModel, prompts: list[str], args: argparse.Namespace, make: Callable[..., list[str]]) -> None:
    on_terminal = sys.stdout.isatty()
    if args.stream or (args.stream is None and on_terminal and len(prompts) == 1):
        _stream(loaded, prompts[0], args, make)
        return
    texts = make(loaded, prompts)
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


def _stream(loaded: LoadedModel, prompt: str, args: argparse.Namespace, make: Callable[..., list[str]]) -> None:
    from llm_lightning.tokenizers.base import StreamDecoder

    decoder = StreamDecoder(loaded.tokenizer)
    if not args.chat:
        _show(loaded.tokenizer.decode(loaded.tokenizer.encode(prompt)))
    try:
        make(loaded, [prompt], on_token=lambda _row, token: _show(decoder.feed(token)))
    finally:
        _show(decoder.finish() + "\n")


def _warn_of_template(loaded: LoadedModel) -> None:
    from llm_lightning.data.templates.choose import template_in
    from llm_lightning.weights.chat_templates import OWN

    if template := template_in(loaded.header):
        which = "its own template" if template["name"] == OWN else f"a template ({template['name']})"
        log.warning("this model was trained on questions in %s, which generate sends with --chat alone", which)


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling settings that were typed; logs those that greedy ignores."""
    given = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    if args.greedy or args.temperature == 0:
        ignored = [f"--{name.replace('_', '-')} {value}" for name, value in given.items() if value]
        if ignored:
            log.warning("greedy takes the likeliest token: %s is ignored", ", ".join(ignored))
        return {"temperature": 0.0}
    if args.chat and any(given.values()):
        given["temperature"] = args.temperature or TEMPERATURE
    return {name: value for name, value in given.items() if value is not None}


def _read_prompts(args: argparse.Namespace) -> list[str]:
    from llm_lightning.data.lines import lines_of

    with named_file(args.prompts_file) as file:
        lines = [line.text for line in lines_of(file, file_options(args))]
    prompts = [line for line in lines if line]
    if len(prompts) < len(lines):
        log.warning("%s: %s left out", args.prompts_file, counted(len(lines) - len(prompts), "empty line"))
    return prompts
