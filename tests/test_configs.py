"""Every file of conf/ composes, passes the checks, builds, explains itself, and stands in the promised order."""

from __future__ import annotations

import copy
import functools
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch.optim import SGD, NAdam

from llm_lightning.experiments.build import build_optimizer
from llm_lightning.experiments.monitors import fill_modes
from llm_lightning.experiments.open_settings import parameter_count
from llm_lightning.experiments.settings.checks import check_overrides
from llm_lightning.experiments.settings.compose import PRESETS, prepare_hydra
from llm_lightning.experiments.settings.help import help_text
from llm_lightning.experiments.settings.nodes import plain
from llm_lightning.experiments.settings.yaml_files import group_files, group_options, read_defaults, read_settings
from llm_lightning.experiments.stages import plan
from llm_lightning.models.gpt import GPT, GPTConfig
from llm_lightning.optim.adamw import AdamWConfig
from llm_lightning.optim.muon import MuonConfig
from llm_lightning.optim.schedules import ConstantConfig, WarmupCosineConfig
from llm_lightning.optim.torch_optim import TorchOptimConfig
from llm_lightning.weights.renamed import ADDED

CONF = Path(__file__).parents[1] / "conf"
FILES = sorted(CONF.rglob("*.yaml"))
ORDER = """model tokenizer data optimizer scheduler lora trainer accelerator callbacks logger
    task experiment pipeline sweep debug"""
GROUPS = [group for group, _ in read_defaults(CONF / "train.yaml") if group and not group.startswith("hydra/")]
NEEDED = {
    "tokenizer=tiktoken": ["tokenizer.name=cl100k_base"],
    "optimizer=torch": ["optimizer._target_=torch.optim.NAdam", "+optimizer.momentum_decay=1e-2"],
}  # options with a value that must be given


def relative(file: Path) -> str:
    return file.relative_to(CONF).as_posix()


def covering_choices() -> list[list[str]]:
    """Few command lines that choose every option of every group at least once."""
    options = {
        group: group_options(CONF, group) for group in GROUPS if group not in ("experiment", "pipeline", "sweep")
    }
    rows = range(max(map(len, options.values())))
    return [[f"{group}={names[row % len(names)]}" for group, names in options.items()] for row in rows]


@functools.cache
def composed(*overrides: str, hydra: bool = False) -> DictConfig:
    """To be read, not changed."""
    prepare_hydra()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", list(overrides), return_hydra_config=hydra)


# --- composition ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choices", covering_choices(), ids=" ".join)
def test_every_option_composes_resolves_and_passes_the_checks(choices: list[str]) -> None:
    needed = [value for choice in choices for value in NEEDED.get(choice, [])]
    config = check_overrides([*choices, *needed], CONF)
    OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


@pytest.mark.parametrize("name", group_options(CONF, "experiment"))
def test_every_experiment_passes_the_checks_on_its_own(name: str) -> None:
    check_overrides([f"experiment={name}"], CONF)


@pytest.mark.parametrize("name", group_options(CONF, "pipeline"))
def test_every_stage_of_every_pipeline_passes_the_checks(name: str) -> None:
    chain = plan([f"pipeline={name}", "seed=2"], CONF)
    assert all("seed=2" in stage.words for stage in chain.stages if not stage.is_command)


def test_a_wrong_sweep_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sweep=lr_by_warmpu: no such option; did you mean 'lr_by_warmup'"):
        check_overrides(["sweep=lr_by_warmpu"], CONF)


def test_the_defaults_list_has_the_promised_order() -> None:
    lines = re.findall(r"^  - (?!override )(\w+)", (CONF / "train.yaml").read_text(), flags=re.MULTILINE)
    assert lines[0] == "_self_"
    assert lines[1:] == [group for group in ORDER.split() if group in lines]
    assert set(lines[1:]) == {folder.name for folder in CONF.iterdir() if folder.is_dir()}


