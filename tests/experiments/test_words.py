"""Text stays as it was typed, and one value where a list is meant is a list of one."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from tiny_run import ROOT, SETTINGS, train_here, write_corpus

from llm_lightning.experiments.command_line import as_hydra_reads
from llm_lightning.experiments.run_records import COMMAND
from llm_lightning.experiments.settings.checks import check_overrides
from llm_lightning.experiments.settings.meaning import UNDECLARED, declared_kinds
from llm_lightning.experiments.settings.overrides import key_of
from llm_lightning.experiments.settings.yaml_files import package_of
from llm_lightning.experiments.stages import plan
from llm_lightning.optim.adamw import AdamWConfig

CONF = ROOT / "conf"
AS_TYPED = ["1984", "2026_11_26", "2026-11-26", "1e3", "007", "true", "False", "nan", "-1", "+1", ".5", "0x10", "1_000"]


def composed(line: str) -> Any:
    return check_overrides(as_hydra_reads(shlex.split(line), CONF), CONF)


def read(line: str, key: str) -> Any:
    """The value, of a multirun the first, that Hydra reads in the words as they are rewritten."""
    [word] = [word for word in as_hydra_reads(shlex.split(line), CONF) if key_of(word) == key]
    override = OverridesParser.create().parse_override(word)
    if not override.is_sweep_override():
        return override.value()
    first, *_ = override.sweep_string_iterator()
    return read(shlex.quote(f"{key}={first}"), key)  # as its job does


def test_text_stays_as_typed() -> None:
    keys = ("run_name", "init_from", "data.path", "tokenizer.name", "data.hf_revision", "data.text_field", "data")
    wrong = [(key, value) for key in keys for value in AS_TYPED if read(f"{key}={value}", key) != value]
    assert not wrong


# (command line, key, value)
MEANT = [
    ("run_name=null", "run_name", None),
    ("data.path=null", "data.path", None),
    ("++data.path=1984", "data.path", "1984"),
    ("data.path=' 1984 '", "data.path", "1984"),
    ("data.path=[1984,a.txt,1_0]", "data.path", ["1984", "a.txt", "1_0"]),
    ("'data.path=\"1984\"'", "data.path", "1984"),
    ("task=classification data.labels=[0,1]", "data.labels", ["0", "1"]),
    ("task=classification data.labels=spam", "data.labels", ["spam"]),
    ("task=classification data.text_column=0 data.label_column=1", "data.text_column", "0"),
    ("task=sft data.columns.output=2", "data.columns.output", "2"),
    ("callbacks.samples.prompts=[2024]", "callbacks.samples.prompts", ["2024"]),
    ("callbacks.samples.prompts=2024", "callbacks.samples.prompts", ["2024"]),
    ("callbacks.samples.prompts=Hello", "callbacks.samples.prompts", ["Hello"]),
    ("'callbacks.samples.prompts=Hello there: 1=1'", "callbacks.samples.prompts", ["Hello there: 1=1"]),
    ("'callbacks.samples.prompts=\"Hello, there\"'", "callbacks.samples.prompts", ["Hello, there"]),
    ("callbacks.samples.prompts=null", "callbacks.samples.prompts", None),
    ("lora=default lora.targets=qkv_proj", "lora.targets", ["qkv_proj"]),
    ("optimizer.betas=0.9", "optimizer.betas", [0.9]),
    ("trainer.precision=32", "trainer.precision", 32),  # a word beside numbers: Hydra's reading stays
    ("optimizer.fused=true", "optimizer.fused", True),
    ("trainer.devices=1", "trainer.devices", 1),
    ("task=classification task.trained_blocks=1", "task.trained_blocks", 1),
    ("-m run_name=2026_1,2026_2", "run_name", "2026_1"),
    ("-m 'run_name=choice(1_0,2)'", "run_name", "1_0"),
    ("-m 'run_name=range(7,9)'", "run_name", "7"),
    ("-m callbacks.samples.prompts=A,B", "callbacks.samples.prompts", ["A"]),
    ("-m 'data.path=choice(1984,1985)'", "data.path", "1984"),
]


def test_one_value_is_what_it_is_meant_to_be() -> None:
    wrong = []
    for line, key, meant in MEANT:
        found = read(line, key)
        wrong += [(line, found)] * (found != meant or type(found) is not type(meant))
    assert not wrong


def test_the_config_has_what_was_meant() -> None:
    config = composed("data.path=1984 'callbacks.samples={prompts:Hello}' optimizer.betas=[0.5,0.9]")
    assert (config.data.path, config.callbacks.samples.prompts, config.optimizer.betas) == (
        "1984",
        ["Hello"],
        [0.5, 0.9],
    )
    assert composed("'callbacks.samples.prompts=${run_name}' run_name=7").callbacks.samples.prompts == ["7"]
    assert composed("-m 'run_name=choice(1_0,2)' 'callbacks.samples.prompts=range(1,3)'").run_name == "1_0"


def test_any_name_of_a_role_may_be_given() -> None:
    config = composed("task=sft data.roles.narrator=user data.roles.7=assistant")
    assert dict(config.data.roles) == {"narrator": "user", "7": "assistant"}
    assert dict(composed("task=sft data.roles={narrator:user}").data.roles) == {"narrator": "user"}
    with pytest.raises(ValueError, match=r"unknown key 'data.role'; did you mean 'data.roles'"):
        composed("task=sft data.role.narrator=user")


def test_what_was_rewritten_once_is_left_alone() -> None:
    for line, *_ in MEANT:
        once = as_hydra_reads(shlex.split(line), CONF)
        assert as_hydra_reads(once, CONF) == once


# (command line, what the one line says)
REFUSED = [
    ("'callbacks.samples={prompts:[2024]}'", "callbacks.samples.prompts[0]=2024 is text that reads as a number"),
    ("callbacks.samples.prompts=[null]", "callbacks.samples.prompts[0]=null must be text"),
    ("monitor=[a,b]", "monitor=['a', 'b'] must be one text, not a list"),
    ("'optimizer.betas=[a,b]'", "optimizer.betas[0]='a' must be a number"),
    ("seed=null", "seed=null: this setting needs a value, such as 1234"),
    ("optimizer.lr=null", "optimizer.lr=null: this setting needs a value"),
    ("trainer.max_steps=null", "trainer.max_steps=null: this setting needs a value, such as -1"),
    ("model.n_layer=null", "model.n_layer=null: this setting needs a value, such as 4"),
    ("task=sft data.columns=null", "data.columns=null: this setting needs a value"),
    ("tokenizer.name=null", "tokenizer.name=null: this setting needs a value, such as bpe"),
]


@pytest.mark.slow
def test_other_kinds_are_refused() -> None:
    for line, message in REFUSED:
        with pytest.raises(ValueError, match=r".") as error:
            composed(line)
        assert message in str(error.value), line
        assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_number_in_a_file_asks_for_quotes_and_a_word_becomes_a_list(tmp_path: Path) -> None:
    file = tmp_path / "experiment" / "mine.yaml"
    file.parent.mkdir()
    for text, message in (
        ("data: {path: 2026_11_26}", f"data.path=20261126 in {file} is text that reads as a number or a switch"),
        ("run_name: 007", f"run_name=7 in {file}"),
        ("callbacks: {samples: {prompts: [a, 1]}}", f"callbacks.samples.prompts[1]=1 in {file}"),
        ("seed: null", f"seed=null in {file}: this setting needs a value"),
    ):
        file.write_text(f"# @package _global_\n{text}\n")
        with pytest.raises(ValueError, match=r".") as error:
            composed(f"--config-dir {tmp_path} experiment=mine")
        assert message in str(error.value)
    file.write_text("# @package _global_\ndata: {path: '1984'}\ncallbacks: {samples: {prompts: Hello}}\n")
    config = composed(f"--config-dir={tmp_path} experiment=mine")
    assert (config.data.path, config.callbacks.samples.prompts) == ("1984", ["Hello"])


def test_a_group_of_the_users_own_declares_kinds_too(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "mine.yaml"
    file.write_text("defaults:\n  - pretraining\n  - _self_\nhf_split: first\n")
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "2026_11.yaml").write_text("# @package _global_\nseed: 3\n")
    config = composed(f"--config-dir {tmp_path} data=mine data.hf_split=01 experiment=2026_11")
    assert (config.data.hf_split, config.seed) == ("01", 3)


NEW = """defaults:
  - pretraining
  - _self_
