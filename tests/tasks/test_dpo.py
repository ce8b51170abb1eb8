"""DPO through real runs: it starts at ln 2, the reference stays, and every way to have one gives the same curve."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import finish_two
from tiny_run import SETTINGS, fit_here

from llm_lightning.data.of_checkpoint import conversations_of
from llm_lightning.files.frozen_cache import FrozenCache
from llm_lightning.files.metrics_csv import read_metrics
from llm_lightning.inference.generation import generate
from llm_lightning.models.gpt import GPT, GPTConfig
from llm_lightning.models.lora import LoRAConfig
from llm_lightning.optim.adamw import AdamWConfig
from llm_lightning.optim.schedules import WarmupCosineConfig
from llm_lightning.tasks.dpo import DPOModule
from llm_lightning.tasks.reference import AdapterOff, Copy
from llm_lightning.terminal import visible
from llm_lightning.tokenizers.build import build_tokenizer
from llm_lightning.weights import checkpoint as checkpoints
from llm_lightning.weights.load import load_model

LN2 = math.log(2)
STEPS = 12
Curves = dict[str, list[tuple[int, float]]]
TEMPLATE = "data.template='{instruction} {input} {response}'"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.json"
    rows = [
        {"instruction": f"Say {i}", "input": "now" * (i % 3), "chosen": f"yes {i}", "rejected": "no" * (1 + i % 4)}
        for i in range(60)
    ]
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model to start from, everything in it drawn at random."""
    path = tmp_path_factory.mktemp("start") / "start.ckpt"
    torch.manual_seed(1)
    config = GPTConfig(vocab_size=257, context_length=64, n_layer=2, n_head=2, n_embd=16)
    state = {f"model.{name}": torch.randn_like(tensor) * 0.2 for name, tensor in GPT(config).state_dict().items()}
    state["model.lm_head.weight"] = state["model.token_embedding.weight"]
    header = checkpoints.describe(task="sft", model_config=config, tokenizer=build_tokenizer("byte"), config={})
    checkpoints.save(path, {"state_dict": state, checkpoints.HEADER: header})
    return path


def run(folder: Path, start: Path, pairs: Path, *arguments: str) -> Curves:
    """The curves of a run of 12 steps in fp32."""
    outcome = fit_here(command(folder, start, pairs, *arguments))
    assert outcome.code == 0, outcome.err
    return read_metrics(folder / "metrics.csv")


def command(folder: Path, start: Path, pairs: Path, *arguments: str) -> list[str]:
    """A command line; `arguments` win."""
    names = {word.partition("=")[0] for word in arguments}
    kept = [word for word in settings_of(folder, start, pairs) if word.partition("=")[0] not in names]
    return [*kept, *arguments]


class Runs:
    """One run for each name of `WAYS`, made when it is first asked for; the tests only read its folder."""

    def __init__(self, folder: Path, start: Path, pairs: Path) -> None:
        self.folder, self.start, self.pairs = folder, start, pairs

    def __call__(self, name: str) -> Path:
        folder = self.folder / name.replace(", ", "_").replace(" ", "_")
        if not folder.exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("LLM_LIGHTNING_CACHE", str(self.folder / "cache"))  # outlives the test that asks first
                run(folder, self.start, self.pairs, *WAYS[name])
        return folder

    def curves(self, name: str) -> Curves:
        return read_metrics(self(name) / "metrics.csv")


@pytest.fixture(scope="module")
def runs(start: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), start, pairs)


def settings_of(folder: Path, start: Path, pairs: Path) -> list[str]:
    settings = [
        *SETTINGS, "task=dpo", f"init_from={start}", f"data.path={pairs}", TEMPLATE, "model.context_length=64",
        "model.n_layer=2", f"trainer.max_steps={STEPS}", "trainer.max_epochs=-1", "data.batch_size=4",
        "optimizer.lr=2e-3", "scheduler=constant", "trainer.val_check_interval=null", "callbacks.samples=null",
        f"hydra.run.dir={folder}",
    ]  # fmt: skip
    kept = [word for word in settings if "samples." not in word]
    return list({word.partition("=")[0]: word for word in kept}.values())  # later settings win


def losses(curves: Curves, steps: int = STEPS) -> list[float]:
    assert [step for step, _ in curves["train/loss"]] == list(range(steps))
    return [loss for _, loss in curves["train/loss"]]


