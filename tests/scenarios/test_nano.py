"""The README's main command, and the classifier that starts from it, reach the numbers that the README states."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from judge_server import serving

from llm_lightning.cli.main import main as cli
from llm_lightning.data.of_checkpoint import conversations_of
from llm_lightning.data.pairs import PreferenceBatch
from llm_lightning.data.pretraining import PretrainingDataModule
from llm_lightning.files.metrics_csv import read_metrics
from llm_lightning.losses import sequence_log_probs, token_log_probs
from llm_lightning.metrics.answers import exact_match
from llm_lightning.metrics.intervals import wilson_interval
from llm_lightning.models.attention import Context
from llm_lightning.weights.load import LoadedModel, load_model

ROOT = Path(__file__).resolve().parents[2]
EMBEDDED = json.loads((ROOT / "llm_lightning" / "data" / "embedded" / "short_answers.json").read_text())


def unigram_loss(train: np.ndarray, val: np.ndarray, vocab_size: int) -> float:
    """Nats per token of the training frequencies, every id counted once more so that none is impossible."""
    counts = np.bincount(train, minlength=vocab_size) + 1.0
    return float(-np.log(counts / counts.sum())[val].mean())


def trigram_loss(train: np.ndarray, val: np.ndarray, vocab_size: int) -> float:
    """Nats per token of interpolated uniform, uni-, bi- and trigram frequencies (Jelinek and Mercer 1980).

    The four weights are fitted by EM on the last tenth of the training text, with the frequencies of the rest.
    """
    cut = len(train) * 9 // 10
    held_out = ngram_probabilities(train[:cut], train[cut:], vocab_size)
    weights = np.full(4, 0.25)
    for _ in range(50):
        shares = held_out * weights
        weights = (shares / shares.sum(1, keepdims=True)).mean(0)
    return float(-np.log(ngram_probabilities(train, val, vocab_size) @ weights).mean())


def ngram_probabilities(train: np.ndarray, text: np.ndarray, vocab_size: int) -> np.ndarray:
    """(T - 2, 4): of every token from the third on, under uniform, uni-, bi- and trigram frequencies of `train`."""
    sequence = train.tolist()
    counts = [Counter(zip(*(sequence[i:] for i in range(n)), strict=False)) for n in (1, 2, 3)]
    target = text.tolist()
    rows = []
    for i in range(2, len(target)):
        a, b, c = target[i - 2 : i + 1]
        unigram = counts[0][(c,)] / len(sequence)
        bigram = counts[1][b, c] / max(counts[0][(b,)], 1)
        trigram = counts[2][a, b, c] / max(counts[1][a, b], 1)
        rows.append([1 / vocab_size, unigram, bigram, trigram])
    return np.array(rows)


def test_baselines_by_hand() -> None:
    assert unigram_loss(np.array([0, 0]), np.array([0, 1]), 2) == pytest.approx(
        -(math.log(3 / 4) + math.log(1 / 4)) / 2
    )
    cycle = np.array([0, 1, 2] * 1000)
    assert trigram_loss(cycle, cycle, 3) == pytest.approx(0, abs=1e-3)
    coin = np.random.default_rng(0).integers(0, 2, 20_000)
    assert trigram_loss(coin[:10_000], coin[10_000:], 2) == pytest.approx(math.log(2), rel=0.01)


def stated(pattern: str) -> list[float]:
    """The numbers that a sentence of the README states."""
    match = re.search(pattern, (ROOT / "README.md").read_text())
    assert match, f"README does not say {pattern}"
    return [float(number) for number in match.groups()]


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the README's main command; LLM_LIGHTNING_FIRST_RUN may name one that has been made."""
    if made := os.environ.get("LLM_LIGHTNING_FIRST_RUN"):
        return Path(made)
    folder = tmp_path_factory.mktemp("nano")
    run(folder, [])
    return folder / "run"


def run(folder: Path, arguments: list[str]) -> dict[str, Any]:
    """`python train.py ARGUMENTS`, with a cache of its own; its summary."""
    command = [sys.executable, str(ROOT / "train.py"), *arguments, f"hydra.run.dir={folder / 'run'}"]
    environment = {**os.environ, "LLM_LIGHTNING_CACHE": str(folder / "cache")}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=folder)
    assert result.returncode == 0, result.stderr[-2000:]
    summary: dict[str, Any] = json.loads((folder / "run" / "summary.json").read_text())
    return summary