@pytest.mark.slow
def test_command_line_beats_experiment_beats_task_beats_group_file(tmp_path: Path) -> None:
    task, experiment = tmp_path / "task" / "mine.yaml", tmp_path / "experiment" / "mine.yaml"
    for file, lr, model in ((task, 0.5, "gpt2_small"), (experiment, 0.25, "gpt2_medium")):
        file.parent.mkdir()
        file.write_text(
            f"# @package _global_\ndefaults:\n  - override /model: {model}\n"
            "task:\n  _target_: llm_lightning.tasks.pretraining.PretrainingModule\n"
            f"monitor: val/loss\noptimizer:\n  lr: {lr}\n"
        )
    argv = ["--config-dir", str(tmp_path)]
    steps = [[], ["task=mine"], ["experiment=mine"], ["optimizer.lr=0.125", "model=nano"]]
    found = []
    for step in steps:
        argv = [*argv, *step]
        config = check_overrides(argv, CONF)
        found.append((config.optimizer.lr, config.model.n_layer))
    group_file = (composed().optimizer.lr, composed().model.n_layer)
    assert found == [group_file, (0.5, 12), (0.25, 24), (0.125, group_file[1])]


def test_the_run_folder_is_named_by_task_and_run() -> None:
    assert composed(hydra=True).hydra.run._get_node("dir")._value() == (
        "outputs/${hydra:runtime.choices.task}/${run_folder:${run_name}}"
    )
    prepare_hydra()
    assert OmegaConf.create({"x": "${run_folder:first}"}).x == "first"
    assert OmegaConf.create({"x": "${run_folder:7}"}).x == "7"
    unnamed = OmegaConf.create({"x": "${run_folder:null}", "y": "${run_folder:null}"})
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_[0-9a-f]{8}", unnamed.x)
    assert unnamed.x == unnamed.y, "every process of a run sees the same folder"


@pytest.mark.slow
def test_two_runs_of_the_same_second_have_two_folders() -> None:
    code = (
        "from llm_lightning.experiments.settings.compose import prepare_hydra as r; r();"
        "from omegaconf import OmegaConf; print(OmegaConf.create({'x': '${run_folder:null}'}).x[-4:])"
    )
    runs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert len({run.communicate()[0] for run in runs}) > 1


# --- what the configs build ----------------------------------------------------------------------------------------

SIZES = {  # (tokens, parameters) as released
    "nano": (2048, 1_071_872),
    "nano_llama": (2048, 988_288),
    "gpt2_small": (50257, 124_439_808),
    "gpt2_medium": (50257, 354_823_168),
    "gpt2_large": (50257, 774_030_080),
    "gpt2_xl": (50257, 1_557_611_200),
    "smollm2_135m": (49152, 134_515_008),
    "smollm2_360m": (49152, 361_821_120),
    "qwen2_5_0_5b": (151936, 494_032_768),
    "qwen3_0_6b": (151936, 596_049_920),
    "llama3_2_1b": (128256, 1_235_814_400),
}


@pytest.mark.parametrize("name", group_options(CONF, "model"))
def test_models_have_the_published_number_of_parameters(name: str) -> None:
    import torch

    model = plain(composed(f"model={name}"))["model"]
    fields = {key: value for key, value in model.items() if key in GPTConfig.__dataclass_fields__}
    vocabulary, parameters = SIZES[name]
    config = GPTConfig(**{**fields, "vocab_size": vocabulary})
    with torch.device("meta"):
        built = GPT(config, init=model["init"])
    assert built.num_parameters() == parameter_count(config) == parameters


@pytest.mark.parametrize("words", [*([f"model={name}"] for name in group_options(CONF, "model")), ["init_from=x"]])
def test_model_keys_are_those_of_gpt_config(words: list[str]) -> None:
    config = check_overrides(words, CONF)
    assert set(config.model) - {"dropout", "init", "activation_checkpointing"} == set(GPTConfig.__dataclass_fields__)


def test_files_of_gpt2_say_what_a_header_without_a_field_means() -> None:
    fields = {name: field.default for name, field in GPTConfig.__dataclass_fields__.items()}
    model = plain(composed())["model"]
    assert {f"model.{name}" for name in ("norm", "n_kv_head", "mlp_bias")} < set(ADDED)
    for key, value in ADDED.items():
        assert fields[key.removeprefix("model.")] == model[key.removeprefix("model.")] == value


def test_one_dropout_sets_all_three() -> None:
    model = composed("model.dropout=0.3", "model.attention_dropout=0.1").model
    assert (model.embedding_dropout, model.attention_dropout, model.residual_dropout) == (0.3, 0.1, 0.3)


