"""Files whose digest is right and whose content is not: whoever writes a file can write any digest.

Each is refused in one line that names the file, in about the time that an honest one takes.
"""

from __future__ import annotations

import io
import pickle
import resource
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoint import with_digest

from llm_lightning.callbacks.checkpoints import Checkpoints
from llm_lightning.callbacks.exact_resume import refusing_damage
from llm_lightning.cli.main import main
from llm_lightning.models.classifier import Classifier
from llm_lightning.models.gpt import GPT, GPTConfig
from llm_lightning.models.lora import LoRAConfig, apply_lora
from llm_lightning.tokenizers.build import build_tokenizer
from llm_lightning.weights import checkpoint as checkpoints
from llm_lightning.weights.checkpoint import HEADER, CheckpointError
from llm_lightning.weights.load import load_model

CONFIG = GPTConfig(vocab_size=257, context_length=8, n_layer=2, n_head=2, n_embd=8)
SECONDS, MEGABYTES = 2.0, 300  # an honest file takes some 0.02 s; importing and other tests' garbage need room
State = dict[str, Any]


def honest(kind: str) -> State:
    """What a run of each kind saves, without optimizer; `adapter`: an adapter alone."""
    torch.manual_seed(0)
    model: GPT | Classifier = GPT(CONFIG)
    more: dict[str, Any] = {}
    if kind == "classifier":
        model = Classifier(model, 3)
        labels = {"labels": ["a", "b", "c"], "pooling": "last", "causal": True, "pad_to": 8, "pad_id": 0}
        more["classifier"] = labels
    if kind in ("lora", "adapter"):
        config = LoRAConfig(rank=2)
        apply_lora(model, config)
        more["lora"] = asdict(config)
    header = checkpoints.describe(
        task="classification" if kind == "classifier" else "pretraining",
        model_config=CONFIG,
        tokenizer=build_tokenizer("byte"),
        step=3,
        epoch=1,
        metrics={"val/loss": 2.5},
        config={"seed": 1, "monitor": "val/loss", "data": {"path": "a.txt"}},
        lineage={"data": "d" * 64, "parent": None, "parent_name": "gone.ckpt", "base": "b" * 64},
        **more,
    )
    weights = {f"model.{name}": tensor.detach().clone() for name, tensor in model.state_dict().items()}
    if kind == "adapter":
        header["base"] = "b" * 64
        weights = {name: tensor for name, tensor in weights.items() if "lora_" in name}
    return {"state_dict": weights, HEADER: header}


def at(path: str, value: Any) -> Callable[[State], None]:
    """Put `value` where `path` says, below the header unless it begins with `/`; `...`: take it away."""

    def change(state: State) -> None:
        *folders, name = path.lstrip("/").split("/")
        place = state if path.startswith("/") else state[HEADER]
        for folder in folders:
            place = place[folder]
        if value is ...:
            del place[name]
        else:
            place[name] = value(place[name]) if callable(value) else value

    return change


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def laughs() -> Any:
    """A list of ten times the same list of ten times ...: a few bytes in the file, 10**12 values to walk through."""
    value: Any = ["ha"] * 10
    for _ in range(11):
        value = [value] * 10
    return value


def quantized(tensor: torch.Tensor) -> torch.Tensor:
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[-1] = float("nan")
    return tensor


