"""Every wrong setting ends in one line that names the right one; a `_target_` is a class of ours or of few others."""

from __future__ import annotations

import fnmatch
import importlib
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf

from llm_lightning.experiments.command_line import continue_run
from llm_lightning.experiments.run_records import COMMAND
from llm_lightning.experiments.settings.changes import LAYOUT, MAY_CHANGE, diff_configs, refuse_changes
from llm_lightning.experiments.settings.checks import check_overrides, checked_settings
from llm_lightning.experiments.settings.compose import LAUNCHERS, config_dirs, prepare_hydra
from llm_lightning.experiments.settings.targets import check_targets, resolve_target
from llm_lightning.experiments.settings.yaml_files import read_settings
from llm_lightning.experiments.sweep.words import list_jobs

CONF = Path(__file__).parents[2] / "conf"

# (command line, what the one line must say)
WRONG = [
    ("optimizer.lrr=1", "unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'?"),
    ("+optimizer.lrr=1", "unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'?"),
    ("++optimizer.lrr=1", "unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'?"),
    ("optimzer=adamw", "unknown key 'optimzer'; did you mean 'optimizer'?"),
    ("optimzer.lr=1", "unknown key 'optimzer'; did you mean 'optimizer'?"),
    ("+lr=1", "unknown key 'lr'; did you mean 'optimizer.lr'?"),
    ("seed.x=1", "unknown key 'seed.x'; did you mean 'seed'?"),
    ("+data.batch_sise=3", "unknown key 'data.batch_sise'; did you mean 'data.batch_size'?"),
    ("+callbacks.samples.promts=[a]", "did you mean 'callbacks.samples.prompts'?"),
    ("+trainer.limit_test_batchez=2", "did you mean 'trainer.limit_test_batches'?"),
    ("trainer.limit_test_batches=2", "write +trainer.limit_test_batches=2"),
    ("hydra.runn.dir=x", "unknown key 'hydra.runn.dir'"),
    ("model=nanno", "model=nanno: no such option; did you mean 'nano'?"),
    ("hydra/launcher=basix", "hydra/launcher=basix: no such option (basic"),
    ("experiment=ch05", "did you mean 'book/ch05'?"),
    ("model=[nano,nanno]", "model=nanno: no such option"),
    ("-m model=nano,nanno", "model=nanno: no such option; did you mean 'nano'?"),
    ("-m tokenizer=choice(byte,wrd)", "tokenizer=wrd: no such option; did you mean 'word'?"),
    ("-m model=glob(x*)", "has no values"),
    ("-m data.batch_size=1,many", "data.batch_size='many' must be a number"),
    ("optimizer.lr=1,2", "several values: add -m"),
    ("data.path=a.txt,b.txt", """write a list ('KEY=[A,B]'), or quote it twice ('KEY="A,B"')"""),
    ("data.path=a(1).txt", """quote a value with any of ()=,;'"{}[] twice: 'KEY="VALUE"'"""),
    ("optimizer.lr=[1,", "cannot read 'optimizer.lr=[1,'"),
    ("optimizer", "cannot read 'optimizer'"),
    ("--bogus", "unrecognized arguments: --bogus"),
    ("--config-dir nowhere", "--config-dir nowhere: no such folder"),
    ("--experimental-rerun x.pickle", "reads a pickle"),
    ("--config-path nowhere", "use --config-dir"),
    ("+trainer.gradient_clip_val=1", "trainer.gradient_clip_val would have no effect; set optimizer.max_grad_norm"),
    ("trainer.strategy=ddp_spawn", "trainer.strategy=ddp_spawn trains in processes that return nothing; use ddp"),
    ("trainer.strategy=ddp_notebook_find_unused_parameters_true", "return nothing; use ddp"),
    ("trainer.strategy=ddp_fork", "return nothing; use ddp"),
    ("tokenizer=tiktoken", "tokenizer.name has no default: add tokenizer.name=VALUE"),
    ("optimizer.lr=fast", "optimizer.lr='fast' must be a number"),
    ("compile=flase", "compile='flase' must be true or false"),
    ("data.batch_size=1.5", "data.batch_size=1.5 must be a whole number"),
    ("run_name=../x", "run_name='../x' names a folder"),
    ("~optimizer.lr", "cannot be removed"),
    ("~logger", "cannot be removed"),
    ("~callbacks.samplez", "callbacks.samplez"),
    ("seed=${nothing}", "nothing"),
    ("+callbacks.x={_target_:os.system,command:ls}", "callbacks.x._target_='os.system' is not allowed"),
    ("callbacks.samples._target_=builtins.print", "callbacks.samples._target_='builtins.print' is not allowed"),
    ("hydra.sweeper._target_=os.system", "hydra.sweeper._target_='os.system' is not allowed"),
]


