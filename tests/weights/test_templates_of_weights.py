"""Chat templates in the folders of transformers: every form that it writes or has written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm_lightning.weights.chat_templates import read_chat_template

TOKENS = {
    "bos_token": "<s>",
    "eos_token": {"content": "</s>", "lstrip": False},
    "pad_token": None,
    "model_max_length": 9,
}
SPELLED = {"bos_token": "<s>", "eos_token": "</s>"}


def write(folder: Path, name: str, content: Any) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("named", [False, True])
def test_reads_what_transformers_writes(tmp_path: Path, named: bool) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    library = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="a"))
    templates = {"default": "{{ messages }}é\n", "rag": "{{ documents }}"}
    writer = PreTrainedTokenizerFast(tokenizer_object=library, bos_token="<s>", eos_token="</s>")
    writer.chat_template = templates if named else templates["default"]
    writer.save_pretrained(tmp_path)
    found = read_chat_template(tmp_path)
    assert found is not None
    assert (
        PreTrainedTokenizerFast.from_pretrained(tmp_path).get_chat_template() == found["text"] == templates["default"]
    )
    assert found["others"] == ({"rag": templates["rag"]} if named else {})
    assert found["tokens"] == SPELLED
    assert (found["kind"], found["name"]) == ("jinja", "own")


@pytest.mark.parametrize(
    ("template", "others"),
    [
        ("one", {}),
        ([{"name": "tool_use", "template": "two"}, {"name": "default", "template": "one"}], {"tool_use": "two"}),
    ],
)
def test_in_the_configuration_of_the_tokenizer(tmp_path: Path, template: Any, others: dict[str, str]) -> None:
    """As transformers 4 wrote it; a file of its own is preferred."""
    write(tmp_path, "tokenizer_config.json", TOKENS | {"chat_template": template})
    found = read_chat_template(tmp_path)
    assert found is not None
    assert (found["text"], found["others"], found["tokens"]) == ("one", others, SPELLED)
    write(tmp_path, "chat_template.json", {"chat_template": "three"})
    assert (read_chat_template(tmp_path) or {})["text"] == "three"
    write(tmp_path, "chat_template.jinja", "four")
    assert (read_chat_template(tmp_path) or {})["text"] == "four"


def test_a_folder_without_one(tmp_path: Path) -> None:
    assert read_chat_template(tmp_path) is None
    write(tmp_path, "tokenizer_config.json", TOKENS)
    assert read_chat_template(tmp_path) is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", {"chat_template": 3}, r"tokenizer_config.json: chat_template must be a text, or"),
        ("tokenizer_config.json", {"chat_template": [{"name": "x"}]}, r"chat_template must be a text, or a list of"),
        ("chat_template.json", {"chat_template": [{"name": "x", "template": "y"}]}, r"named x, but none named default"),
        ("tokenizer_config.json", "{", r"tokenizer_config.json is not JSON"),
        ("chat_template.jinja", "x" * ((1 << 20) + 1), r"chat_template.jinja has 1,048,577 bytes; no chat template"),
    ],
)  # fmt: skip
def test_damaged_files(tmp_path: Path, name: str, content: Any, message: str) -> None:
    write(tmp_path, name, content)
    with pytest.raises(ValueError, match=message):
        read_chat_template(tmp_path)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"ok\xff")
    with pytest.raises(ValueError, match=r"chat_template.jinja is not UTF-8 at byte 2"):
        read_chat_template(tmp_path)