WTE, WPE, QKV = (
    f"/state_dict/model.{name}"
    for name in ("token_embedding.weight", "position_embedding.weight", "blocks.1.attn.qkv_proj.weight")
)
PLAIN: dict[str, Callable[[State], None]] = {
    # numbers far from what stands in the file
    "10**6 layers": at("model/n_layer", 10**6),
    "10**9 layers": at("model/n_layer", 10**9),
    "10**9 layers of a task of one's own": lambda state: state[HEADER].update(
        task="mine", model=state[HEADER]["model"] | {"n_layer": 10**9}
    ),
    "a tensor more of a task of one's own": lambda state: [
        state[HEADER].update(task="mine"),
        state["state_dict"].update({"model.value_head": torch.ones(2)}),
    ],
    "one layer too many": at("model/n_layer", 3),
    "one layer too few": at("model/n_layer", 1),
    "a huge vocabulary": at("model/vocab_size", 10**12),
    "a huge context": at("model/context_length", 10**12),
    "a huge width": at("model/n_embd", 10**12),
    "heads that do not divide": at("model/n_head", 3),
    "no head": at("model/n_head", 0),
    "minus layers": at("model/n_layer", -1),
    "an integer of 100,000 digits": at("step", 10**100_000),
    # types
    "layers in words": at("model/n_layer", "2"),
    "layers and a half": at("model/n_layer", 2.5),
    "layers true": at("model/n_layer", True),
    "width null": at("model/n_embd", None),
    "dropout nan": at("model/residual_dropout", float("nan")),
    "dropout in words": at("model/residual_dropout", "none"),
    "eps nan": at("model/layer_norm_eps", float("nan")),
    "eps 0": at("model/layer_norm_eps", 0),
    "eps a list": at("model/layer_norm_eps", [1e-5]),
    "bias null": at("model/qkv_bias", None),
    "tied 1": at("model/tied_head", 1),
    "model a list": at("model", [1, 2]),
    "format null": at("format", None),
    "format in words": at("format", "1"),
    "format 0": at("format", 0),
    "format true": at("format", True),
    "task a list": at("task", ["sft"]),
    "step in words": at("step", "many"),
    "step negative": at("step", -1),
    "epoch a half": at("epoch", 0.5),
    "metrics in words": at("metrics", {"val/loss": "low"}),
    "metrics a list": at("metrics", [1.0]),
    "config a text": at("config", "seed=1"),
    "config.data null": at("config/data", None),
    "config.monitor a list": at("config/monitor", ["val/loss"]),
    "config keyed by numbers": at("config", {1: 2}),
    "lineage a text": at("lineage", "orphan"),
    "lineage.data a number": at("lineage/data", 7),
    "lineage.parent_name a dict": at("lineage/parent_name", {}),
    "rows without a digest": at("rows", {"count": 3}),
    "a tensor in the header": at("config/seed", torch.ones(2)),
    "a complex number in the header": at("config/seed", 1j),
    "bytes in the header": at("config/seed", b"1"),
    "settings nested 200 deep": at("config/seed", nested(200)),
    "10**12 values by reference": at("config/seed", laughs()),
    # keys
    "no format": at("format", ...),
    "no task": at("task", ...),
    "no model": at("model", ...),
    "no tokenizer": at("tokenizer", ...),
    "no heads": at("model/n_head", ...),
    "an unknown key of the model": at("model/n_experts", 8),
    "no weights": at("/state_dict", ...),
    "no header": at("/" + HEADER, ...),
    # tokenizer
    "a tokenizer without a name": at("tokenizer", {}),
    "a tokenizer of no name": at("tokenizer/name", None),
    "an unknown tokenizer": at("tokenizer/name", "klingon"),
    "a tokenizer with too many tokens": at("tokenizer", {"name": "gpt2"}),
    "words that are none": at("tokenizer", {"name": "word", "words": [1, 2]}),
    "merges that are none": at("tokenizer", {"name": "bpe", "merges": ["abc"]}),
    # weights
    "weights a list": at("/state_dict", [torch.ones(2)]),
    "weights keyed by numbers": at("/state_dict", {1: torch.ones(2)}),
    "a text for a weight": at(WTE, "here"),
    "a missing weight": at(WTE, ...),
    "an unknown weight": at(WTE.replace("token", "toke"), torch.ones(2)),
    "a weight of another shape": at(WPE, torch.ones(8, 9)),
    "a transposed weight": at(QKV, lambda tensor: tensor.T.contiguous()),
    "a sparse weight": at(QKV, lambda tensor: tensor.to_sparse()),
    "a compressed sparse weight": at(QKV, lambda tensor: tensor.to_sparse_csr()),
    "a complex weight": at(QKV, lambda tensor: tensor.to(torch.complex64)),
    "a weight on the meta device": at(QKV, lambda tensor: tensor.to("meta")),
    "a weight of integers": at(QKV, lambda tensor: tensor.long()),
    "a weight of booleans": at(QKV, lambda tensor: tensor.bool()),
    "a weight in float8": at(QKV, lambda tensor: tensor.to(torch.float8_e4m3fn)),
    "a quantized weight": at(QKV, quantized),
    "a weight that repeats one number": at(QKV, torch.ones(1).expand(24, 8)),
    "2**60 weights that repeat one number": at(WTE, torch.ones(1).expand(2**40, 2**20)),
    "a weight with nan": at(QKV, with_nan),
    "a weight with infinity": at(QKV, lambda tensor: with_nan(tensor).nan_to_num_(nan=float("inf"))),
    "a tied head of its own": at("/state_dict/model.lm_head.weight", lambda tensor: tensor + 1),
    "an adapter that nobody describes": at("/state_dict/model.lm_head.lora_A.default", torch.ones(2, 8)),
    "a base without an adapter": at("base", "b" * 64),
}
CLASSIFIER = {
    "labels a text": at("classifier/labels", "abc"),
    "labels of numbers": at("classifier/labels", [0, 1, 2]),
    "a label twice": at("classifier/labels", ["a", "b", "a"]),
    "one label": at("classifier/labels", ["a"]),
    "more labels than rows": at("classifier/labels", ["a", "b", "c", "d"]),
    "an unknown pooling": at("classifier/pooling", "best"),
    "pooling a list": at("classifier/pooling", ["last"]),
    "causal null": at("classifier/causal", None),
    "pad_id outside": at("classifier/pad_id", 257),
    "pad_to 0": at("classifier/pad_to", 0),
    "no pooling": at("classifier/pooling", ...),
    "an unknown key of the classifier": at("classifier/heads", 2),
    "classifier null": at("classifier", None),
    "an untied head": at("model/tied_head", False),
    "a classifier with the weights of a GPT": at("/state_dict", lambda _: honest("lora")["state_dict"]),
}
LORA = {
    "rank in words": at("lora/rank", "2"),
    "rank and a half": at("lora/rank", 2.5),
    "a huge rank": at("lora/rank", 10**12),
    "alpha null": at("lora/alpha", None),
    "alpha nan": at("lora/alpha", float("nan")),
    "alpha infinite": at("lora/alpha", float("inf")),
    "no alpha": at("lora/alpha", ...),
    "an unknown key of lora": at("lora/dora", True),
    "targets a text": at("lora/targets", "qkv_proj"),
    "targets of numbers": at("lora/targets", [1]),
    "no targets": at("lora/targets", []),
    "a target that is not there": at("lora/targets", ["qkv_proj", "out_proj", "up_proj", "down_proj", "gate_proj"]),
    "a layer that no target names": at("lora/targets", ["qkv_proj", "out_proj", "up_proj"]),
    "another form of qkv": at("lora/qkv", "split"),
    "an unknown init": at("lora/init", "zeros"),
    "adapters with nan": at("/state_dict/model.blocks.0.attn.qkv_proj.lora_A.default", with_nan),
    "lora null": at("lora", None),
    "an adapter in the eleventh block": at(
        "/state_dict/model.blocks.10.attn.qkv_proj.lora_A.default", torch.ones(2, 8)
    ),
    "10**9 layers and adapters": at("model/n_layer", 10**9),
}
ADAPTER = {
    "an adapter with 10**9 layers": at("model/n_layer", 10**9),
    "an adapter of another width": at("model/n_embd", 16),
    "an adapter with weights": at(WTE, torch.ones(257, 8)),
    "an adapter without settings": at("lora", ...),
    "a base of no name": at("lineage", {}),
    "a base that is a number": at("base", 3),
}