@pytest.mark.slow
def test_our_optimizers_and_schedules_build() -> None:
    config = composed()
    assert isinstance(build_optimizer(rated(config)), AdamWConfig)
    assert isinstance(instantiate(config.scheduler), WarmupCosineConfig)
    assert isinstance(instantiate(composed("scheduler=constant").scheduler), ConstantConfig)
    assert set(config.optimizer) - {"_target_", "rates"} == set(AdamWConfig.__dataclass_fields__)
    muon = composed("optimizer=muon").optimizer
    assert set(muon) - {"_target_", "rates"} == set(MuonConfig.__dataclass_fields__)
    for name in group_options(CONF, "scheduler"):
        scheduler = composed(f"scheduler={name}").scheduler
        assert set(scheduler) - {"_target_"} == set(getattr(instantiate(scheduler), "__dataclass_fields__", ()))


def rated(config: DictConfig) -> dict[str, Any]:
    """The settings of the optimizer as a run of nano in pretraining has them."""
    node = plain(config)["optimizer"]
    table = node.pop("rates", None)
    return node | ({"lr": table["pretraining"][0]} if node["lr"] == "auto" else {})


def test_sgd_and_classes_of_torch_optim_build() -> None:
    sgd = build_optimizer(rated(composed("optimizer=sgd")))
    assert sgd == TorchOptimConfig(
        lr=0.3, optimizer=SGD, arguments={"momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}
    )
    typed = ["optimizer=torch", "optimizer._target_=torch.optim.NAdam", "+optimizer.momentum_decay=1e-2"]
    nadam = build_optimizer(rated(composed(*typed)))
    assert nadam == TorchOptimConfig(lr=3e-3, optimizer=NAdam, arguments={"momentum_decay": 1e-2})


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        (["optimizer=torch"], "optimizer._target_ has no default"),
        (["optimizer=sgd", "+optimizer.momentun=0.9"], "unknown key 'optimizer.momentun'; did you mean"),
        (["optimizer=sgd", "optimizer.betas=[0.9,0.95]"], "optimizer.betas is a setting of optimizer=adamw"),
        (["scheduler=linear", "scheduler.decay=0.2"], "scheduler.decay is a setting of scheduler=wsd"),
        (["optimizer=muon", "optimizer.adamw_lr=high"], "optimizer.adamw_lr='high' must be a number"),
    ],
)
def test_wrong_settings_of_optimizers_and_schedules_are_named(words: list[str], refusal: str) -> None:
    with pytest.raises(ValueError, match=re.escape(refusal)):
        check_overrides(words, CONF)


def test_callbacks_and_loggers_build(tmp_path: Path) -> None:
    import lightning as L
    from lightning.pytorch.loggers import Logger

    config = copy.deepcopy(composed("callbacks=early_stopping", "task=sft"))
    names = {"checkpoints", "samples", "throughput", "plots", "watchdog", "early_stopping", "responses"}
    assert set(config.callbacks) == names
    settings: Any = OmegaConf.to_container(config, resolve=True)
    fill_modes(settings)
    for node in settings["callbacks"].values():
        assert isinstance(instantiate(node), L.Callback)
    for node in config.logger.values():
        assert isinstance(instantiate(node, run_dir=tmp_path, resumed_step=0), Logger)
    assert config.callbacks.early_stopping.monitor == config.callbacks.checkpoints.monitor == config.monitor


@pytest.mark.parametrize("name", group_options(CONF, "accelerator"))
def test_every_key_of_the_trainer_is_an_argument_of_lightnings(name: str) -> None:
    import inspect

    import lightning as L

    trainer = composed(f"accelerator={name}").trainer
    assert set(trainer) - {"_target_"} <= set(inspect.signature(L.Trainer).parameters)
    if OmegaConf.is_config(trainer.strategy):
        assert type(instantiate(trainer.strategy)).__name__ == "ShardedStrategy"


def test_data_keys_are_arguments_of_the_data_module(tmp_path: Path) -> None:
    import inspect

    from llm_lightning.data.base import BaseDataModule
    from llm_lightning.data.pretraining import PretrainingDataModule

    known = set(inspect.signature(PretrainingDataModule).parameters) | set(inspect.signature(BaseDataModule).parameters)
    assert set(composed().data) - {"_target_", "preview"} <= known