WAYS = {
    "copy": [],
    "cached": ["task.reference=cached"],
    "padded": ["data.packing=false"],
    "packed": ["data.packing=true"],
    "lora, adapters off": ["lora=default"],
    "lora, copy": ["lora=default", "task.reference=copy"],
    "lora, cached": ["lora=default", "task.reference=cached"],
}


@pytest.mark.slow
def test_every_reference_gives_the_same_curve_from_ln_2_on(runs: Runs) -> None:
    found = {name: runs.curves(name) for name in WAYS}
    for name, curves in found.items():
        assert losses(curves)[0] == pytest.approx(LN2, abs=1e-5), name
        assert curves["train/reward_margin"][0][1] == pytest.approx(0, abs=1e-5)
        like = "lora, adapters off" if name.startswith("lora") else "copy"
        assert losses(curves) == pytest.approx(losses(found[like]), abs=1e-5), name
    for name in ("copy", "lora, adapters off"):
        assert losses(found[name])[-1] < LN2 - 0.01
        assert found[name]["train/reward_margin"][-1][1] > 0


@pytest.mark.slow
def test_after_instruction_tuning_with_adapters(runs: Runs, start: Path, pairs: Path, tmp_path: Path) -> None:
    """The policy, and so its reference, begins with those adapters in its weights."""
    tuned = tmp_path / "tuned"
    outcome = fit_here([
        *(word for word in SETTINGS if "samples" not in word and "n_layer" not in word), "task=sft", "lora=default",
        f"init_from={start}", f"data.path={pairs}", "data.columns.output=chosen", TEMPLATE, "model.n_layer=2",
        "model.context_length=64", "optimizer.lr=1e-2", "callbacks.samples=null", "callbacks.responses=null",
        f"hydra.run.dir={tuned}",
    ])  # fmt: skip
    assert outcome.code == 0, outcome.err
    found = {}
    for way in ("copy", "lora, adapters off", "lora, copy", "lora, cached"):
        folder = tmp_path / way.replace(", ", "_").replace(" ", "_")
        found[way] = run(folder, tuned, pairs, *WAYS[way], "trainer.max_steps=6")
        assert losses(found[way], 6)[0] == pytest.approx(LN2, abs=1e-5), way
        if way.startswith("lora"):
            assert losses(found[way], 6) == pytest.approx(losses(found["lora, adapters off"], 6), abs=1e-5), way
    of_both = [curves["train/chosen_log_prob"][0][1] for curves in (found["copy"], runs.curves("copy"))]
    assert of_both[0] > of_both[1] + 0.1, "the adapters were left behind"


def test_the_reference_is_saved_and_stays_to_the_bit(runs: Runs, start: Path) -> None:
    before = checkpoints.load(start)["state_dict"]
    after = checkpoints.load(runs("copy") / "checkpoints" / "last.ckpt")["state_dict"]
    for name, tensor in before.items():
        assert torch.equal(after[name.replace("model.", "reference.", 1)], tensor), name
    assert not torch.equal(after["model.token_embedding.weight"], before["model.token_embedding.weight"])
    loaded = load_model(runs("copy"))
    assert loaded.header["task"] == "dpo"
    assert loaded.gpt.num_parameters() == sum(
        tensor.numel() for name, tensor in before.items() if name != "model.lm_head.weight"
    )