def written(path: Path, state: Any) -> Path:
    content = io.BytesIO()
    torch.save(state, content)
    path.write_bytes(with_digest(content.getvalue()))
    return path


def rewritten(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """An honest checkpoint, its archive written anew."""
    whole, content = io.BytesIO(), io.BytesIO()
    torch.save(honest("plain"), whole)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(content, "w", compression) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, change(entry.filename, old.read(entry)))
    path.write_bytes(with_digest(content.getvalue()))
    return path


class Bytes:
    """Unpickled, three gigabytes of zeros."""

    def __reduce__(self) -> Any:
        return bytearray, (3 * 10**9,)


def liars(folder: Path) -> Iterator[tuple[str, Path]]:
    """(what is wrong, file)."""
    for kind, lies in {"plain": PLAIN, "classifier": CLASSIFIER, "lora": LORA, "adapter": ADAPTER}.items():
        for number, (name, lie) in enumerate(lies.items()):
            state = honest(kind)
            lie(state)
            yield name, written(folder / f"{kind}_{number}.ckpt", state)
    yield "a compressed archive", rewritten(folder / "zip.ckpt", lambda _, content: content, zipfile.ZIP_DEFLATED)
    cut = rewritten(folder / "cut.ckpt", lambda name, content: content[:-4] if name.endswith("data/0") else content)
    yield "a short tensor", cut
    yield "an empty pickle", rewritten(folder / "no.ckpt", lambda n, c: b"" if n.endswith("data.pkl") else c)
    bomb = pickle.dumps({HEADER: {"format": 1}, "more": Bytes()}, protocol=2)
    yield "3 GB of zeros", rewritten(folder / "big.ckpt", lambda n, c: bomb if n.endswith("data.pkl") else c)
    (folder / "text.ckpt").write_bytes(with_digest(b"this is no archive at all"))
    yield "no archive", folder / "text.ckpt"


