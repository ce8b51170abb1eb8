"""A chat template travels: from training into the checkpoint, the next stage, `respond` and `generate --chat`."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
from tiny_run import SETTINGS, fit_here

from llm_lightning.cli.main import main as cli
from llm_lightning.data.of_checkpoint import conversations_of
from llm_lightning.data.templates import renderer
from llm_lightning.data.templates.choose import choose_template, from_description, template_in
from llm_lightning.data.templates.conversation import Conversation, Turn
from llm_lightning.experiments.run import keep_template
from llm_lightning.inference.generation import generate
from llm_lightning.inference.template import template_of
from llm_lightning.inference.text import answer_texts
from llm_lightning.weights import checkpoint as checkpoints
from llm_lightning.weights.checkpoint import read_header
from llm_lightning.weights.load import load_model

DATED = (
    "{{ strftime_now('%Y') }}{% for m in messages %}({{ m.role[0] }}){{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}(a){% endif %}"
)
SMALL = ["model.context_length=64", "callbacks.samples.prompts=null", "data.val_fraction=0.2", "data.test_fraction=0.2"]
TUNING = [*SETTINGS, *SMALL, "task=sft", "data.template_date=1999-12-31", "callbacks.responses.max_new_tokens=4"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "short.jinja"
    path.write_text(DATED)
    rows = [{"instruction": f"Say {n}", "output": f"{n}", "chosen": f"{n}", "rejected": f"{n}!"} for n in range(20)]
    path.with_name("rows.json").write_text(json.dumps(rows))
    return path


def own_data(file: Path) -> list[str]:
    return [f"data.path={file.with_name('rows.json')}"]


@pytest.fixture(scope="module")
def tuned(file: Path) -> Path:
    folder = file.parent / "tuned"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_LIGHTNING_CACHE", str(folder.parent / "cache"))
        outcome = fit_here([*TUNING, *own_data(file), f"data.template={file}", f"hydra.run.dir={folder}"])
    assert outcome.code == 0, outcome.err
    return folder


@pytest.mark.slow
def test_it_is_in_the_header_and_every_prompt(tuned: Path) -> None:
    loaded = load_model(tuned)
    described = loaded.header["template"]
    assert described == {
        "kind": "jinja", "name": "short.jinja", "text": DATED, "date": "1999-12-31", "tokens": {}, "controls": [],
    }  # fmt: skip
    asked = Conversation((Turn("Hi", "", ""),), system="S")
    ids = template_of(loaded, None).prompt_ids(loaded.tokenizer, asked)
    assert ids == [*b"1999(s)S", 256, *b"(u)Hi", 256, *b"(a)"]
    data = conversations_of(loaded, instead="")
    assert data.template == from_description(described)
    assert (tuned / "samples.md").read_text().count("    1999(u)") == 6, "samples of training begin with it"
    [answer] = answer_texts(loaded, ["Hi"], system="S", max_new_tokens=9)
    [new] = generate(loaded.gpt, [ids], max_new_tokens=9, stop_ids=[256])
    assert answer == loaded.tokenizer.decode(new).strip()


@pytest.mark.slow
def test_the_next_stage_takes_it_and_goes_on_without_the_file(tuned: Path, file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "preferring"
    settings = [*SETTINGS, *SMALL, *own_data(file), "task=dpo", f"init_from={tuned}", f"hydra.run.dir={folder}"]
    assert fit_here(settings).code == 0
    assert read_header(folder / "checkpoints" / "last.ckpt")["template"] == load_model(tuned).header["template"]
    longer = [*TUNING, *own_data(file), f"data.template={file}", "trainer.max_steps=6"]
    copy, hidden = tmp_path / "again", file.with_suffix(".hidden")
    shutil.copytree(tuned, copy)
    file.rename(hidden)
    try:
        outcome = fit_here([*longer, f"hydra.run.dir={copy}"])
    finally:
        hidden.rename(file)
    assert outcome.code == 0, outcome.err
    assert read_header(copy / "checkpoints" / "last.ckpt")["step"] == 6


@pytest.mark.slow
def test_an_adapter_brings_the_template_of_its_training(tuned: Path, file: Path, tmp_path: Path) -> None:
    words = [f"init_from={tuned}", "lora=default", "data.template='Q{instruction}A{response}'"]
    outcome = fit_here([*TUNING, *own_data(file), *words, f"hydra.run.dir={tmp_path / 'run'}"])
    assert outcome.code == 0, outcome.err
    loaded = load_model(tuned, adapters={"x": tmp_path / "run" / "checkpoints" / "adapter.ckpt"})
    assert template_of(loaded, None).describe()["text"] == "Q{instruction}A{response}"
    assert template_of(load_model(tuned), None).describe()["text"] == DATED


def test_generate_answers_with_it_or_says_that_it_does_not(
    tuned: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    words = ["generate", str(tuned), "Hi", "--max-new-tokens", "5", "--no-stream"]
    assert cli([*words, "--chat", "--system", "S"]) == 0
    expected = answer_texts(load_model(tuned), ["Hi"], system="S", max_new_tokens=5)[0]
    out, err = capsys.readouterr()
    assert out == expected + "\n"
    assert "template" not in err + caplog.text
    assert cli([*words, "--greedy"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Hi")
    assert "in a template (short.jinja), which generate sends with --chat alone" in err + caplog.text
    assert cli([*words, "--system", "S"]) == 2
    assert "--system is a message of a conversation; give --chat, too" in capsys.readouterr().err


def test_inspect_data_shows_records_as_the_model_would_read_them(
    tuned: Path, file: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["inspect-data", str(file.with_name("rows.json")), "-n", "1", "--model", str(tuned)]
    assert cli(words) == 0
    assert "\n1999(u)Say 0<|endoftext|>(a)>>0<|endoftext|><<" in capsys.readouterr().out
    assert cli([*words, "--template", "chatml"]) == 0
    assert "<|im_start|>assistant\n>>0<|endoftext|><<" in capsys.readouterr().out
    assert cli([*words, "--tokenizer", "byte"]) == 2
    assert "brings its own; leave one of them out" in capsys.readouterr().err


def test_respond_uses_it_and_names_the_record_that_it_refuses(
    tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    questions, output = tmp_path / "q.json", tmp_path / "a.json"
    questions.write_text(json.dumps([{"instruction": "Hi", "output": ""}]))
    words = ["respond", str(tuned), str(questions), "-o", str(output), "--max-new-tokens", "5"]
    assert cli(words) == 0
    expected = answer_texts(load_model(tuned), ["Hi"], max_new_tokens=5)
    assert [row["model_response"] for row in json.loads(output.read_text())] == expected
    (tmp_path / "strict.jinja").write_text("{{ raise_exception('I know no ' + messages[0].role) }}")
    capsys.readouterr()
    assert cli([*words, "--template", str(tmp_path / "strict.jinja")]) == 2
    assert "template strict.jinja refuses: I know no user" in capsys.readouterr().err
    assert cli([*words, "--template", "llama3"]) == 2
    assert "template llama3 writes <|begin_of_text|>, <|start_header_id|>" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{% for m in messages %}\n{% if %}", r"template bad.jinja line 2: Expected an expression, got 'end of"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", r"computes for more than"),
        ("{% if messages | length > 1 %}{{ raise_exception('One.') }}{% endif %}{{ messages[0].content }}",
         r"template bad.jinja refuses: One\."),
    ],
)  # fmt: skip
def test_a_run_is_refused_by_one_line(
    file: Path, tmp_path: Path, text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(renderer, "SECONDS", 0.2)
    (tmp_path / "bad.jinja").write_text(text)
    bad = f"data.template={tmp_path / 'bad.jinja'}"
    outcome = fit_here([*TUNING, *own_data(file), bad, f"hydra.run.dir={tmp_path / 'run'}"])
    assert outcome.code == 2
    [line] = [line for line in outcome.err.splitlines() if line.startswith("error:")]
    assert re.search(message, line)


# --- checkpoints of earlier versions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", ["chatml", "Q{instruction}A{response}"])
def test_a_header_that_only_names_its_template(wanted: str) -> None:
    described = template_in({"config": {"data": {"template": wanted}}})
    assert described is not None
    assert from_description(described) == choose_template(wanted)
    assert described["kind"] == "slots"
    assert template_in({"config": {"data": {"template": None}}}) is None
    assert template_in({"config": {"data": {}}}) is None
    assert template_in({}) is None


def test_a_run_of_an_earlier_version_keeps_its_default() -> None:
    settings = {"data": {"template": None}}
    keep_template(settings, {"config": {"data": {"template": "alpaca"}}})
    assert settings == {"data": {"template": "alpaca"}}
    for other in ({"data": {"template": "phi3"}}, {"data": {"path": "x"}}):
        before = json.loads(json.dumps(other))
        keep_template(other, {"config": {"data": {"template": "alpaca"}}})
        assert other == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "python"}, r"llm_lightning.template.kind='python' must be slots or jinja"),
        ({"text": None}, r"llm_lightning.template.text=None must be a text"),
        ({"tokens": {"bos_token": 1}}, r"llm_lightning.template.tokens=.* must be a dict, of which each"),
    ],
)  # fmt: skip
def test_a_lying_header(tuned: Path, tmp_path: Path, change: dict, message: str) -> None:
    state = checkpoints.load(tuned / "checkpoints" / "last.ckpt")
    state[checkpoints.HEADER]["template"] |= change
    checkpoints.save(tmp_path / "lying.ckpt", state)
    with pytest.raises(checkpoints.CheckpointError, match=message):
        read_header(tmp_path / "lying.ckpt")
