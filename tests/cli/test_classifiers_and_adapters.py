"""What `task=classification`, with and without `lora`, leaves, and every tool on it; adapters that share one base."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import CONTEXT_LENGTH, SETTINGS, WITH_PLOTS, fit_here, write_checkpoint, write_corpus

import llm_lightning
from llm_lightning.cli.main import main as cli
from llm_lightning.models.gpt import GPT
from llm_lightning.models.lora import LoRAConfig, adapter_state, load_adapter_state, use_adapter
from llm_lightning.weights.checkpoint import HEADER, CheckpointError, load, save
from llm_lightning.weights.load import load_model, resolve
from llm_lightning.weights.peft_format import export_peft

CLASSIFY = [*(word for word in SETTINGS if "samples" not in word), "task=classification"]
TEXTS = ["Win a car!", "Dinner at eight?", "Your account is blocked, call now", "ok"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base") / "gpt.ckpt", n_layer=2)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """A run whose last block was trained."""
    settings = [word for word in WITH_PLOTS if "samples" not in word]
    return run([*settings, "task=classification", f"init_from={base}"], tmp_path_factory.mktemp("plain") / "run")


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """A run with adapters."""
    return trained(tmp_path_factory.mktemp("lora") / "run", base, "lora=default", "lora.rank=3", "lora.qkv=split")


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """A run of pretraining with adapters."""
    folder = tmp_path_factory.mktemp("speaker")
    corpus = write_corpus(folder / "corpus.txt")
    return run([*SETTINGS, f"data.path={corpus}", f"init_from={base}", "lora=default"], folder / "run")


def trained(folder: Path, base: Path, *more: str) -> Path:
    return run([*CLASSIFY, f"init_from={base}", *more], folder)


def run(arguments: list[str], folder: Path) -> Path:
    outcome = fit_here([*arguments, "optimizer.lr=1e-2", f"hydra.run.dir={folder}"])
    assert outcome.code == 0, outcome.err
    return folder


# --- what a run leaves -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_leaves_figures_a_summary_and_the_adapter_alone(plain: Path, lora: Path) -> None:
    plots = {file.name for file in (plain / "plots").iterdir()}
    assert {"accuracy.png", "loss.png", "val_confusion.png", "val_roc.png"} <= plots
    assert {"test_confusion.png", "test_roc.png"} <= plots
    summary = json.loads((lora / "summary.json").read_text())
    metrics = summary["metrics"]
    for name in ("accuracy", "accuracy_low", "accuracy_high", "precision", "recall", "f1", "auroc", "loss"):
        assert 0 <= metrics[f"test/{name}"] <= 5
    matrix = torch.tensor(summary["confusion"]["test"])
    n = sum(summary["data"]["splits"]["test"]["classes"].values())
    assert matrix.sum() == n
    assert matrix.diagonal().sum() / n == pytest.approx(metrics["test/accuracy"])
    assert summary["parameters"]["trainable"] < summary["parameters"]["total"]
    assert summary["data"]["leaks"]["test"]["exact"] == 0
    full, adapter = resolve(lora), lora / "checkpoints" / "adapter.ckpt"
    assert full is not None
    assert adapter.stat().st_size < full.stat().st_size
    assert not (plain / "checkpoints" / "adapter.ckpt").exists()


def test_tensorboard_has_the_figures(plain: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(plain), size_guidance={"images": 0}).Reload()
    names = {"loss", "accuracy", "lr", "gradient_norm", "val_confusion", "val_roc", "test_confusion", "test_roc"}
    assert set(events.Tags()["images"]) == {f"plots/{name}" for name in names}
    assert [events.Images("plots/loss")[0].encoded_image_string] == [(plain / "plots" / "loss.png").read_bytes()]
    groups = {tag.split("/")[0] for tag in events.Tags()["scalars"]}
    assert groups == {"train", "val", "lr", "time", "best", "test"}
    assert len(events.Scalars("test/accuracy")) == len(events.Scalars("best/val_loss")) == 1


def test_the_adapter_alone_is_the_whole_model_given_its_base(lora: Path, base: Path, tmp_path: Path) -> None:
    whole = load_model(lora)
    ids, lengths = torch.arange(2 * CONTEXT_LENGTH).view(2, -1), torch.tensor([CONTEXT_LENGTH, 3])
    for alone in (
        load_model(lora / "checkpoints" / "adapter.ckpt"),
        load_model(lora / "checkpoints" / "adapter.ckpt", base=shutil.copy(base, tmp_path / "moved.ckpt")),
    ):
        with torch.no_grad():
            assert torch.equal(alone.classifier(ids, lengths), whole.classifier(ids, lengths))


def test_an_adapter_on_another_base_is_refused(
    lora: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    state = load(base)
    state["state_dict"]["model.final_norm.bias"] = state["state_dict"]["model.final_norm.bias"] + 1e-3
    save(tmp_path / "other.ckpt", state)
    adapter = lora / "checkpoints" / "adapter.ckpt"
    with pytest.raises(CheckpointError, match=r"adapter.ckpt is an adapter for other weights than these"):
        load_model(adapter, base=tmp_path / "other.ckpt")
    assert cli(["classify", str(adapter), "hello", "--base", str(tmp_path / "other.ckpt")]) == 2
    assert "is an adapter for other weights" in capsys.readouterr().err
    with pytest.raises(ValueError, match="is not an adapter, so it needs no base"):
        load_model(base, base=base)
    lost = load(adapter)
    lost[HEADER]["lineage"] |= {"parent_name": str(tmp_path / "gone.ckpt"), "places": {}}
    save(tmp_path / "lost.ckpt", lost)
    with pytest.raises(FileNotFoundError, match=r"gone.ckpt, which are not there .*say where with base="):
        load_model(tmp_path / "lost.ckpt")


# --- classify, evaluate ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "lora"])
def test_classify_prints_label_and_probability(
    name: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture
) -> None:
    folder = request.getfixturevalue(name)
    assert cli(["classify", str(folder), *TEXTS]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    loaded = llm_lightning.load_model(folder)
    one_by_one = [llm_lightning.classify_text(loaded, text) for text in TEXTS]
    for text, line, one in zip(TEXTS, lines, one_by_one, strict=True):
        assert line == [one.label, f"{one.probabilities[one.label]:.3f}", text]
        assert sum(one.probabilities.values()) == pytest.approx(1, abs=1e-6)
    together = list(llm_lightning.classify_texts(loaded, TEXTS))
    for alone, batched in zip(one_by_one, together, strict=True):
        assert alone.probabilities == pytest.approx(batched.probabilities, abs=1e-5)


def test_classify_reads_files_and_standard_input_and_writes_jsonl(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    found = []
    for arguments in (
        ["--file", str(tmp_path / "texts.txt")],
        ["--file", str(tmp_path / "texts.jsonl"), "--text-field", "body"],
        ["--file", "-"],
        TEXTS,
    ):
        standard_input = io.TextIOWrapper(io.BytesIO("\n".join(TEXTS).encode()))
        monkeypatch.setattr(sys, "stdin", standard_input)
        output = tmp_path / "out.jsonl"
        assert cli(["classify", str(plain), *arguments, "--output", str(output)]) == 0
        assert capsys.readouterr().out == f"{output}: 4 texts\n"
        found.append([json.loads(line) for line in output.read_text().splitlines()])
    assert found[0] == found[1] == found[2] == found[3]
    assert [record["text"] for record in found[0]] == TEXTS
    assert cli(["classify", str(plain), "--json", TEXTS[0]]) == 0
    assert json.loads(capsys.readouterr().out)["label"] == found[0][0]["label"]


def test_texts_beyond_the_context_are_cut_and_said(
    plain: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    assert cli(["classify", str(plain), "x" * 100, "short"]) == 0
    assert f"1 text(s) were longer than {CONTEXT_LENGTH} tokens" in caplog.text


@pytest.mark.parametrize("name", ["plain", "lora"])
def test_evaluate_repeats_the_number_of_the_run(
    name: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture
) -> None:
    folder = request.getfixturevalue(name)
    metrics = json.loads((folder / "summary.json").read_text())["metrics"]
    assert cli(["evaluate", str(folder), "--split", "test", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    for key in ("accuracy", "accuracy_low", "f1", "auroc"):
        assert result[key] == pytest.approx(metrics[f"test/{key}"], abs=1e-6)
    assert result["loss"] == pytest.approx(metrics["test/loss"], abs=1e-4)
    assert cli(["evaluate", str(folder), "--split", "val"]) == 0
    printed = capsys.readouterr().out
    assert "95% interval" in printed
    assert "true | said" in printed


@pytest.mark.parametrize(
    "more",
    [
        ["task=classification", "data.max_length=12"],
        ["task=classification", "data.pad_to=9", "task.pooling=last_position"],
        ["task=pretraining"],
    ],
)
def test_evaluate_reads_no_more_of_a_text_than_the_run_did(
    more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Weights with rotary positions keep their own context, and the run has a shorter one."""
    base = write_checkpoint(tmp_path / "gpt.ckpt", context_length=4 * CONTEXT_LENGTH, kind="llama")
    settings = [word for word in SETTINGS if "samples" not in word or "pretraining" in more[0]]
    corpus = [f"data.path={write_corpus(tmp_path / 'text.txt')}"] if "pretraining" in more[0] else []
    folder = run([*settings, *more, *corpus, f"init_from={base}"], tmp_path / "run")
    metrics = json.loads((folder / "summary.json").read_text())["metrics"]
    split = "val" if corpus else "test"
    assert cli(["evaluate", str(folder), "--split", split, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(metrics[f"{split}/loss"], abs=2e-5)


def test_evaluate_on_a_file_of_ones_own(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "x.csv").write_text("kind,body\nham,hello\nspam,win\nham,bye\n")
    words = ["evaluate", str(plain), "--text", str(tmp_path / "x.csv"), "--text-field", "body"]
    assert cli([*words, "--label-column", "kind", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    loaded = load_model(plain)
    right = [
        llm_lightning.classify_text(loaded, t).label == k
        for t, k in (("hello", "ham"), ("win", "spam"), ("bye", "ham"))
    ]
    assert result["n"] == 3
    assert result["accuracy"] == pytest.approx(sum(right) / 3)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("classify PLAIN", "no text: give one in quotes"),
        ("classify PLAIN --file TMP/none.txt", "none.txt"),
        ("classify PLAIN --file TMP/latin1.txt", "latin1.txt, line 1: byte 1 (0xe9) is not valid UTF-8"),
        ("classify PLAIN --file TMP/gap.txt", "gap.txt, line 2 is empty; every line is one text"),
        ("classify BASE hello", "this model has no classification head; train one"),
        ("generate PLAIN hello", "this model classifies and cannot continue text"),
        ("evaluate PLAIN --text TMP/wrong.csv", "name it, as --text-field body, or give --no-header if"),
        ("evaluate PLAIN --text TMP/unknown.csv", "'eggs' is not a class of this model; its classes are ham, spam"),
        ("evaluate TMP/changed.ckpt --split test", "not the data that the model was trained with"),
        ("export PLAIN TMP/new --format peft", "this model has no adapter"),
        ("generate BASE hello --adapter LORA", "should be an adapter for a GPT, but is a classifier's"),
        ("generate BASE hello --adapter BASE", "should be an adapter for a GPT, but is none"),
        ("generate BASE hello --adapter TMP/none.ckpt", "no checkpoint at"),
        ("classify PLAIN hello --base BASE", "is not an adapter, so it needs no base"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_code_2(
    plain: Path, lora: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture, command: str, message: str
) -> None:
    (tmp_path / "latin1.txt").write_bytes(b"a\xe9b")
    (tmp_path / "gap.txt").write_text("one\n\nthree\n")
    (tmp_path / "wrong.csv").write_text("body,kind,label\nx,y,ham\n")
    (tmp_path / "unknown.csv").write_text("text,label\nx,eggs\n")
    path = resolve(plain)
    assert path is not None
    changed = load(path)
    changed[HEADER]["lineage"]["data"] = "0" * 64
    save(tmp_path / "changed.ckpt", changed)
    words = {"PLAIN": plain, "LORA": lora, "BASE": base}
    typed = [str(words.get(word, word.replace("TMP", str(tmp_path)))) for word in command.split()]
    capsys.readouterr()
    assert cli(typed) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("\n") == 1


# --- export ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "lora"])
def test_exported_classifiers_are_the_same_for_transformers(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the dev extra: transformers")
    folder = request.getfixturevalue(name)
    assert cli(["export", str(folder), str(tmp_path / "exported")]) == 0
    assert "compared with transformers" in capsys.readouterr().out
    theirs = transformers.GPT2ForSequenceClassification.from_pretrained(tmp_path / "exported").eval()
    assert theirs.config.id2label == {0: "ham", 1: "spam"}
    loaded = load_model(folder)
    for text in TEXTS:
        ids = torch.tensor([loaded.tokenizer.encode(text)[:CONTEXT_LENGTH]])
        with torch.no_grad():
            expected = loaded.classifier(ids, torch.tensor([ids.size(1)]))
            torch.testing.assert_close(theirs(ids).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_classifier_that_reads_otherwise_is_not_exported(base: Path, tmp_path: Path, capsys: Any) -> None:
    folder = trained(tmp_path / "run", base, "task.pooling=mean")
    assert cli(["export", str(folder), str(tmp_path / "exported")]) == 2
    assert "has task.pooling=mean" in capsys.readouterr().err
    assert not (tmp_path / "exported").exists()


# --- adapters on one base --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_several_adapters_on_one_base_are_switched(speaker: Path, base: Path, tmp_path: Path, capsys: Any) -> None:
    other = tmp_path / "peft"
    model = load_model(base).gpt
    config = LoRAConfig(rank=2, targets=("qkv_proj", "down_proj"))
    from llm_lightning.models.lora import apply_lora

    apply_lora(model, config)
    with torch.no_grad():
        for tensor in adapter_state(model).values():
            tensor.normal_(generator=torch.Generator().manual_seed(1))
    export_peft(model, config, other, base_name=str(base))
    ours = speaker / "checkpoints" / "adapter.ckpt"
    loaded = load_model(base, adapters={"ours": ours, "theirs": other})
    ids = torch.arange(CONTEXT_LENGTH)[None]
    with torch.no_grad():
        assert torch.equal(loaded.gpt(ids), load_model(speaker).gpt(ids)), "the first is used"
        use_adapter(loaded.model, "theirs")
        torch.testing.assert_close(loaded.gpt(ids), model(ids), rtol=0, atol=1e-6)
        use_adapter(loaded.model, None)
        assert torch.equal(loaded.gpt(ids), load_model(base).gpt(ids))

    command = ["generate", str(base), "to be", "--greedy", "--max-new-tokens", "8"]
    assert cli([*command, "--adapter", str(ours), "--adapter", str(other)]) == 0
    both = capsys.readouterr().out.split("=== ")
    assert both[0] == ""
    for path, printed in ((ours, both[1]), (other, both[2])):
        assert cli([*command, "--adapter", str(path)]) == 0
        assert printed == f"{path}\n{capsys.readouterr().out}"
    # a folder of PEFT's also stands for the whole model, and can be trained on
    assert cli(["generate", str(other), "to be", "--greedy", "--max-new-tokens", "8"]) == 0
    assert both[2].endswith(capsys.readouterr().out)
    folder = trained(tmp_path / "run", other)
    assert json.loads((folder / "summary.json").read_text())["finished"]


def test_an_adapter_of_another_shape_is_refused(base: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    from llm_lightning.models.lora import apply_lora

    model = GPT(replace(load_model(base).gpt.config, n_embd=32, n_layer=2))
    apply_lora(model, LoRAConfig(rank=2))
    export_peft(model, LoRAConfig(rank=2), tmp_path / "peft", base_name="gpt2")
    with pytest.raises(ValueError, match="does not fit the model"):
        load_model(base, adapters={"x": tmp_path / "peft"})
    with pytest.raises(ValueError, match=r"cannot be named 'a\.b'"):
        load_adapter_state(load_model(base).model, {}, LoRAConfig(), "a.b")


def test_a_peft_adapter_that_names_no_base_asks_for_it(speaker: Path, base: Path, tmp_path: Path, capsys: Any) -> None:
    assert cli(["export", str(speaker), str(tmp_path / "peft"), "--format", "peft"]) == 0
    facts = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert facts["base_model_name_or_path"] == str(base)
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(facts | {"base_model_name_or_path": None}))
    (tmp_path / "peft" / "export_report.json").unlink()
    capsys.readouterr()
    assert cli(["generate", str(tmp_path / "peft"), "to be"]) == 2
    assert "does not name the base of the adapter; give it with base=" in capsys.readouterr().err
    command = ["--greedy", "--max-new-tokens", "5"]
    assert cli(["generate", str(tmp_path / "peft"), "to be", "--base", str(base), *command]) == 0
    expected = capsys.readouterr().out
    assert cli(["generate", str(speaker), "to be", *command]) == 0
    assert capsys.readouterr().out == expected


def test_inspect_shows_classes_and_adapter(lora: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli(["inspect", str(lora)]) == 0
    printed = capsys.readouterr().out
    assert "labels" in printed
    assert "rank=3" in printed
    assert "sequences_seen" in printed
