"""Who may import whom, enforced on the syntax tree: the order of folders, and no circle of modules."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "llm_lightning"

FLOORS = [
    {"models", "files", "losses", "optim", "tokenizers", "terminal", "signals", "slurm", "stacks", "progress"}
    | {"nearest", "malloc", "cores"},
    {"weights", "metrics"},
    {"data"},
    {"inference"},
    {"tasks", "callbacks"},
    {"experiments"},
    {"cli", "__main__"},
]
"""The rooms of the package, lowest first. A room may import its own floor and those below; `__init__` names the public
functions of all of them, and imports them on first use."""
LIGHTNING_FROM, HYDRA_FROM = 2, 5
FILES = [*sorted(PACKAGE.rglob("*.py")), ROOT / "train.py"]


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def floor(module: str) -> int:
    room = f"{module}.".split(".")[1]
    return next((number for number, rooms in enumerate(FLOORS) if room in rooms), len(FLOORS))


@cache
def nodes(file: Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(ast.parse(file.read_text("utf-8"))))


@cache
def imported_modules(file: Path) -> list[str]:
    """Every module that is imported, also inside functions; `from package import module` names the module."""
    return list(_imported_modules(file))


def _imported_modules(file: Path) -> Iterator[str]:
    for node in nodes(file):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield f"{node.module}.{alias.name}" if is_module(f"{node.module}.{alias.name}") else node.module


@cache
def is_module(name: str) -> bool:
    """Whether it is one of this project."""
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


def test_every_module_has_a_floor() -> None:
    inside = [module_name(file) for file in FILES if file.parent != ROOT and file != PACKAGE / "__init__.py"]
    assert [name for name in inside if floor(name) == len(FLOORS)] == []


def test_imports_point_down() -> None:
    upwards = [
        f"{module_name(file)} -> {name}"
        for file in FILES
        if file != PACKAGE / "__init__.py"
        for name in imported_modules(file)
        if name.startswith("llm_lightning.") and floor(name) > floor(module_name(file))
    ]
    assert upwards == []


def test_no_circle_of_modules() -> None:
    graph = {module_name(file): set(imported_modules(file)) for file in FILES if file != PACKAGE / "__init__.py"}
    assert [circle for circle in strongly_connected(graph) if len(circle) > 1] == []


def strongly_connected(graph: dict[str, set[str]]) -> Iterable[list[str]]:
    """The groups of modules that reach each other: two walks, as Kosaraju 1978."""
    order: list[str] = []
    seen: set[str] = set()

    def visit(node: str, edges: dict[str, set[str]], out: list[str]) -> None:
        if node in seen:
            return
        seen.add(node)
        for other in sorted(edges.get(node, set()) & graph.keys()):
            visit(other, edges, out)
        out.append(node)

    for node in graph:
        visit(node, graph, order)
    back: dict[str, set[str]] = {}
    for node, others in graph.items():
        for other in others:
            back.setdefault(other, set()).add(node)
    seen = set()
    for node in reversed(order):
        group: list[str] = []
        visit(node, back, group)
        if group:
            yield sorted(group)


def test_circles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}
    assert [circle for circle in strongly_connected(graph) if len(circle) > 1] == [["a", "b", "c"]]


def test_third_party_packages_stay_on_their_floor() -> None:
    wrong = []
    for file in FILES:
        own = floor(module_name(file))
        banned = {"lightning"} if own < LIGHTNING_FROM else set()
        banned |= {"hydra", "omegaconf"} if own < HYDRA_FROM else set()
        if module_name(file).startswith("llm_lightning.models."):
            banned |= {"numpy", "tiktoken", "tokenizers", "safetensors", "transformers"}
        wrong += [f"{module_name(file)} -> {name}" for name in imported_modules(file) if name.split(".")[0] in banned]
    assert wrong == []


def test_no_task_imports_a_task_and_no_data_module_a_data_module() -> None:
    for folder in ("tasks", "data"):
        conf = ROOT / "conf" / folder.removesuffix("s")
        names = {file.stem for file in (PACKAGE / folder).glob("*.py") if (conf / f"{file.stem}.yaml").is_file()}
        assert len(names) == 4, f"with a new one, raise this number: {names}"
        siblings = {f"llm_lightning.{folder}.{name}" for name in names}
        for name in names:
            own = PACKAGE / folder / f"{name}.py"
            assert not siblings & set(imported_modules(own)), own


def test_cfg_never_enters_a_class() -> None:
    for file in FILES:
        for cls in (node for node in nodes(file) if isinstance(node, ast.ClassDef)):
            for function in (node for node in ast.walk(cls) if isinstance(node, ast.FunctionDef)):
                arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
                assert "cfg" not in {argument.arg for argument in arguments}, f"{file}: {cls.name}.{function.name}"


def test_imports_are_absolute_and_lightning_is_called_l() -> None:
    for file in FILES:
        for node in nodes(file):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}:{node.lineno}: relative import"
                assert not (node.module or "").startswith("pytorch_lightning")
            if isinstance(node, ast.Import):
                for alias in node.names:
                    assert not alias.name.startswith("pytorch_lightning")
                    assert alias.name != "lightning" or alias.asname == "L", f"{file}:{node.lineno}: lightning as L"


def test_the_core_is_named_in_models_and_weights_only() -> None:
    """What a model consists of may change there alone."""
    parts = {"token_embedding", "position_embedding", "final_norm", "lm_head", "qkv_proj", "out_proj"}
    parts |= {"up_proj", "down_proj", "attn_norm", "mlp_norm"}
    wrong = []
    for file in FILES:
        if module_name(file).split(".")[1:2] in (["models"], ["weights"]):
            continue
        for node in nodes(file):
            name = (
                node.attr if isinstance(node, ast.Attribute) else node.value if isinstance(node, ast.Constant) else ""
            )
            if isinstance(name, str) and parts & set(name.split(".")):
                wrong.append(f"{file.relative_to(ROOT)}:{node.lineno}: {name}")
    assert wrong == []


def test_task_files_are_algorithms() -> None:
    files = [file for file in (PACKAGE / "tasks").glob("*.py") if (ROOT / "conf/task" / f"{file.stem}.yaml").is_file()]
    assert len(files) == 4, f"with a new one, raise this number: {files}"
    assert [file.name for file in files if len(file.read_text("utf-8").splitlines()) >= 100] == []


def test_init_files_are_empty_but_the_top_one() -> None:
    filled = [file for file in PACKAGE.rglob("__init__.py") if file.read_text().strip()]
    assert [file.parent.name for file in filled] in ([], ["llm_lightning"])
