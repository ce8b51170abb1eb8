"""`llm-lightning`: each verb through the real entry point, on a tiny checkpoint."""

from __future__ import annotations

import argparse
import inspect
import io
import json
import math
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import llm_lightning
from llm_lightning.cli import generate as generate_verb
from llm_lightning.cli import respond as respond_verb
from llm_lightning.cli.main import VERBS, main
from llm_lightning.data.corpus.sources import open_source
from llm_lightning.data.corpus.token_files import build_token_files
from llm_lightning.inference.evaluate import evaluate_texts, windows
from llm_lightning.models.gpt import GPT, GPTConfig
from llm_lightning.terminal import visible
from llm_lightning.tokenizers.build import build_tokenizer
from llm_lightning.weights.checkpoint import HEADER, describe, save
from llm_lightning.weights.load import LoadedModel, load_model

CONFIG = GPTConfig(vocab_size=257, context_length=16, n_layer=2, n_head=2, n_embd=16)
DATA = {"name": None, "path": None, "text_field": "text", "split": "character", "val_fraction": 0.2, "add_eot": True}


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run on a text of its own, trained for no step at all."""
    text = tmp_path / "corpus.txt"
    text.write_text("to be, or not to be: that is the question. " * 20, encoding="utf-8")
    torch.manual_seed(0)
    model = GPT(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    header = describe(
        task="pretraining",
        model_config=CONFIG,
        tokenizer=build_tokenizer("byte"),
        step=7,
        metrics={"val/loss": 1.5},
        config={"data": DATA | {"path": str(text)}, "optimizer": {"lr": 1e-3}},
        lineage={"data": open_source(path=str(text)).digest(), "parent": None},
    )
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    save(tmp_path / "run" / "checkpoints" / "best.ckpt", {HEADER: header, "state_dict": weights})
    return tmp_path / "run"


@pytest.fixture
def loaded(run_folder: Path) -> LoadedModel:
    return load_model(run_folder)


def losses_one_by_one(model: GPT, ids: list[int]) -> list[float]:
    """Each token's loss given all before it, as far as the context reaches: stride 1, written as a loop."""
    result = []
    for end in range(1, len(ids)):
        context = torch.tensor([ids[max(0, end - CONFIG.context_length) : end]])
        with torch.no_grad():
            result.append(float(F.cross_entropy(model(context)[:, -1], torch.tensor([ids[end]]))))
    return result


# -- generate ----------------------------------------------------------------------------------------------------------


def test_generate_prints_the_prompt_and_its_continuation(run_folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["generate", str(run_folder), "to be", "--greedy", "--max-new-tokens", "5"]) == 0
    printed = capsys.readouterr().out
    expected = llm_lightning.generate_text(load_model(run_folder), "to be", max_new_tokens=5, temperature=0)
    assert printed == expected + "\n"
    assert printed.startswith("to be")


def test_functions_have_the_defaults_of_their_verbs(run_folder: Path, capsys: pytest.CaptureFixture) -> None:
    loaded = load_model(run_folder)
    for options, words in (({}, []), ({"top_p": 0.5}, ["--top-p", "0.5"]), ({"top_k": 3}, ["--top-k", "3"])):
        assert main(["generate", str(run_folder), "to be", "--seed", "5", *words]) == 0
        assert capsys.readouterr().out == llm_lightning.generate_text(loaded, "to be", seed=5, **options) + "\n"
    answering = inspect.signature(llm_lightning.respond).parameters
    parser = argparse.ArgumentParser()
    respond_verb.add_arguments(parser)
    typed = vars(parser.parse_args(["x", "-o", "y"]))
    shared = answering.keys() & typed.keys()
    assert shared == {"temperature", "top_k", "top_p", "seed", "max_new_tokens", "batch_size", "template"}
    assert {name: typed[name] for name in shared} == {name: answering[name].default for name in shared}