@pytest.mark.parametrize(("command", "message"), WRONG, ids=[command for command, _ in WRONG])
def test_a_wrong_command_line_is_refused_in_one_line(command: str, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        check_all(shlex.split(command))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def check_all(words: list[str]) -> None:
    """Check a run, or every job of a multirun."""
    check_overrides(words, CONF)
    if words[:1] == ["-m"]:
        for job in list_jobs({"max_jobs": 1000}, words[1:], config_dirs(None, CONF)):
            check_overrides(job.words, CONF)


RIGHT = [
    "",
    "model=gpt2_small tokenizer=gpt2 optimizer.lr=6e-4 run_name=first",
    "+trainer.limit_test_batches=2 +trainer.profiler=simple trainer.deterministic=warn trainer.devices=auto",
    "+callbacks.lr._target_=lightning.pytorch.callbacks.LearningRateMonitor +callbacks.lr.logging_interval=step",
    "trainer.strategy={_target_:lightning.pytorch.strategies.DDPStrategy,find_unused_parameters:true}",
    "callbacks.samples=null ~callbacks.plots optimizer.max_grad_norm=null",
    """'data.path="a.txt,b.txt"'""",
    "'data.path=[a.txt,b.txt]'",
    """'data.path="a(1)=b.txt"'""",
    'hydra.run.dir="/tmp/a b" hydra.job.name=train_ddp_process_1 hydra.output_subdir=null',
    "-m optimizer.lr=1e-3,1e-4 data.batch_size=range(1,3) tokenizer=choice(byte,word) model=glob(n*)",
]


@pytest.mark.parametrize("command", RIGHT)
def test_a_right_command_line_passes(command: str) -> None:
    check_all(shlex.split(command))


def test_a_launcher_that_is_not_installed_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_hydra()
    Plugins.instance()  # registers what is installed
    launchers = ConfigStore.instance().repo["hydra"]["launcher"]
    for name in LAUNCHERS:
        monkeypatch.delitem(launchers, f"{name}.yaml", raising=False)
        with pytest.raises(ValueError, match=rf"hydra/launcher={name} is not installed: pip install .*\[sweep\]"):
            checked_settings([f"hydra/launcher={name}"], CONF)


def test_the_config_of_the_run_is_returned() -> None:
    assert check_overrides(["optimizer.lr=0.5", "+trainer.profiler=simple"], CONF).optimizer.lr == 0.5


# (what the experiment file says below its header, what the one line must say)
WRONG_FILES = [
    ("optimizer: {lrr: 3}", "unknown key 'optimizer.lrr' in {file}; did you mean 'optimizer.lr'?"),
    ("optimzer: {lr: 3}", "unknown key 'optimzer' in {file}; did you mean 'optimizer'?"),
    ("trainer: {limit_test_batchez: 3}", "unknown key 'trainer.limit_test_batchez' in {file}"),
    ("defaults:\n  - override /optimzer: adamw", "unknown group 'optimzer' in experiment/mine.yaml"),
    ("defaults:\n  - override /model: nanno", "model=nanno: no such option; did you mean 'nano'?"),
    ("optimizer: {lr: fast}", "optimizer.lr='fast' in {file} must be a number"),
    ("optimizer: [1", "{file}"),
    ("allow_targets: [os]", "allow_targets lets code run"),
    ("callbacks: {x: {_target_: os.system}}", "callbacks.x._target_='os.system' is not allowed"),
    ("callbacks: {samples: '${oc.create:{_target_:os.system}}'}", "callbacks.samples._target_='os.system' is not"),
    ("hydra: {callbacks: {x: {_target_: os.system}}}", "hydra.callbacks.x._target_='os.system' is not allowed"),
    ("hydra: {job_logging: {handlers: {x: {class: logging.os.system}}}}", "handlers.x.class='logging.os.system'"),
    ("hydra: {job_logging: {formatters: {x: {(): os.system}}}}", "formatters.x.()='os.system'"),
]


@pytest.mark.parametrize(("text", "message"), WRONG_FILES, ids=[text for text, _ in WRONG_FILES])
def test_a_wrong_experiment_file_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "experiment" / "mine.yaml"
    file.parent.mkdir()
    file.write_text(f"# @package _global_\n{text}\n")
    with pytest.raises(ValueError, match=r".") as error:
        check_overrides(["--config-dir", str(tmp_path), "experiment=mine"], CONF)
    assert message.format(file=file) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_right_experiment_file_of_the_users_own_passes(tmp_path: Path) -> None:
    folder = tmp_path / "my configs, old"
    (folder / "experiment").mkdir(parents=True)
    (folder / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /model: gpt2_small\noptimizer: {lr: 0.25}\n"
    )
    config = check_overrides(["--config-dir", str(folder), "experiment=mine"], CONF)
    assert (config.model.n_embd, config.optimizer.lr) == (768, 0.25)


# --- targets -------------------------------------------------------------------------------------------------------

BUILTINS = "eval exec open print compile __import__ getattr setattr input breakpoint exit globals vars type object"
STANDARD_LIBRARY = """
    os.system os.popen os.remove os.rmdir os.execv os.fork os.kill os.putenv os.rename os.chmod os.makedirs os._exit
    posix.system pty.spawn platform.popen
    subprocess.run subprocess.call subprocess.Popen subprocess.check_output subprocess.getoutput
    shutil.rmtree shutil.copy shutil.move pathlib.Path pathlib.Path.touch pathlib.Path.unlink io.open codecs.open
    tempfile.NamedTemporaryFile glob.glob sys.exit sys.setrecursionlit code.interact runpy.run_path runpy.run_module
    importlib.import_module importlib.reload pickle.load pickle.loads pickle.Unpickler marshal.loads shelve.open
    socket.socket socket.create_connection urllib.request.urlopen urllib.request.urlretrieve http.client.HTTPConnection
    ftplib.FTP smtplib.SMTP webbrowser.open ctypes.CDLL ctypes.cdll.LoadLibrary multiprocessing.Process
    threading.Thread asyncio.run timeit.timeit timeit.main cProfile.run pdb.run trace.Trace doctest.testfile
    functools.partial operator.attrgetter operator.methodcaller types.FunctionType types.CodeType
    logging.os.system logging.config.dictConfig zipfile.ZipFile tarfile.open sqlite3.connect atexit.register
    signal.signal gc.get_objects inspect.getsource ast.literal_eval json.load yaml.load yaml.unsafe_load
    numpy.load numpy.save numpy.fromfile numpy.ctypeslib.load_library
    omegaconf.OmegaConf.load hydra.utils.instantiate hydra.utils.get_method hydra.utils.call
    transformers.pipeline datasets.load_dataset fsspec.open setuptools.setup pip.main antigravity.geohash
"""
ALIASES = """
    torch.os.system torch.sys.exit torch.ctypes.CDLL torch.importlib.import_module torch.builtins.eval
    torch.serialization.os.system torch.serialization.os.remove torch.serialization.shutil.rmtree
    torch.serialization.pickle.loads torch.serialization.tarfile.open torch.serialization.tempfile.NamedTemporaryFile
    torch.serialization.sys.exit torch.serialization.threading.Thread torch.serialization.io.open
    torch.hub.os.system torch.hub.shutil.rmtree torch.hub.urlopen torch.hub.zipfile.ZipFile torch.hub.sys.exit
    torch.hub.tempfile.NamedTemporaryFile torch.hub.Path torch.hub.re.compile
    torch.utils.data.dataloader.os.system torch.utils.data.dataloader.threading.Thread
    torch.utils.data.dataloader.python_multiprocessing.Process torch.utils.collect_env.subprocess.run
    torch.utils.collect_env.subprocess.Popen torch.utils.collect_env.os.popen torch.utils.cpp_extension.subprocess.run
    torch.utils.cpp_extension.os.system torch.multiprocessing.Process torch.multiprocessing.Pool
    torch.distributed.run.os.system torch.distributed.rendezvous.sys.exit
    torch.package.package_importer.io.open
    torch.nn.functional.importlib.import_module torch.functional.operator.methodcaller
    torch.random.warnings.warn torch.distributed.rendezvous.os.remove lightning.pytorch.core.saving.csv.writer
    lightning.pytorch.trainer.trainer.os.system lightning.pytorch.trainer.trainer.math.sqrt
    lightning.pytorch.callbacks.model_checkpoint.os.remove lightning.pytorch.callbacks.model_checkpoint.shutil.rmtree
    lightning.pytorch.loggers.csv_logs.os.system lightning.pytorch.utilities.model_helpers.os.system
    lightning.fabric.strategies.launchers.subprocess_script.subprocess.Popen
    lightning.fabric.strategies.launchers.subprocess_script.os.system lightning.fabric.utilities.cloud_io.fsspec.open
    lightning.fabric.plugins.io.torch_io.os.remove lightning.pytorch.core.saving.yaml.load
    lightning.pytorch.core.saving.os.system lightning.pytorch.cli.sys.exit torchmetrics.utilities.imports.sys.exit
    llm_lightning.weights.checkpoint.os.remove llm_lightning.files.download.os.system
    llm_lightning.experiments.launch.subprocess.run
    llm_lightning.experiments.settings.checks.importlib.import_module llm_lightning.experiments.settings.checks.Path
    llm_lightning.experiments.settings.checks.compose
"""
NOT_A_KIND = """
    torch.load torch.save torch.compile torch.from_file torch.hub.load torch.hub.download_url_to_file torch.jit.load
    torch.jit.script torch.ops.load_library torch.classes.load_library torch.utils.cpp_extension.load
    torch.utils.cpp_extension.load_inline torch.package.PackageImporter torch.nn.Module torch.nn.Linear
    torch.optim.lr_scheduler.LambdaLR torch.optim torch.utils.data.DataLoader torch.serialization.load
    torch.distributed.init_process_group
    torch.distributed.checkpoint.load torch.distributed.nn.RemoteModule torch.jit.CompilationUnit torch.Tensor
    torch.nn torch lightning.Trainer.fit lightning.pytorch.cli.LightningCLI lightning.Fabric lightning.seed_everything
    lightning.fabric.utilities.cloud_io._load lightning.pytorch.core.saving._load_state torchmetrics.functional.accuracy
    llm_lightning.weights.checkpoint.save llm_lightning.weights.checkpoint.load llm_lightning.files.download.download
    llm_lightning.inference.generation.generate llm_lightning.models.gpt.GPT llm_lightning.models.gpt llm_lightning
    llm_lightning.tokenizers.build.build_tokenizer llm_lightning.experiments.launch.main
"""
DISGUISES = [
    "оs.system",  # Cyrillic o  # noqa: RUF001
    "tоrch.load",  # noqa: RUF001
    "lіghtning.Trainer",  # Cyrillic i  # noqa: RUF001
    "ｌightning.Trainer",  # full width  # noqa: RUF001
    "lightning․Trainer",  # one dot leader  # noqa: RUF001
    "lightning.Trainer\u200b",
    "lightning.Trainer ",
    " lightning.Trainer",
    "lightning.Trainer\n",
    "lightning..Trainer",
    ".lightning.Trainer",
    "lightning.Trainer.",
    "lightning.Trainer()",
    "lightning/Trainer",
    "lightning:Trainer",
    "lightning_evil.Trainer",
    "lightning-evil.Trainer",
    "torchevil.load",
    "llm_lightning_evil.Trainer",
    "lightning.Trainer.__init__",
    "lightning.Trainer.__subclasses__",
    "lightning.Trainer.__class__",
    "lightning.Trainer.__init__.__globals__",
    "torch.__builtins__.eval",
    "torch.serialization.__loader__.load_module",
    "lightning.__main__.main",
    "lightning.Nowhere",
    "lightning.nowhere.Trainer",
    "",
    "eval",
    None,
    3,
    True,
    ["os.system"],
    {"os": "system"},
]
REFUSED = [
    *(f"builtins.{name}" for name in BUILTINS.split()),
    *STANDARD_LIBRARY.split(),
    *ALIASES.split(),
    *NOT_A_KIND.split(),
    *DISGUISES,
]


def test_there_are_200_strings_and_the_aliases_are_real() -> None:
    assert len(REFUSED) >= 200
    real = [name for name in ALIASES.split() if _exists(name)]
    assert len(real) > 0.8 * len(ALIASES.split())


def _exists(target: str) -> bool:
    found, names = None, target.split(".")
    for end, name in enumerate(names, start=1):
        try:
            found = getattr(found, name) if hasattr(found, name) else importlib.import_module(".".join(names[:end]))
        except Exception:
            return False
    return True


def test_a_foreign_target_is_refused_and_the_key_is_named() -> None:
    wrong = []
    for target in REFUSED:
        try:
            check_targets({"callbacks": {"x": {"_target_": target}}})
            wrong.append(f"{target!r} is allowed")
        except ValueError as error:
            if "callbacks.x._target_" not in str(error) or "\n" in str(error).replace(repr(target), ""):
                wrong.append(f"{target!r}: {error}")
    assert not wrong, "\n".join(wrong)


HIDDEN = [
    {"callbacks": {"x": {"_target_": "lightning.pytorch.callbacks.LambdaCallback", "on_fit_start": "PAYLOAD"}}},
    {"callbacks": [{"a": 1}, {"deep": ["PAYLOAD"]}]},
    {"trainer": {"_target_": "lightning.Trainer", "_args_": [["PAYLOAD"]]}},
    {"trainer": {"_target_": "lightning.Trainer", "plugins": ["PAYLOAD"]}},
    {"data": {"anything": {"at": {"any": {"depth": "PAYLOAD"}}}}},
]


@pytest.mark.parametrize("partial", [False, True])
def test_a_target_is_found_wherever_it_hides(partial: bool) -> None:
    payload = {"_target_": "os.system", "_args_": ["echo"], "_partial_": partial}
    for config in HIDDEN:
        with pytest.raises(ValueError, match=r"_target_='os.system' is not allowed"):
            check_targets(_replace(config, payload))


def _replace(node: object, payload: dict) -> object:
    if isinstance(node, dict):
        return {key: _replace(value, payload) for key, value in node.items()}
    if isinstance(node, list):
        return [_replace(value, payload) for value in node]
    return payload if node == "PAYLOAD" else node


def test_a_target_made_by_an_interpolation_is_refused() -> None:
    config = OmegaConf.create({"word": "system", "x": {"_target_": "os.${word}"}})
    with pytest.raises(ValueError, match=r"x\._target_='os.system' is not allowed"):
        check_targets(config)


ALLOWED = [
    "lightning.Trainer",
    "lightning.pytorch.strategies.DDPStrategy",
    "lightning.pytorch.strategies.ModelParallelStrategy",
    "lightning.pytorch.callbacks.EarlyStopping",
    "lightning.pytorch.loggers.CSVLogger",
    "lightning.pytorch.profilers.SimpleProfiler",
    "lightning.pytorch.plugins.environments.SLURMEnvironment",
    "torchmetrics.classification.BinaryAccuracy",
    "llm_lightning.optim.adamw.AdamWConfig",
    "torch.optim.NAdam",
    "llm_lightning.tasks.pretraining.PretrainingModule",
    "llm_lightning.data.pretraining.PretrainingDataModule",
    "llm_lightning.callbacks.checkpoints.Checkpoints",
]


@pytest.mark.parametrize("target", ALLOWED)
def test_what_a_config_may_build(target: str) -> None:
    assert resolve_target("x._target_", target).__name__ == target.rpartition(".")[2]


def test_one_setting_allows_a_package_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_package.py").write_text(
        "import os\nclass Mine:\n    def __init__(self, size): ...\ndef make(): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"add allow_targets=\[PACKAGE\]"):
        check_overrides(["+callbacks.x._target_=my_package.Mine"], CONF)
    mine = ["+callbacks.x._target_=my_package.Mine", "allow_targets=[my_package]"]
    check_overrides([*mine, "+callbacks.x.size=3"], CONF)
    with pytest.raises(ValueError, match=r"did you mean 'callbacks.x.size'"):
        check_overrides([*mine, "+callbacks.x.sise=3"], CONF)
    check_targets({"x": {"_target_": "my_package.make"}}, ["my_package"])
    with pytest.raises(ValueError, match="is not allowed"):
        check_targets({"x": {"_target_": "my_package.os.system"}}, ["my_package"])


def test_no_file_of_the_users_folder_allows_a_package(tmp_path: Path) -> None:
    for group, header in (("optimizer", "defaults: [adamw]"), ("experiment", "seed: 1"), ("logger", "csv: null")):
        folder = tmp_path / group
        (folder / group).mkdir(parents=True)
        (folder / group / "mine.yaml").write_text(f"# @package _global_\n{header}\nallow_targets: [shutil]\n")
        with pytest.raises(ValueError, match="allow_targets lets code run: set it on the command line"):
            check_overrides(["--config-dir", str(folder), f"{group}=mine"], CONF)


@pytest.mark.parametrize("word", ["allow_targets=[shutil]", "++allow_targets=[shutil]", "+allow_targets=[shutil]"])
def test_resume_does_not_take_over_what_a_folder_allows(tmp_path: Path, word: str) -> None:
    target = "+callbacks.x._target_=shutil.rmtree"
    recorded = {"folder": str(tmp_path / "gone"), "config_dir": None, "overrides": [target, "seed=3", word]}
    (tmp_path / COMMAND).write_text(json.dumps(recorded))
    with pytest.raises(
        ValueError, match=r"command.json asks for .*shutil.rmtree \(.*allow_targets=\[shutil\] \(lets code"
    ):
        continue_run([f"resume={tmp_path}"], CONF)
    continued = continue_run([f"resume={tmp_path}", target, "allow_targets=[]"], CONF)
    assert continued == ["seed=3", target, "allow_targets=[]", f"resume='{tmp_path}'", f"hydra.run.dir='{tmp_path}'"]
    with pytest.raises(ValueError, match=r"'shutil.rmtree' is not allowed.*add allow_targets=\[PACKAGE\]"):
        check_overrides(continued, CONF)
    trusted = [target, "+callbacks.x.path=x", "allow_targets=[shutil]"]
    check_overrides(continue_run([f"resume={tmp_path}", *trusted], CONF), CONF)


# --- resume --------------------------------------------------------------------------------------------------------

OLD = {"optimizer": {"lr": 1e-3, "betas": [0.9, 0.95]}, "trainer": {"max_epochs": 2}, "logger": {"csv": {}}, "seed": 1}


def test_differences_are_listed_by_key_with_both_values() -> None:
    new = {"optimizer": {"lr": 5e-4, "betas": [0.9, 0.95]}, "trainer": {"max_epochs": 2}, "extra": {"a": 1}}
    assert diff_configs(OLD, new) == [("optimizer.lr", 1e-3, 5e-4), ("seed", 1, None), ("extra.a", None, 1)]
    assert diff_configs(OLD, OLD) == []


def test_a_changed_setting_is_refused_by_name_old_and_new_value() -> None:
    new = {**OLD, "optimizer": {"lr": 5e-4, "betas": [0.9, 0.999]}}
    with pytest.raises(ValueError, match="cannot resume") as error:
        refuse_changes(OLD, new)
    message = str(error.value)
    assert "optimizer.lr was 0.001 and is 0.0005" in message
    assert "optimizer.betas was [0.9, 0.95] and is [0.9, 0.999]" in message
    assert "run_name" in message
    assert "\n" not in message


def test_more_steps_and_other_logging_may_change() -> None:
    new = {**OLD, "trainer": {"max_epochs": 9, "log_every_n_steps": 3}, "logger": {"csv": {"flush": 1}}, "resume": "x"}
    refuse_changes(OLD, new)


def test_paths_of_the_data_may_change_but_not_what_they_are_for() -> None:
    mixture = [{"name": "web", "path": "a.txt", "weight": 0.5}]
    old = {"data": {"path": None, "val_path": "b.txt", "val_sets": {"hard": "c.txt"}, "mixture": mixture}}

    def changed(**data: Any) -> dict[str, Any]:
        return {"data": old["data"] | data}

    moved = {"val_path": "x/b.txt", "val_sets": {"hard": "x/c.txt"}, "mixture": [mixture[0] | {"path": "x/a.txt"}]}
    refuse_changes(old, changed(**moved))
    refuse_changes(old, changed(newlines="lf"))  # the default of a setting that an earlier version lacked
    refuse_changes({"data": {"columns": {"input": "x"}}}, {"data": {"columns": {"input": "x", "history": "history"}}})
    for key, value in {
        "val_sets": {"hard": "c.txt", "easy": "d.txt"},
        "mixture": [mixture[0] | {"weight": 0.6}],
    }.items():
        with pytest.raises(ValueError, match=f"cannot resume with other settings: data.{key} was "):
            refuse_changes(old, changed(**{key: value}))


def test_what_may_change_exists() -> None:
    keys = {setting.path for file in CONF.rglob("*.yaml") for setting in read_settings(file, file.parent.name)}
    keys |= {key.removeprefix("conf.") for key in keys} | {"logger.csv", "trainer.profiler", "trainer.max_time"}
    keys |= {"trainer.num_nodes", *(key.replace("accelerator.", "trainer.", 1) for key in keys)}
    for pattern in (*MAY_CHANGE, *LAYOUT):
        assert fnmatch.filter(keys, pattern), pattern