@pytest.mark.slow
@pytest.mark.parametrize("way", ["copy", "cached", "lora, adapters off"])
def test_a_run_that_goes_on_is_that_of_one_piece(
    way: str, runs: Runs, start: Path, pairs: Path, tmp_path: Path
) -> None:
    half = run(tmp_path / "half", start, pairs, *WAYS[way], "trainer.max_steps=7")
    assert losses(half, 7) == losses(runs.curves(way))[:7]
    assert losses(run(tmp_path / "half", start, pairs, *WAYS[way])) == losses(runs.curves(way))


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [[], ["lora=default"]], ids=["full", "lora"])
def test_the_next_job_of_a_sweep_runs_no_reference(
    adapters: list[str], runs: Runs, start: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither beta, nor the learning rate, nor the seed, which also draws the adapters, makes another reference."""
    cached = [*adapters, "task.reference=cached"]
    first = runs.curves("lora, cached" if adapters else "cached")
    monkeypatch.setenv("LLM_LIGHTNING_CACHE", str(runs.folder / "cache"))
    other = ["task.beta=0.3", "optimizer.lr=3e-3", "seed=5"]
    expected = run(tmp_path / "copy", start, pairs, *adapters, "task.reference=copy", *other)

    def refused(*_: object, **__: object) -> None:
        raise RuntimeError("the reference was computed again")

    monkeypatch.setattr(FrozenCache, "_add", refused)
    monkeypatch.setattr(AdapterOff, "model", refused)
    monkeypatch.setattr(Copy, "model", refused)
    second = run(tmp_path / "second", start, pairs, *cached, *other)
    assert losses(second) == pytest.approx(losses(expected), abs=1e-5)
    assert losses(second)[-1] != losses(first)[-1]


@pytest.mark.slow
def test_another_start_has_a_reference_of_its_own(
    runs: Runs, start: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probabilities stored for other weights would not agree with the policy at step 0."""
    runs("cached")
    monkeypatch.setenv("LLM_LIGHTNING_CACHE", str(runs.folder / "cache"))
    saved = checkpoints.load(start)
    saved["state_dict"]["model.final_norm.weight"] *= 1.5
    checkpoints.save(tmp_path / "other.ckpt", saved)
    assert losses(run(tmp_path / "run", tmp_path / "other.ckpt", pairs, *WAYS["cached"]))[0] == pytest.approx(
        math.log(2), abs=1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("way", ["copy", "cached", "lora, adapters off"])
def test_two_processes_log_what_one_does(way: str, strategy: str, start: Path, pairs: Path, tmp_path: Path) -> None:
    """One of them gets no pair of the only validation batch, and runs out of pairs before the end of an epoch."""
    shared = [
        *WAYS[way],
        "data.val_fraction=0.02",
        "data.eval_batches=0",
        "trainer.max_steps=-1",
        "trainer.max_epochs=2",
    ]
    run(tmp_path / "one", start, pairs, *shared, "data.batch_size=8")
    names = {word.partition("=")[0] for word in shared}
    settings = [word for word in settings_of(tmp_path / "two", start, pairs) if word.partition("=")[0] not in names]
    two = [f"accelerator={strategy}", "trainer.accelerator=cpu", "trainer.devices=2"]
    settings = [word for word in settings if not word.startswith("accelerator=")]
    outcome = finish_two([*settings, *shared, *two], tmp_path)
    assert outcome.code == 0, outcome.err
    one, other = (read_metrics(tmp_path / name / "metrics.csv") for name in ("one", "two"))
    assert one.keys() == other.keys()
    assert len(one["train/loss"]) >= 12
    for name in one.keys() - {"train/pairs_per_second", "train/peak_memory_gib"}:
        assert [step for step, _ in one[name]] == [step for step, _ in other[name]], name
        for (_, value), (_, same) in zip(one[name], other[name], strict=True):
            assert value == pytest.approx(same, rel=1e-3, abs=2e-5), name  # float32, Adam's first steps


@pytest.mark.slow
def test_a_line_warns_of_random_weights(
    start: Path, pairs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = command(tmp_path / "given", start, pairs, "trainer.max_steps=1")
    assert fit_here(settings).code == 0
    line = "start from random weights; give init_from=RUN"
    assert line not in caplog.text
    settings = command(tmp_path / "random", start, pairs, "trainer.max_steps=1")
    assert fit_here([word for word in settings if not word.startswith("init_from=")]).code == 0
    assert caplog.text.count(line) == 1


def test_a_line_warns_when_chosen_answers_fall(caplog: pytest.LogCaptureFixture) -> None:
    made = module(max_chosen_drop=2.0)
    outputs = {"margin": torch.tensor([1.0, 2.0]), "longer_by": torch.tensor([0.0, 1.0])}
    for drop, expected in ((-1.9, 0), (-2.1, 1), (-3.0, 1)):  # once
        made.eval_metrics("val", {"reward_accuracy": 1.0, "chosen_log_ratio": drop}, outputs)
        assert caplog.text.count("Chosen answers have become less likely") == expected


def test_the_correlation_with_length_by_hand() -> None:
    outputs = {"margin": torch.tensor([1.0, 2.0, 4.0]), "longer_by": torch.tensor([-1.0, 0.0, 2.0])}
    found = module().eval_metrics("test", {"reward_accuracy": 1.0, "chosen_log_ratio": 0.0}, outputs)
    assert found["margin_length_correlation"] == pytest.approx(1.0)


def module(**options: Any) -> DPOModule:
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=257, context_length=32, n_layer=2, n_head=2, n_embd=16)
    settings = {"optimizer": AdamWConfig(lr=1e-3), "scheduler": WarmupCosineConfig(warmup=0)}
    return DPOModule(model=GPT(config), tokenizer=build_tokenizer("byte"), **settings, **options)


@pytest.mark.parametrize("way", ["copy", "lora, adapters off", "cached"])
def test_kl_is_exact_where_the_reference_is_at_hand(way: str, runs: Runs, start: Path) -> None:
    """After training, by hand over the whole vocabulary, at the positions of the answers of the validation split."""
    curves = runs.curves(way)
    if way == "cached":
        assert "val/kl_per_token" not in curves
        return
    policy = load_model(runs(way) / "checkpoints" / "last.ckpt")
    reference = load_model(start).gpt
    data = conversations_of(policy, instead="")
    total, count = 0.0, 0
    for index in range(len(data.eval_samples["val"])):
        for one in data.eval_samples["val"][index].sequences:
            ids = torch.from_numpy(one.token_ids.astype(np.int64))[None]
            with torch.no_grad():
                ours, theirs = (model.eval()(ids).double().log_softmax(-1) for model in (policy.gpt, reference))
            kl = (ours.exp() * (ours - theirs)).sum(-1)[0, :-1][torch.from_numpy(one.is_target[1:])]
            total, count = total + kl.sum().item(), count + len(kl)
    assert curves["val/kl_per_token"][-1][1] == pytest.approx(total / count, rel=1e-4)
    assert total / count > 1e-4


@pytest.mark.slow
def test_both_answer_the_prompts_of_the_validation_data(start: Path, pairs: Path, tmp_path: Path) -> None:
    run(tmp_path / "run", start, pairs, "callbacks.samples={_target_: llm_lightning.callbacks.samples.Samples, "
        "prompts: null, max_new_tokens: 8, beside_start: true}")  # fmt: skip
    curves = read_metrics(tmp_path / "run" / "metrics.csv")
    assert all(0 <= rate <= 1 for _, rate in curves["samples/repetition"])
    text = (tmp_path / "run" / "samples.md").read_text()
    loaded = load_model(start)
    data = conversations_of(load_model(tmp_path / "run"), instead="")
    prompts = data.sample_prompts(3)
    answers = generate(loaded.gpt, prompts, max_new_tokens=8, stop_ids=[data.pad_id])
    assert text.count("    at the start: ") == 3 * text.count("## step")
    for prompt, answer in zip(prompts, answers, strict=True):
        before = visible(loaded.tokenizer.decode([*prompt, *answer])[len(loaded.tokenizer.decode(prompt)) :])
        assert f"at the start: {before}".splitlines()[0] in text


def test_the_reference_is_frozen_and_never_trains() -> None:
    made = module()
    assert made.reference is not None
    assert not made.reference.training, "from the start, whether or not train() is called"
    made.train()
    assert not made.reference.training
    assert not any(parameter.requires_grad for parameter in made.reference.parameters())
    assert made.reference.token_embedding.weight is not made.model.token_embedding.weight


def test_auto_takes_what_is_cheapest_and_right() -> None:
    assert module().reference_provider.kind == "copy"
    assert module(lora=LoRAConfig(rank=2)).reference_provider.kind == "adapter_off"
    assert module(lora=LoRAConfig(rank=2)).reference is None
    assert module(loss="simpo").reference_provider.kind == "none"
    assert module(loss="simpo").reference is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"reference": "adapter_off"},
            "needs adapters, and all weights are trained here; add lora=default, or use cop",
        ),
        ({"reference": "cashed"}, "did you mean cached"),
        ({"lora": LoRAConfig(dropout=0.1)}, "set model.dropout=0 and lora.dropout=0"),
    ],
)
def test_an_impossible_reference_says_what_is_possible(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(**options)


def test_a_wrong_reference_is_refused(
    start: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = DPOModule.__init__

    def tampered(self: DPOModule, **options: Any) -> None:
        made(self, **options)
        assert self.reference is not None
        with torch.no_grad():
            self.reference.blocks[0].mlp.up_proj.weight.add_(0.05)  # type: ignore[union-attr, operator]

    monkeypatch.setattr(DPOModule, "__init__", tampered)
    with pytest.raises(
        AssertionError, match=r"policy and reference differ at step 0.*does not start at ln 2 = 0\.6931"
    ):
        run(tmp_path / "run", start, pairs)