def test_generate_runs_several_prompts_from_both_places(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").write_text("or\n\nthat is\n", encoding="utf-8")
    command = ["generate", str(run_folder), "to be", "--prompts-file", str(tmp_path / "prompts.txt"), "--seed", "3"]
    assert main([*command, "--max-new-tokens", "4"]) == 0
    first = capsys.readouterr().out
    assert [line for line in first.splitlines() if line.startswith("---")] == ["--- 1", "--- 2", "--- 3"]
    command[command.index("--prompts-file") + 1] = "-"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO((tmp_path / "prompts.txt").read_bytes())))
    assert main([*command, "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out == first


def test_streamed_text_is_the_text(run_folder: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["generate", str(run_folder), "é", "--seed", "1", "--max-new-tokens", "12"]
    assert main([*command, "--no-stream"]) == 0
    whole = capsys.readouterr().out
    assert main([*command, "--stream"]) == 0
    assert capsys.readouterr().out == whole


def test_generation_stops_at_the_end_of_text(loaded: LoadedModel) -> None:
    eot_id = loaded.tokenizer.eot_id
    with torch.no_grad():
        loaded.model.final_norm.weight.zero_()  # the same logits everywhere, the end of text on top
        loaded.model.final_norm.bias.copy_(loaded.model.lm_head.weight[eot_id] * 100)
    assert llm_lightning.generate_text(loaded, "to be", max_new_tokens=5) == "to be"


def test_an_empty_prompt_starts_a_new_text(loaded: LoadedModel) -> None:
    (text,) = llm_lightning.generate_texts(loaded, [""], max_new_tokens=3)
    assert "<|endoftext|>" not in text


def test_control_characters_reach_no_terminal() -> None:
    assert visible("a\x1b[2Jb\n\tc\x07") == r"a\x1b[2Jb" + "\n\t" + r"c\x07"


def test_greedy_says_which_settings_it_ignores(
    run_folder: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["generate", str(run_folder), "to be", "--greedy", "--top-k", "5", "--max-new-tokens", "2"]) == 0
    assert "--top-k 5 is ignored" in caplog.text


# -- evaluate ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", range(2, 40))
def test_windows_score_every_target_once(length: int) -> None:
    tokens = np.arange(length)
    for context in (1, 4, 7):
        for stride in range(1, context + 1):
            scored = [i for ids, n_scored in windows(tokens, context, stride) for i in ids[n_scored + 1 :]]
            assert scored == list(range(1, length))
            assert all(2 <= len(ids) <= context + 1 for ids, _ in windows(tokens, context, stride))


def test_stride_one_sees_the_whole_context(loaded: LoadedModel) -> None:
    texts = ["to be, or not to be: that is the question", "x", "", "to be"]
    expected = [loss for text in texts for loss in losses_one_by_one(loaded.model, loaded.tokenizer.encode(text))]
    result = evaluate_texts(loaded, texts, stride=1)
    assert result.n_tokens == len(expected)
    assert result.loss == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert result.bits_per_byte == pytest.approx(result.loss / math.log(2))  # one token is one byte


def test_evaluate_prints_what_it_measured(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "a.txt"
    path.write_text("that is the question", encoding="utf-8")
    expected = asdict(llm_lightning.evaluate_text(load_model(run_folder), "that is the question", stride=4))
    assert main(["evaluate", str(run_folder), "--text", str(path), "--stride", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == expected
    assert main(["evaluate", str(run_folder), "--text", str(path), "--stride", "4"]) == 0
    assert f"{expected['loss']:.4f} nats per token" in capsys.readouterr().out


def test_evaluate_finds_the_split_of_the_training_data(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    files = build_token_files(
        open_source(path=str(tmp_path / "corpus.txt")), build_tokenizer("byte"), split="character", val_fraction=0.2
    )
    for split in ("train", "val"):
        assert main(["evaluate", str(run_folder), "--split", split, "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        expected = evaluate_texts(load_model(run_folder), [bytes(files[split].tokens.tolist()).decode()])
        assert result == asdict(expected)


# -- export, inspect ---------------------------------------------------------------------------------------------------


def test_exported_weights_are_the_same_model(
    run_folder: Path, tmp_path: Path, loaded: LoadedModel, capsys: pytest.CaptureFixture
) -> None:
    assert main(["export", str(run_folder), str(tmp_path / "exported")]) == 0
    report = json.loads((tmp_path / "exported" / "export_report.json").read_text())
    lines = capsys.readouterr().out.splitlines()
    assert lines[:-1] == report["notes"] != []
    assert f" parameters in float32, compared with transformers {report['transformers']}, logits differ" in lines[-1]
    ids = torch.arange(10)[None]
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path / "exported").model(ids), loaded.model(ids), rtol=0, atol=0)


def test_inspect_tells_what_is_there(run_folder: Path, loaded: LoadedModel, capsys: pytest.CaptureFixture) -> None:
    assert main(["inspect", str(run_folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"] == loaded.model.num_parameters()
    assert (facts["step"], facts["model"], facts["verified"]) == (7, asdict(CONFIG), True)
    assert main(["inspect", str(run_folder / "checkpoints" / "best.ckpt")]) == 0
    printed = capsys.readouterr().out
    assert "val/loss=1.5" in printed
    assert "setting     optimizer.lr=0.001\n" in printed
    assert f"{facts['digest']} (verified)" in printed


def test_inspect_counts_long_texts(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    state = torch.load(run_folder / "checkpoints" / "best.ckpt", weights_only=True)
    template = {"kind": "jinja", "name": "own", "text": "{{ x }}\n" * 200, "date": "2024-07-26"}
    save(tmp_path / "chat.ckpt", state | {HEADER: state[HEADER] | {"template": template}})
    assert main(["inspect", str(tmp_path / "chat.ckpt")]) == 0
    assert "template    kind=jinja  name=own  text=[1,600 characters]  date=2024-07-26\n" in capsys.readouterr().out


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("generate RUN", "no prompt: give one in quotes"),
        ("generate RUN a b --stream", "there are 2 prompts"),
        ("generate RUN a-prompt-longer-than-the-context", "prompt 1 of 32 tokens exceeds context_length=16"),
        ("generate RUN a --temperature -1", "temperature=-1.0"),
        ("generate RUN a --top-p 2", "top_p=2.0"),
        ("generate RUN a --max-new-tokens 0", "max_new_tokens=0"),
        ("generate RUN a --device cuda:9", "--device cuda:9 is not available here"),
        ("generate RUN a --prompts-file TMP/none.txt", "none.txt"),
        ("generate RUN --prompts-file TMP/latin1.txt", "latin1.txt, line 1: byte 1 (0xe9) is not valid UTF-8"),
        ("generate TMP/none.ckpt a", "no checkpoint at"),
        ("generate gpt2-smal a", "gpt2-small"),
        ("inspect TMP/corpus.txt", "not a complete llm-lightning checkpoint"),
        ("inspect TMP/broken.ckpt", "is corrupt"),
        ("evaluate RUN --text TMP/none.txt", "check the path\n"),
        ("evaluate RUN --text TMP/latin1.txt", "latin1.txt"),
        ("evaluate RUN --text TMP/one.txt", "has nothing to predict"),
        ("evaluate RUN --text TMP/corpus.txt --stride 17", "--stride 17 must be between 1 and context_length=16"),
        ("evaluate TMP/changed.ckpt --split val", "is not the data that the model was trained with"),
        ("evaluate TMP/bare.ckpt --split val", "use --text FILE"),
        ("export RUN TMP", "not empty"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, command: str, message: str
) -> None:
    (tmp_path / "latin1.txt").write_bytes(b"a\xe9b")
    (tmp_path / "one.txt").write_text("x", encoding="utf-8")
    checkpoint = (run_folder / "checkpoints" / "best.ckpt").read_bytes()
    middle = len(checkpoint) // 2
    flipped = bytes([checkpoint[middle] ^ 1])
    (tmp_path / "broken.ckpt").write_bytes(checkpoint[:middle] + flipped + checkpoint[middle + 1 :])
    state = torch.load(run_folder / "checkpoints" / "best.ckpt", weights_only=True)
    save(tmp_path / "changed.ckpt", state | {HEADER: state[HEADER] | {"lineage": {"data": "0" * 64}}})
    save(tmp_path / "bare.ckpt", state | {HEADER: state[HEADER] | {"config": {}}})
    words = [word.replace("RUN", str(run_folder)).replace("TMP", str(tmp_path)) for word in command.split()]
    assert main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.startswith(f"llm-lightning {words[0]}: ")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(("words", "message"), [(["genrate"], "'generate'"), ([], "VERB"), (["inspect"], "CHECKPOINT")])
def test_mistyped_commands_exit_with_code_2(capsys: pytest.CaptureFixture, words: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(words)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_interrupt_exits_with_130(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(generate_verb, "open_model", interrupted)
    assert main(["generate", str(run_folder), "a"]) == 130


# -- the package -------------------------------------------------------------------------------------------------------


def test_public_functions_are_described_and_typed() -> None:
    functions = [getattr(llm_lightning, name) for name in llm_lightning.__all__]
    for function in filter(inspect.isfunction, functions):
        signature = inspect.signature(function)
        assert function.__doc__, function
        assert all(one.annotation is not one.empty for one in signature.parameters.values()), function
        assert not any(one.kind is one.VAR_KEYWORD for one in signature.parameters.values()), function
        assert signature.return_annotation is not signature.empty, function
    promised = {"train", "load_model", "generate_text", "respond", "classify_text", "evaluate_text"}
    assert promised <= set(llm_lightning.__all__)


def test_a_clone_that_is_not_installed_runs_and_has_no_version(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("llm_lightning.cli.main.version", missing)
    main(["inspect", str(run_folder)])
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert "not installed" in capsys.readouterr().out


def test_the_package_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "llm_lightning", "generate"]
    outcome = subprocess.run(command, capture_output=True, text=True)
    assert outcome.returncode == 2
    assert outcome.stderr.startswith("usage: llm-lightning generate")


# -- what is imported when ---------------------------------------------------------------------------------------------


def modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import llm_lightning; dir(llm_lightning)",
        *(f"import llm_lightning.cli.main, llm_lightning.cli.{verb.replace('-', '_')}" for verb in VERBS),
    ],
)
def test_nothing_heavy_is_imported_early(statement: str) -> None:
    heavy = {"torch", "numpy", "lightning", "hydra", "omegaconf", "tiktoken", "datasets", "transformers", "matplotlib"}
    assert not heavy & modules_after(statement)


@pytest.mark.slow
def test_use_of_a_model_needs_no_trainer() -> None:
    assert not {"lightning", "hydra", "omegaconf", "transformers", "datasets", "matplotlib"} & modules_after(
        "from llm_lightning import GPT, GPTConfig, evaluate_text, generate_text, load_model"
    )


def test_public_names_exist() -> None:
    assert all(getattr(llm_lightning, name) is not None for name in llm_lightning.__all__)
    assert set(llm_lightning.__all__) <= set(dir(llm_lightning))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        llm_lightning.nothing  # noqa: B018
