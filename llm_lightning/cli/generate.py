"""Continue one or more prompts, all in one batch.

llm-lightning generate outputs/pretraining/my_run "The value of"
llm-lightning generate gpt2-small "Hello, I am" "Every effort moves you" --greedy --max-new-tokens 25
llm-lightning generate gpt2-small "Dear Sir" --adapter polite/checkpoints/adapter.ckpt --adapter rude_from_peft/

On a terminal, control characters in the text are shown, as \\x1b; in a file or a pipe the text is as it was written.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_lightning.cli.arguments import add_model_arguments, open_model
from llm_lightning.terminal import say, say_lines, write_raw

if TYPE_CHECKING:
    from llm_lightning.inference.generation import OnToken
    from llm_lightning.tokenizers import Tokenizer
    from llm_lightning.weights.load import LoadedModel

MAX_NEW_TOKENS = 100
TEMPERATURE = 0.8
TOP_K = 50

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
        "--temperature", type=float, metavar="T", help=f"below 1 sharper, above 1 wilder (default: {TEMPERATURE})"
    )
    parser.add_argument(
        "--top-k",
        type=int,
        metavar="K",
        help=f"draw from the K likeliest tokens (default: {TOP_K}, or all with --top-p)",
    )
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the fewest tokens that hold probability P together"
    )
    parser.add_argument("--seed", type=int, help="the same seed draws the same text (default: another text each time)")
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
    """What a model writes, untouched for a program that reads it; on a terminal its controls are shown, not obeyed."""
    if sys.stdout.isatty():
        say(text, end="", flush=True)
    else:
        write_raw(text, flush=True)


def generate_text(loaded: LoadedModel, prompt: str, **settings: Any) -> str:
    """Continue one prompt; return it with its continuation. The settings are those of `generation.generate`."""
    return generate_texts(loaded, [prompt], **settings)[0]


def generate_texts(
    loaded: LoadedModel, prompts: Sequence[str], *, max_new_tokens: int = MAX_NEW_TOKENS, **settings: Any
) -> list[str]:
    """Continue several prompts in one batch, each up to the end of text; return them with their continuations.

    Args:
        loaded: what `load_model` returns.
        settings: those of `generation.generate`: temperature (default 0, greedy), top_k, top_p, seed, on_token.

    Raises:
        ValueError: if a prompt does not fit, or a setting is out of range.
    """
    from llm_lightning.inference.generation import generate

    prompt_ids = [_encode(loaded.tokenizer, prompt) for prompt in prompts]
    eot_id = loaded.tokenizer.eot_id
    stop_ids = () if eot_id is None else (eot_id,)
    never = loaded.tokenizer.ids_without_token(loaded.gpt.config.vocab_size)
    new_ids = generate(
        loaded.gpt, prompt_ids, max_new_tokens=max_new_tokens, stop_ids=stop_ids, never=never, **settings
    )
    pairs = zip(prompts, prompt_ids, new_ids, strict=True)
    # Decoded together, because words are joined by a space; an empty prompt does not show its end of text.
    return [loaded.tokenizer.decode([*ids, *new] if prompt else new) for prompt, ids, new in pairs]


def _encode(tokenizer: Tokenizer, prompt: str) -> list[int]:
    ids = tokenizer.encode(prompt)
    if not ids and not prompt and tokenizer.eot_id is not None:
        return [tokenizer.eot_id]  # what stands before a text in training
    return ids


def _stream(loaded: LoadedModel, prompt: str, settings: dict[str, Any]) -> None:
    from llm_lightning.tokenizers import StreamDecoder

    decoder = StreamDecoder(loaded.tokenizer)
    on_token: OnToken = lambda _row, token: _show(decoder.feed(token))  # noqa: E731
    _show(loaded.tokenizer.decode(loaded.tokenizer.encode(prompt)))
    try:
        generate_text(loaded, prompt, on_token=on_token, **settings)
    finally:
        _show(decoder.finish() + "\n")


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of `generation.generate`; says which are ignored."""
    given = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    if args.greedy or args.temperature == 0:
        ignored = [f"--{name.replace('_', '-')} {value}" for name, value in given.items() if value]
        if ignored:
            log.warning("greedy takes the likeliest token: %s is ignored", ", ".join(ignored))
        return {}
    if args.temperature is None:
        given["temperature"] = TEMPERATURE
    if args.top_k is None and args.top_p is None:
        given["top_k"] = TOP_K
    return given


def _read_prompts(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start}; save it as UTF-8") from error
    return [line for line in lines if line]
