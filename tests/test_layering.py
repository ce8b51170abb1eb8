"""Who may import whom: the levels of the package, enforced on the syntax tree."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "llm_lightning"

# The first pattern that fits decides.
LEVELS = [
    ("llm_lightning", 3),  # exports public names, imported on first use
    ("llm_lightning.models*", 0),
    ("llm_lightning.losses", 0),
    ("llm_lightning.optim", 0),
    ("llm_lightning.tokenizers", 0),
    ("llm_lightning.files.atomic", 0),
    ("llm_lightning.files.places", 0),
    ("llm_lightning.signals", 0),
    ("llm_lightning.files.bounded_http", 0),
    ("llm_lightning.terminal", 0),
    ("llm_lightning.files.disk_errors", 1),
    ("llm_lightning.inference.generation", 1),
    ("llm_lightning.weights.checkpoint", 1),
    ("llm_lightning.weights.checkpoint_checks", 1),
    ("llm_lightning.weights.pretrained", 1),
    ("llm_lightning.weights.export_folder", 1),
    ("llm_lightning.weights.peft_format", 1),
    ("llm_lightning.weights.hf_export", 1),
    ("llm_lightning.files.frozen_cache", 1),
    ("llm_lightning.metrics.judge", 1),
    ("llm_lightning.data.near_duplicates", 1),
    ("llm_lightning.metrics.answers", 1),
    ("llm_lightning.metrics.classes", 2),
    ("llm_lightning.inference.respond", 1),
    ("llm_lightning.data", 1),
    ("llm_lightning.data.batches", 1),
    ("llm_lightning.data.order", 1),
    ("llm_lightning.data.samples", 1),
    ("llm_lightning.data.workers", 1),
    ("llm_lightning.data.templates", 1),
    ("llm_lightning.data.corpus.sources", 1),
    ("llm_lightning.data.records.labelled", 1),
    ("llm_lightning.data.records.json", 1),
    ("llm_lightning.data.records.instruction", 1),
    ("llm_lightning.data.records.preference", 1),
    ("llm_lightning.data.conversations", 1),
    ("llm_lightning.data.splits", 1),
    ("llm_lightning.data.inspection", 1),
    ("llm_lightning.data.corpus.token_files", 1),
    ("llm_lightning.files.download", 1),
    ("llm_lightning.data.embedded*", 1),
    ("llm_lightning.data.*", 2),
    ("llm_lightning.tasks*", 2),
    ("llm_lightning.callbacks*", 2),
    ("llm_lightning.experiments*", 3),
    ("llm_lightning.cli*", 3),
    ("train", 3),
]
FILES = [*sorted(PACKAGE.rglob("*.py")), ROOT / "train.py"]


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def level(module: str) -> int:
    return next(level for pattern, level in LEVELS if fnmatchcase(module, pattern))


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported, also inside functions; `from package import module` names the module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                path = ROOT.joinpath(*node.module.split("."), alias.name)
                is_module = path.with_suffix(".py").exists() or path.is_dir()
                yield f"{node.module}.{alias.name}" if is_module else node.module


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text("utf-8"))


def by_name(file: Path) -> str:
    return module_name(file)


@pytest.mark.parametrize("file", FILES, ids=by_name)
def test_imports_point_down(file: Path) -> None:
    own = level(module_name(file))
    upwards = [name for name in imported_modules(parse(file)) if name.startswith("llm_lightning") and level(name) > own]
    assert not upwards, f"{module_name(file)} is of level {own} and may not import {upwards}"


@pytest.mark.parametrize("file", FILES, ids=by_name)
def test_third_party_packages_stay_at_their_level(file: Path) -> None:
    own = level(module_name(file))
    packages = {name.partition(".")[0] for name in imported_modules(parse(file))}
    if own < 2:
        assert not packages & {"lightning", "torchmetrics"}
    if own < 3:
        assert not packages & {"hydra", "omegaconf"}
    if module_name(file).startswith("llm_lightning.models."):
        assert not packages & {"numpy", "tiktoken", "tokenizers", "safetensors", "transformers"}


@pytest.mark.parametrize("folder", ["tasks", "data"])
def test_no_task_imports_a_task_and_no_data_module_a_data_module(folder: str) -> None:
    for file in (PACKAGE / folder).glob("*.py"):
        if level(module_name(file)) == 2 and file.stem != "base":
            package = f"llm_lightning.{folder}"
            siblings = {name for name in imported_modules(parse(file)) if level_two_sibling(name, package)}
            assert siblings <= {f"{package}.base"}, f"{module_name(file)} imports {siblings}"


def level_two_sibling(name: str, package: str) -> bool:
    return name.startswith(f"{package}.") and level(name) == 2


@pytest.mark.parametrize("file", FILES, ids=by_name)
def test_cfg_never_enters_a_class(file: Path) -> None:
    for cls in (node for node in ast.walk(parse(file)) if isinstance(node, ast.ClassDef)):
        for function in (node for node in ast.walk(cls) if isinstance(node, ast.FunctionDef)):
            arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            assert "cfg" not in {argument.arg for argument in arguments}, f"{cls.name}.{function.name}"


@pytest.mark.parametrize("file", FILES, ids=by_name)
def test_imports_are_absolute_and_lightning_is_called_l(file: Path) -> None:
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            assert not (node.module or "").startswith("pytorch_lightning")
        if isinstance(node, ast.Import):
            for alias in node.names:
                assert not alias.name.startswith("pytorch_lightning")
                assert alias.name != "lightning" or alias.asname == "L", f"line {node.lineno}: import lightning as L"


def test_init_files_are_empty_but_the_top_one() -> None:
    filled = [file for file in PACKAGE.rglob("__init__.py") if file.read_text().strip()]
    assert [file.parent.name for file in filled] in ([], ["llm_lightning"])


def test_every_module_has_a_level() -> None:
    for file in FILES:
        assert any(fnmatchcase(module_name(file), pattern) for pattern, _ in LEVELS), (
            f"{module_name(file)}: say in LEVELS where it belongs"
        )
