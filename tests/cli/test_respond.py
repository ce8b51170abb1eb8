"""`llm-lightning respond` and `inspect-data`: through the real entry point, on tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_run import SETTINGS, fit_here

from llm_lightning.cli.main import main as cli
from llm_lightning.cli.respond import progress_path
from llm_lightning.data.templates.choose import choose_template
from llm_lightning.data.templates.conversation import Conversation, Turn
from llm_lightning.inference.generation import generate
from llm_lightning.inference.respond import answer
from llm_lightning.weights.load import load_model

TEMPLATE = "{instruction} {input} {response}"


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned") / "run"
    settings = ["task=sft", "model.context_length=128", f"data.template='{TEMPLATE}'", f"hydra.run.dir={folder}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_LIGHTNING_CACHE", str(folder.parent / "cache"))
        outcome = fit_here([*SETTINGS, *settings, "callbacks.responses.max_new_tokens=4"])
    assert outcome.code == 0, outcome.err
    assert "Next: llm-lightning judge" in outcome.out
    return folder


def questions(path: Path, n: int = 9) -> list[dict[str, str]]:
    rows = [{"instruction": "Say " * (1 + i % 4), "input": "", "output": f"answer {i}", "id": str(i)} for i in range(n)]
    path.write_text(json.dumps(rows))
    return rows


@pytest.mark.slow
def test_answers_are_those_of_each_question_alone(tuned: Path) -> None:
    loaded, template = load_model(tuned, dtype=torch.float64), choose_template(TEMPLATE)
    asked = [Conversation((Turn("Say " * (1 + i % 4), f"{i}", ""),)) for i in range(7)]
    found = answer(loaded.gpt, loaded.tokenizer, template, asked, max_new_tokens=12, batch_size=3)
    for one, response in zip(asked, found, strict=True):
        prompt = loaded.tokenizer.encode(f"{one.turns[0].instruction} {one.turns[0].input} ")
        assert template.prompt_ids(loaded.tokenizer, one) == prompt
        [ids] = generate(loaded.gpt, [prompt], max_new_tokens=12, stop_ids=[256])
        assert response == loaded.tokenizer.decode(ids).strip()


def test_writes_the_books_file_shape(tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = questions(tmp_path / "q.json")
    output = tmp_path / "responses.json"
    assert cli(["respond", str(tuned), str(tmp_path / "q.json"), "-o", str(output), "--max-new-tokens", "4"]) == 0
    found = json.loads(output.read_text())
    assert [{key: row[key] for key in rows[0]} for row in found] == rows
    assert all(set(row) == {"instruction", "input", "output", "id", "model_response"} for row in found)
    assert not progress_path(output).exists()
    assert f"Next: llm-lightning judge {output} --lexical" in capsys.readouterr().out


def test_several_models_stand_side_by_side(tuned: Path, tmp_path: Path) -> None:
    questions(tmp_path / "q.json")
    output = tmp_path / "both.json"
    last = tuned / "checkpoints" / "last.ckpt"
    command = ["respond", str(tuned), str(last), str(tmp_path / "q.json"), "-o", str(output), "--max-new-tokens", "3"]
    assert cli(command) == 0
    columns = {key for key in json.loads(output.read_text())[0] if key.startswith("model_response")}
    assert columns == {"model_response_1_run", "model_response_2_run"}


def test_goes_on_where_it_was(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from llm_lightning.inference import respond as responses

    questions(tmp_path / "q.json")
    command = ["respond", str(tuned), str(tmp_path / "q.json"), "--max-new-tokens", "4", "--batch-size", "2"]
    assert cli([*command, "-o", str(tmp_path / "whole.json")]) == 0
    calls: list[int] = []

    def interrupted(*args: object, **options: object) -> list[list[int]]:
        calls.append(len(args[1]))  # type: ignore[arg-type]
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*args, **options)  # type: ignore[arg-type]

    output = tmp_path / "stopped.json"
    monkeypatch.setattr(responses, "generate", interrupted)
    assert cli([*command, "-o", str(output)]) == 130
    assert not output.exists()
    with progress_path(output).open("a") as file:
        file.write('["half a li')  # as a killed process leaves it
    calls[:] = [0] * 10
    assert cli([*command, "-o", str(output)]) == 0
    assert sum(calls) == 9 - 4, "four were answered before"
    assert "4 of 9 answers are in" in caplog.text
    assert output.read_bytes() == (tmp_path / "whole.json").read_bytes()


@pytest.fixture(scope="module")
def preferring(tuned: Path) -> Path:
    """Trained from `tuned` on pairs."""
    folder = tuned.parent / "dpo"
    settings = ["task=dpo", f"init_from={tuned}", "model.context_length=128", f"data.template='{TEMPLATE}'"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_LIGHTNING_CACHE", str(folder.parent / "cache"))
        outcome = fit_here([*SETTINGS, *settings, f"hydra.run.dir={folder}"])
    assert outcome.code == 0, outcome.err
    return folder


@pytest.mark.slow
def test_a_model_of_preference_tuning_answers_its_own_data_and_other_records(preferring: Path, tmp_path: Path) -> None:
    command = ["respond", str(preferring), "-o", str(tmp_path / "x.json"), "--max-new-tokens", "2", "--limit", "3"]
    assert cli([*command, "--split", "test"]) == 0
    found = json.loads((tmp_path / "x.json").read_text())
    assert all(row["output"] == row["chosen"] for row in found), "the chosen answer is the one that is meant"
    rows = questions(tmp_path / "q.json")
    assert cli([*command, str(tmp_path / "q.json")]) == 0
    assert [row["id"] for row in json.loads((tmp_path / "x.json").read_text())] == [row["id"] for row in rows[:3]]


def test_inspect_data_shows_both_answers_of_a_pair(preferring: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli(["inspect-data", str(preferring), "-n", "1"]) == 0
    out = capsys.readouterr().out
    assert [line.split(":")[0] for line in out.splitlines() if line.startswith("---")] == [
        "--- record 0, chosen",
        "--- record 0, rejected",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN"], "give one or more models and then a file of records, or --split test"),
        (["RUN", "q.json", "--split", "test"], "both q.json and --split test are given"),
        (["RUN", "nowhere.json"], "nowhere.json does not exist"),
        (["RUN", "q.json", "--template", "alpaka"], "did you mean alpaca?"),
        (["RUN", "q.json", "--limit", "0"], "must be at least 1"),
        (["RUN", "long.json"], "long.json:1: the prompt of 202 tokens leaves no room for an answer"),
        (["nothing", "q.json"], "nothing"),
    ],
)
def test_bad_input(
    tuned: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    questions(Path("q.json"))
    Path("long.json").write_text(json.dumps([{"instruction": "x" * 200, "output": "a"}]))
    typed = [str(tuned) if word == "RUN" else word for word in arguments]
    assert cli(["respond", *typed, "-o", "out.json"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("out.json").exists()


def test_inspect_data_of_a_file_and_of_a_run(tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    questions(tmp_path / "q.json", 3)
    assert cli(["inspect-data", str(tmp_path / "q.json"), "-n", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("### Response:\n>>answer ") == 2
    assert out.count("<|endoftext|><<") == 2
    assert cli(["inspect-data", str(tuned), "--split", "val", "--html", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_text().count('<span class="target">') == 1 + 4


def test_inspect_data_shows_pairs_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = [{"instruction": f"Say {i}.", "output": "x", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(3)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for source in (str(tmp_path / "pairs.jsonl"), "short_preferences"):
        assert cli(["inspect-data", source, "-n", "2"]) == 0
        out = capsys.readouterr().out
        titles = [line.split(":")[0] for line in out.splitlines() if line.startswith("---")]
        assert titles == [f"--- record {n}, {side}" for n in range(2) for side in ("chosen", "rejected")]
        assert out.count("<|endoftext|><<") == 4
        if source.endswith("jsonl"):
            assert [out.count(f"### Response:\n>>{text}<|endoftext|><<") for text in ("yes 0", "no 0", "no 2")] == [
                1,
                1,
                0,
            ]
    assert cli(["inspect-data", "short_preferences", "-n", "1", "--loss-on", "header"]) == 0
    assert capsys.readouterr().out.count(">>### Response:\n") == 2
    assert cli(["inspect-data", "short_preferences", "--loss-on", "all"]) == 2
    assert "only the answers are scored; use response or header" in capsys.readouterr().err