@pytest.mark.parametrize(
    ("words", "is_shared"),
    [
        (["task=sft", "model.dropout=0"], True),
        (["task=sft", "model.dropout=0.1"], False),
        (["task=sft", "model.dropout=0.1", "model.attention_dropout=0", "model.embedding_dropout=0"], False),
        (["task=lora", "model.dropout=0"], True),
        (["task=lora", "model.dropout=0", "lora.dropout=0.1"], False),
        (["task=dpo", "model.dropout=0"], True),
    ],
)
def test_a_shared_prefix_is_packed_once_unless_there_is_dropout(words: list[str], is_shared: bool) -> None:
    from llm_lightning.data.conversations import ConversationDataModule
    from llm_lightning.experiments.build import build_datamodule, choose_tokenizer
    from llm_lightning.experiments.settings.nodes import plain

    settings = plain(composed(*words, "tokenizer=byte", "model.context_length=600"))
    data = build_datamodule(settings, choose_tokenizer(settings), settings["data"])
    assert isinstance(data, ConversationDataModule)
    assert data.share_prefix == is_shared


# --- the book's recipes --------------------------------------------------------------------------------------------


def test_chapter_5_is_the_books_recipe() -> None:
    config = composed("experiment=book/ch05")
    model = {"n_layer": 12, "n_embd": 768, "context_length": 256, "dropout": 0.1, "qkv_bias": False, "init": "torch"}
    assert {key: config.model[key] for key in model} == model
    fields = {key: value for key, value in config.model.items() if key in GPTConfig.__dataclass_fields__}
    assert _parameters(fields) == 162_419_712
    data = {"split": "character", "stride": 256, "batch_size": 2, "drop_last": True, "last_window": "drop"}
    assert {key: config.data[key] for key in data} == data
    assert build_optimizer(rated(config)) == AdamWConfig(
        lr=4e-4, betas=[0.9, 0.999], eps=1e-8, weight_decay=0.1, decay="all", max_grad_norm=None
    )
    assert isinstance(instantiate(config.scheduler), ConstantConfig)
    trainer = {"max_epochs": 10, "precision": "32-true", "val_check_interval": 5}
    assert {key: config.trainer[key] for key in trainer} == trainer
    assert (config.seed, config.tokenizer.name, config.data.name) == (123, "gpt2", "the_verdict")


def _parameters(fields: dict) -> int:
    import torch

    with torch.device("meta"):
        return GPT(GPTConfig(**{**fields, "vocab_size": 50257})).num_parameters()


def test_appendix_d_differs_from_chapter_5_in_schedule_clipping_length_and_seed_only() -> None:
    from llm_lightning.experiments.settings.changes import diff_configs

    old, new = (OmegaConf.to_container(composed(f"experiment=book/{name}")) for name in ("ch05", "appendix_d"))
    changed = {key: value for key, _, value in diff_configs(old, new) if not key.startswith("scheduler.")}
    assert changed == {
        "seed": 2,
        "optimizer.lr": 1e-3,
        "optimizer.max_grad_norm": 1.0,
        "optimizer.clip_after_warmup": True,
        "trainer.max_epochs": 15,
        "data.eval_batches": 1,
    }


@pytest.mark.parametrize(("step", "lr"), [(0, 1e-5), (26, 9.633333e-4), (27, 1e-3), (134, 1.0209e-5)])
def test_appendix_d_has_the_books_learning_rates(step: int, lr: float) -> None:
    config = composed("experiment=book/appendix_d")
    assert instantiate(config.scheduler).lr_at(step, config.optimizer.lr, 135) == pytest.approx(lr, rel=1e-4)


# --- comments and help ---------------------------------------------------------------------------------------------


def test_every_file_begins_with_what_it_is_and_the_command_that_uses_it() -> None:
    for file in FILES:
        lines = [line for line in file.read_text().splitlines() if not line.startswith("# @package")]
        head = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
        assert head, f"{file}: no comment"
        assert head[0].endswith((".", "?")), f"{file}: the first line is a sentence: help shows it"
        group, _, option = relative(file).removesuffix(".yaml").partition("/")
        patterns = ["python train.py" if group == "train" else f"python train.py .*{group}={option}"]
        if group in ("data", "trainer", "optimizer"):  # the only option: its keys
            patterns.append(f"python train.py {group}.")
        if option == "default":
            patterns.append(f"python train.py {group}")
        assert any(re.search(pattern, line) for line in head for pattern in patterns), f"{file}: no command"