val_path: null
test_path: null
hf_val_split: null
hf_test_split: null
val_sets: {}
mixture: null
"""


@pytest.fixture
def mine(tmp_path: Path) -> str:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text(NEW)
    return f"--config-dir={tmp_path} data=mine "


# (command line, key, value)
NAMED: list[tuple[str, str, Any]] = [
    ("data.val_path=1984", "val_path", "1984"),
    ("data.test_path=[1984,a.txt]", "test_path", ["1984", "a.txt"]),
    ("data.hf_val_split=01", "hf_val_split", "01"),
    ("'data.hf_val_split=train[:50%]'", "hf_val_split", "train[:50%]"),
    ("data.hf_dataset=x 'data.hf_split=train[10:]+validation[-5%:]'", "hf_split", "train[10:]+validation[-5%:]"),
    ("data.val_sets.hard=hard.jsonl", "val_sets", {"hard": "hard.jsonl"}),
    ("+data.val_sets.hard=1984 data.val_sets.a-1=[1_0,b.txt]", "val_sets", {"hard": "1984", "a-1": ["1_0", "b.txt"]}),
    ("'data.val_sets={hard: 1984, easy:[007, x]}'", "val_sets", {"hard": "1984", "easy": ["007", "x"]}),
    ("'data.val_sets={hard: a.txt}' data.val_sets.hard=b.txt", "val_sets", {"hard": "b.txt"}),
    ("data.val_sets={}", "val_sets", {}),
    ("data.val_sets.hard=null data.val_sets.easy=a", "val_sets", {"hard": None, "easy": "a"}),
    ("data.val_sets=null", "val_sets", None),
    (
        "'data.mixture=[{name: 1, path: 1984, weight: 0.7}, {name: hub, hf_dataset: 3, hf_split: 4, weight: 1}]'",
        "mixture",
        [
            {"name": "1", "path": "1984", "weight": 0.7},
            {"name": "hub", "hf_dataset": "3", "hf_split": "4", "weight": 1},
        ],
    ),
    (
        "'data.mixture=[{name: a, path: [1, b.txt], weight: 1}]' data.mixture.0.weight=2 data.mixture.0.name=5",
        "mixture",
        [{"name": "5", "path": ["1", "b.txt"], "weight": 2}],
    ),
]


@pytest.mark.slow
def test_names_with_paths_and_sources_are_what_they_are_meant_to_be(mine: str) -> None:
    for line, key, meant in NAMED:
        words = as_hydra_reads(shlex.split(mine + line), CONF)
        assert as_hydra_reads(words, CONF) == words
        assert OmegaConf.to_container(OmegaConf.create({"value": check_overrides(words, CONF).data[key]})) == {
            "value": meant
        }, line


@pytest.mark.slow
def test_other_names_and_forms_are_refused(mine: str, tmp_path: Path) -> None:
    refused = [
        ("data.val_sets=hard.jsonl", "data.val_sets=hard.jsonl must give each path a name, such as {hard: hard.txt}"),
        ("'data.val_sets={a b: x}'", "data.val_sets: 'a b' is part of the names of metrics: use letters"),
        ("data.val_sets.a.b=x", "data.val_sets.a={'b': 'x'} must be text"),
        ("data.val_stes.a=x", "data.val_sets"),
        ("data.mixture=web.txt", "data.mixture=web.txt must be a list of sources, such as [{name: web, path: web.txt"),
        ("'data.mixture=[a.txt,b.txt]'", "must be a list of sources"),
    ]
    for line, message in refused:
        with pytest.raises(ValueError, match=r".") as error:
            composed(mine + line)
        assert message in str(error.value), line
    file = tmp_path / "experiment" / "own.yaml"
    file.parent.mkdir()
    for text, message in (
        ("val_sets: {hard: 1984}", "data.val_sets.hard=1984{} is text that reads as a number or a switch: write it"),
        ("val_sets: {1984: a.txt}", "data.val_sets in {}: 1984 is part of the names of metrics"),
        ("mixture: [{name: web, path: 1984, weight: 1}]", "data.mixture.0.path=1984 is text that reads as a number"),
    ):
        file.write_text(f"# @package _global_\ndata:\n  {text}\n")
        with pytest.raises(ValueError, match=r".") as error:
            composed(f"{mine} experiment=own")
        assert message.replace(" in {}", f" in {file}").replace("{}", f" in {file}") in str(error.value)
    file.write_text("# @package _global_\ndata:\n  val_sets: {hard: a.txt}\n  mixture:\n  - {name: web, path: b.txt}\n")
    data = composed(f"{mine} experiment=own data.val_sets.easy=c.txt data.mixture.0.path=1984").data
    assert (data.val_sets, data.mixture) == (
        {"hard": "a.txt", "easy": "c.txt"},
        [{"name": "web", "path": "1984"}],
    )


def test_every_default_that_tells_no_kind_has_one_in_the_table() -> None:
    """A new setting that is null by default must be entered, or `KEY=1984` becomes a number unseen."""
    kinds = declared_kinds((CONF,))
    open_ones: list[str] = []
    decided: set[str] = set()
    for file in sorted(CONF.rglob("*.yaml")):
        group = file.relative_to(CONF).parts[0]
        if group in ("experiment", "pipeline", "sweep", "debug", "train.yaml"):
            continue
        node = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        for key, value in _leaves(node, package_of(file, group)):
            is_open = value in (None, "???") and kinds[key] == "anything" and key not in UNDECLARED
            if isinstance(value, (bool, int, float)) or key == "callbacks.samples":
                decided.add(key)
            elif is_open:
                open_ones.append(key)
    assert not set(open_ones) - decided


def _leaves(node: dict, path: str) -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for key, value in node.items():
        inner = f"{path}.{key}" if path else str(key)
        if key != "defaults" and not inner.startswith("hydra"):
            found += _leaves(value, inner) if isinstance(value, dict) else [(inner, value)]
    return found


def test_betas_are_two() -> None:
    for betas in ([0.9], [0.9, 0.95, 0.99], [0.9, 1.0], [-0.1, 0.9]):
        with pytest.raises(ValueError, match=r"optimizer\.betas=.* must be two numbers"):
            AdamWConfig(betas=betas)


# --- through the entry points ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_on_a_path_of_digits_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "1984")
    settings = [word for word in SETTINGS if "prompts" not in word]
    command = [*settings, "data.path=1984", "run_name=2026_11_26", "callbacks.samples.prompts=42"]
    assert train_here(command).code == 0
    run = tmp_path / "outputs" / "pretraining" / "2026_11_26"
    assert (run / "samples.md").read_text().count("\n    42") == 1
    words = json.loads((run / COMMAND).read_text())["overrides"]
    assert {"data.path='1984'", "run_name='2026_11_26'", "callbacks.samples.prompts=['42']"} <= set(words)
    longer = train_here([f"resume={run}", "trainer.max_steps=6"])
    assert longer.code == 0, longer.err
    assert "Finished 6 steps" in longer.out


@pytest.mark.slow
def test_the_stages_of_a_pipeline_read_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    chain = plan(["pipeline=nano", "run_name=2026_11_26", "+pretraining.data.path=1984", "logger=null"], CONF)
    assert chain.folder.name == "2026_11_26"
    assert {"data.path='1984'", "logger=none"} <= set(chain.stages[0].words)
    assert "data.path='1984'" not in chain.stages[1].words
    mixture = "[{name: web, path: 1984, weight: 1}]"
    for_one = ["+pretraining.data.val_sets.hard=1984", f"+pretraining.data.mixture={mixture}"]
    chain = plan(["pipeline=nano", *for_one], CONF)
    assert {"++data.val_sets.hard='1984'", "data.mixture=[{name: web, path:'1984', weight: 1}]"} <= set(
        chain.stages[0].words
    )