@pytest.mark.slow
def test_main_command_reaches_the_stated_loss(nano: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = json.loads((nano / "summary.json").read_text())
    expected, tolerance = stated(r"validation loss of (\d\.\d+) ± (\d\.\d+) nats")
    if sys.version_info[:2] != (3, 11):
        tolerance += 0.15  # the stated number was measured with 3.11; the text grows by 3 to 6% with each version
    assert summary["best_value"] == pytest.approx(expected, abs=tolerance)
    assert summary["finished"]

    loaded = load_model(nano)
    settings = loaded.header["config"]["data"]
    options = {key: value for key, value in settings.items() if key not in ("_target_", "preview")}
    context_length = loaded.model.config.context_length
    monkeypatch.setenv("LLM_LIGHTNING_CACHE", str(tmp_path / "cache"))
    module = PretrainingDataModule(tokenizer=loaded.tokenizer, context_length=context_length, **options)
    module.build()
    assert module.val_file is not None
    texts = module.train_file.tokens, module.val_file.tokens, loaded.tokenizer.vocab_size
    unigram, trigram = unigram_loss(*texts), trigram_loss(*texts)
    assert summary["best_value"] < trigram < unigram
    # The corpus differs a little between Python versions.
    assert unigram == pytest.approx(stated(r"unigram model has (\d\.\d+) nats")[0], abs=0.05)
    assert trigram == pytest.approx(stated(r"trigram model, [^,]*, (\d\.\d+)\)")[0], abs=0.05)


@pytest.mark.slow
def test_a_classifier_from_nano_reaches_the_stated_accuracy(nano: Path, tmp_path: Path) -> None:
    """On the embedded messages, of which half are spam; no single word tells them apart (see its own test)."""
    metrics = run(tmp_path, ["task=classification", f"init_from={nano}", "task.trained_blocks=all"])["metrics"]
    expected, low, high = stated(r"test accuracy (\d\.\d+) \(95% interval (\d\.\d+) to (\d\.\d+)\)")
    assert metrics["test/accuracy_low"] > 0.6, "well above the half that are of either class"
    # Other Python versions pretrain on a slightly different text, and processors round differently.
    assert low <= metrics["test/accuracy"] <= high
    assert low < expected < high


@pytest.fixture(scope="module")
def tuned(nano: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of instruction tuning from there."""
    folder = tmp_path_factory.mktemp("tuned")
    run(folder, ["task=sft", f"init_from={nano}"])
    return folder / "run"


@pytest.mark.slow
def test_three_commands_from_nano_to_judged_answers(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Train, respond, judge; what is asked at the end shares no filling with what was learnt from."""
    summary = json.loads((tuned / "summary.json").read_text())
    metrics, data = summary["metrics"], summary["data"]
    losses = [loss for _, loss in read_metrics(tuned / "metrics.csv")["train/loss"]]
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])
    assert metrics["test/exact_match_low"] > metrics["test/exact_match_of_most_frequent"]
    expected, low, high = stated(r"(\d\.\d+) \((\d\.\d+) to (\d\.\d+)\) of the test questions answered exactly")
    assert low <= metrics["test/exact_match"] <= high  # Python versions and processors differ
    assert low < expected < high
    assert data["leaks"]["test"]["prompts"] == 0

    monkeypatch.setenv("LLM_LIGHTNING_CACHE", str(tmp_path / "cache"))
    answers = tmp_path / "responses.json"
    assert cli(["respond", str(tuned), "--split", "test", "-o", str(answers)]) == 0
    rows = json.loads(answers.read_text())
    assert len(rows) == 95 == len(json.loads((tuned / "responses.json").read_text()))
    loaded = load_model(tuned)
    learnt = {one.group for one in conversations_of(loaded, instead="").conversations_of("train")}
    assert all(row["group"] and row["group"] not in learnt for row in rows)

    def judged(prompt: str, seed: int) -> str:
        """Full marks for the reference answer itself."""
        output, response = re.findall(r"correct output `(.*?)`, score the model response `(.*?)` on a scale", prompt)[0]
        return "100" if exact_match(response, output) else "0"

    with serving(judged) as server:
        assert cli(["judge", str(answers), "--url", server.url, "--json"]) == 0
        assert len(server.requests) == len({json.dumps(request["messages"]) for request in server.requests})
    report = json.loads(answers.with_suffix(".judged.json").read_text())
    right = sum(exact_match(row["model_response"], row["output"]) for row in rows)
    summary = report["summary"]["columns"]["model_response"]
    assert summary["outcomes"] == {"scored": 95, "unparsable": 0, "timeout": 0, "failed": 0}
    assert summary["mean"] == pytest.approx(100 * right / len(rows))
    assert right / len(rows) == pytest.approx(metrics["test/exact_match"], abs=0.03), "bf16 in training, fp32 here"