TYPICAL = ("10**9 layers", "layers in words", "format null", "a sparse weight", "a compressed archive", "alpha null")
VERBS = (
    ["generate", "FILE", "a"],
    ["lineage", "FILE"],
    ["export", "FILE", "FOLDER/export"],
    ["evaluate", "FILE", "--text", "FOLDER/a.txt"],
)
LATE = {
    "a tokenizer with too many tokens": "the tokenizer is built where it is needed",
    "an unknown tokenizer": "the tokenizer is built where it is needed",
    "words that are none": "the tokenizer is built where it is needed",
    "merges that are none": "the tokenizer is built where it is needed",
    "a base of no name": "may be given with --base",
}


@pytest.mark.slow
def test_what_a_forger_may_write_is_refused_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("plain", "classifier", "lora"):  # or everything below would be refused for another reason
        load_model(written(tmp_path / "honest.ckpt", honest(kind)))
        checkpoints.examine(tmp_path / "honest.ckpt")
    checkpoints.examine(written(tmp_path / "honest.ckpt", honest("adapter")))
    (tmp_path / "a.txt").write_text("to be or not to be")
    wrong, names = [], []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, path in liars(tmp_path):
        names.append(name)
        began = time.process_time()
        try:
            load_model(path)
            wrong.append(f"{name}: loaded")
        except (CheckpointError, FileNotFoundError) as error:
            message = str(error)
            if path.name not in message or len(message) > 500 or "; " not in message or not message.isprintable():
                wrong.append(f"{name}: {message[:600]!r}")
            if isinstance(error, FileNotFoundError) and "gone.ckpt" not in message:
                wrong.append(f"{name}: {message!r}")
        except Exception as error:
            wrong.append(f"{name}: {error!r:.200}")
        if time.process_time() - began > SECONDS:
            wrong.append(f"{name}: {time.process_time() - began:.1f} s")
        if main(["inspect", str(path)]) != 2 and name not in LATE:
            wrong.append(f"{name}: inspected")
        for verb in VERBS if name in TYPICAL else ():
            if main([word.replace("FILE", str(path)).replace("FOLDER", str(tmp_path)) for word in verb]) != 2:
                wrong.append(f"{name}: {verb[0]}")
        path.unlink()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000
    capsys.readouterr()
    assert not wrong, "\n".join(wrong)
    assert len(names) > 120
    assert grown < MEGABYTES


# --- what a run continues from -----------------------------------------------------------------------------------