@pytest.mark.parametrize("group", [group for group in GROUPS if group not in PRESETS])
def test_every_key_has_a_sentence(group: str) -> None:
    for name in group_files(CONF, group):
        for setting in read_settings(CONF / group / f"{name}.yaml", group):
            if setting.value and not setting.path.endswith("_target_"):
                assert setting.sentence.endswith("."), f"{name}: {setting.path} {setting.sentence!r}"


def test_help_lists_every_group_option_and_key_with_its_value() -> None:
    text = help_text(["--help"], CONF)
    assert text is not None
    words = re.split(r"[\s*]+", text)
    for group in GROUPS:
        assert group in words
        assert set(group_options(CONF, group)) <= {word.removeprefix(f"{group}=") for word in words}
    leaves = _leaf_keys(OmegaConf.to_container(composed()))
    assert not [key for key in leaves if f"  {key}=" not in text and not key.endswith("_target_")]


def _leaf_keys(node: dict, path: str = "") -> list[str]:
    found = []
    for key, value in node.items():
        found += _leaf_keys(value, f"{path}{key}.") if isinstance(value, dict) else [f"{path}{key}"]
    return found


def test_help_of_a_group_shows_the_keys_of_every_option() -> None:
    text = help_text(["--help", "scheduler"], CONF)
    assert text is not None
    assert "scheduler=constant: The same learning rate at every step." in text
    assert "scheduler.warmup=0.1" in text


def test_help_of_sweeps_shows_what_they_vary_their_jobs_and_the_settings_of_every_sweep() -> None:
    text = help_text(["--help", "sweep"], CONF)
    assert text is not None
    assert "sweep=lr_by_warmup: " in text
    assert re.search(r"^  optimizer\.lr=1e-3,3e-3,\S+", text, flags=re.MULTILINE)
    assert re.search(r"^  job 02_first_token task\.pooling=first +78\.46 / ", text, flags=re.MULTILINE)
    assert re.search(r"^      trainer\.val_check_interval=400 +50 steps\.$", text, flags=re.MULTILINE)
    assert "mode=" not in text
    every = help_text(["--help"], CONF)
    assert every is not None
    for setting in ("max_jobs=1000", "retry_failed=false", "only=null", "jobs_per_gpu=1"):
        assert re.search(rf"^  hydra\.sweeper\.{setting} +[A-Z].*\.$", text, flags=re.MULTILINE)
        assert f"  hydra.sweeper.{setting} " in every


def test_keys_that_options_share_are_shown_with_each_and_their_file_is_no_option() -> None:
    text = help_text(["--help", "data"], CONF)
    assert text is not None
    assert text.count("  data.max_dropped=0.05 ") == 2
    assert "data=_conversation" not in text
    with pytest.raises(ValueError, match="data=_conversation: no such option"):
        check_overrides(["data=_conversation"], CONF)


def test_help_of_no_group_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="--help optimzer: no such group; did you mean 'optimizer'"):
        help_text(["--help", "optimzer"], CONF)


def test_no_help_where_none_is_asked() -> None:
    assert help_text(["model=nano"], CONF) is None


def test_comments_are_read_beside_and_above_the_key(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(
        '# What it is.\ndefaults:\n  - a\n  - _self_ # note\n\nword: "a b" # Beside.\n'
        "# Above,\n# in two lines.\nnode:\n  inner: [1, 2] # Inner.\n  plain: 3\nlast: ${word}\n"
    )
    assert [(s.path, s.value, s.sentence) for s in read_settings(file, "group")] == [
        ("group.word", '"a b"', "Beside."),
        ("group.node", "", "Above, in two lines."),
        ("group.node.inner", "[1, 2]", "Inner."),
        ("group.node.plain", "3", ""),
        ("group.last", "${word}", ""),
    ]


def test_help_needs_neither_torch_nor_hydra() -> None:
    code = (
        "import sys; from pathlib import Path; from llm_lightning.experiments.settings.help import help_text;"
        f"help_text(['--help'], Path({str(CONF)!r}));"
        "print({'torch', 'lightning', 'hydra', 'omegaconf'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