@pytest.mark.slow
def test_preferences_from_the_tuned_model_reach_the_stated_accuracy(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the held-out pairs, the two kinds apart: another tone, or the same tone and a wrong answer."""
    metrics = run(tmp_path, ["task=dpo", f"init_from={tuned}", "trainer.max_epochs=3"])["metrics"]
    expected, low, high = stated(r"test reward accuracy of (\d\.\d+) \(95% interval (\d\.\d+) to (\d\.\d+)\)")
    assert metrics["test/reward_accuracy_low"] > 0.5
    assert low <= metrics["test/reward_accuracy"] <= high  # Python versions and processors differ
    assert low < expected < high
    expected, low, high = stated(r"the margin rises from 0 to (\d\.\d+) \((\d\.\d+) to (\d\.\d+)\)")
    assert low <= metrics["val/reward_margin"] <= high
    assert low < expected < high
    margins = [margin for _, margin in read_metrics(tmp_path / "run" / "metrics.csv")["train/reward_margin"]]
    assert margins[0] == pytest.approx(0, abs=1e-2)
    assert sum(margins[-5:]) > sum(margins[5:10])

    monkeypatch.setenv("LLM_LIGHTNING_CACHE", str(tmp_path / "cache"))
    hits = held_out_hits(load_model(tuned), load_model(tmp_path / "run"))
    n_tone, n_right, n_truth = map(int, stated(r"all (\d+) that differ in tone correctly, and (\d+) of the (\d+)"))
    assert (len(hits["tone"]), len(hits["truth"])) == (n_tone, n_truth)
    assert sum(hits["tone"]) >= 0.9 * n_tone
    assert abs(sum(hits["truth"]) - n_right) <= 5
    assert wilson_interval(sum(hits["truth"]), n_truth)[0] < 0.5, "else README is too modest"


def held_out_hits(reference: LoadedModel, policy: LoadedModel) -> dict[str, list[bool]]:
    """Of each kind of pair of the validation and test split: whether the chosen answer gained more."""
    data: Any = conversations_of(policy, instead="")
    hits: dict[str, list[bool]] = {"tone": [], "truth": []}
    for split, samples in (("val", data.eval_samples["val"]), ("test", data.test_samples["test"])):
        batch = data.collate(list(samples))
        gained = answer_log_probs(policy, batch) - answer_log_probs(reference, batch)
        for sample, chosen, rejected in zip(list(samples), *gained.chunk(2), strict=True):
            pair = data.records[split][sample.sample_id]
            turn = pair.turns[-1]
            right = next(
                answer["output"]
                for answer in EMBEDDED
                if (answer["instruction"], answer["input"]) == (turn.instruction, turn.input)
            )
            kind = "tone" if re.search(rf"(?<![\w-]){re.escape(right)}(?![\w-])", pair.rejected) else "truth"
            hits[kind].append(bool(chosen > rejected))
    return hits


@torch.no_grad()
def answer_log_probs(loaded: LoadedModel, batch: PreferenceBatch) -> torch.Tensor:
    hidden = loaded.gpt.hidden_states(batch.input_ids, Context.of(batch.packing)).flatten(0, 1)[batch.output_positions]
    log_probs = token_log_probs(hidden, loaded.gpt.head_weight(), batch.labels)
    return sequence_log_probs(log_probs, batch.branch, len(batch.lengths))