FIT = "/loops/fit_loop"
RESUMED = {
    "no loops": at("/loops", ...),
    "loops a list": at("/loops", []),
    "a loop's counter in words": at(f"{FIT}/epoch_progress/current/completed", "one"),
    "a loop's counter negative": at(f"{FIT}/epoch_progress/current/completed", -1),
    "a loop without counters": at(f"{FIT}/epoch_loop.batch_progress", {"total": 3}),
    "a loop a number": at(FIT, 3),
    "no fit loop": at(FIT, ...),
    "other updates than the header says": at("/global_step", 7),
    "other updates than the loops made": lambda state: [at("/global_step", 7)(state), at("step", 7)(state)],
    "position null": at("/position", None),
    "position negative": at("/position/batches_done", -1),
    "position in words": at("/position/epoch", "last"),
    "stopped_of a text": at("/stopped_of", "here"),
    "no generators": at("/rng", ...),
    "generators of two processes": at("/rng", lambda states: states * 2),
    "short words of Python's generator": lambda state: state["rng"][0]["python"].update(words=torch.zeros(3).long()),
    "a short state of torch's generator": lambda state: state["rng"][0].update(torch=torch.zeros(8).byte()),
    "a generator of another kind": lambda state: state["rng"][0]["numpy"].update(kind="PCG64"),
    "a generator's index": lambda state: state["rng"][0]["numpy"].update(index=10**9),
    "sums in words": at("/task_module/epoch_sums", {"loss": "high"}),
    "sums of one number": at("/task_module/epoch_sums", {"loss": [1.0]}),
    "items_seen null": at("/task_module/items_seen", None),
    "no metrics": at("metrics", ...),
    "the best value in words": at("/callbacks/Checkpoints/best_value", "low"),
    "a callback's state a list": at("/callbacks/Checkpoints", [1]),
    "no optimizer": at("/optimizer_states", []),
    "an optimizer a list": at("/optimizer_states", [[]]),
    "a moment of another shape": lambda state: moments(state).update(exp_avg=torch.ones(3)),
    "a moment missing": lambda state: moments(state).pop("exp_avg_sq"),
    "a moment on the meta device": lambda state: moments(state).update(exp_avg=moments(state)["exp_avg"].to("meta")),
    "other parameters": lambda state: group(state)["param_names"].reverse() or group(state)["param_names"].pop(),
    "a rate in words": lambda state: group(state).update(lr="fast"),
    "betas a number": lambda state: group(state).update(betas=0.9),
    "a schedule's method": lambda state: state["lr_schedulers"][0].update(step=5),
    "a schedule's epoch in words": lambda state: state["lr_schedulers"][0].update(last_epoch="3"),
    "no schedule": at("/lr_schedulers", []),
    "a weight of another shape": at("/state_dict/model.final_norm.weight", torch.ones(17)),
    "an unknown tensor": at("/state_dict/reference.final_norm.weight", torch.ones(16)),
    "weights with nan": at("/state_dict/model.final_norm.weight", with_nan),
}


def moments(state: State) -> Any:
    return state["optimizer_states"][0]["state"][0]


def group(state: State) -> Any:
    return state["optimizer_states"][0]["param_groups"][0]


@pytest.mark.slow
def test_a_run_does_not_continue_from_what_is_not_its_state(
    tmp_path: Path, make_trainer: Any, make_module: Any, make_data: Any
) -> None:
    make_trainer(tmp_path, max_steps=3).fit(make_module(), datamodule=make_data(batch_size=4))
    path = tmp_path / "checkpoints" / "last.ckpt"
    content, wrong = path.read_bytes(), []

    def resume() -> None:
        trainer = make_trainer(tmp_path / "again", callbacks=[Checkpoints(every_n_steps=9)], max_steps=5)
        with refusing_damage(path):
            trainer.fit(make_module(), datamodule=make_data(batch_size=4), ckpt_path=path, weights_only=True)

    resume()
    for name, lie in RESUMED.items():
        state = torch.load(io.BytesIO(content), weights_only=True)
        lie(state)
        written(path, state)
        try:
            resume()
            wrong.append(f"{name}: resumed")
        except ValueError as error:
            if "last.ckpt" not in str(error) and "cannot resume" not in str(error):
                wrong.append(f"{name}: {error}")
        except Exception as error:
            wrong.append(f"{name}: {error!r:.200}")
    assert not wrong, "\n".join(wrong)
