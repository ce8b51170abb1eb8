"""From a folder of weights through tuning with adapters and back to folders that transformers and PEFT read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made_export import LLAMA, json_tokenizer, random_gpt
from tiny_run import SETTINGS, fit_here

from llm_lightning.cli.main import main as cli
from llm_lightning.data.templates.as_jinja import chat_of
from llm_lightning.data.templates.choose import choose_template
from llm_lightning.weights.hf_export import export_hf
from llm_lightning.weights.load import load_model

GENERATION = {"eos_token_id": [260, 257], "bos_token_id": 258, "pad_token_id": 257, "temperature": 0.7}
IDS = torch.arange(2 * 24).mul(31).remainder(257).view(2, 24)
MESSAGES = [{"role": "user", "content": "Say 7"}]
WORDS = [word for word in SETTINGS if not word.startswith(("model.", "tokenizer", "callbacks.samples"))]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As it comes from the hub: a Llama with its own tokenizer and chat template."""
    folder = tmp_path_factory.mktemp("base") / "weights"
    tokenizer, config = json_tokenizer(), replace(LLAMA, vocab_size=264, context_length=160, residual_dropout=0.0)
    chat = chat_of(choose_template("smollm2"), tokenizer)
    export_hf(random_gpt(config), config, tokenizer, folder, chat=chat, generation=GENERATION)
    return folder


@pytest.fixture(scope="module")
def tuned(base: Path) -> Path:
    """A run of SFT with adapters on all layers."""
    rows = [{"instruction": f"Say {n}", "output": f"{n}"} for n in range(20)]
    base.with_name("rows.json").write_text(json.dumps(rows))
    folder = base.with_name("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_LIGHTNING_CACHE", str(base.with_name("cache")))
        outcome = fit_here(
            [
                *WORDS, "task=sft", "lora=default", "lora.rank=3", f"init_from={base}", "optimizer.lr=1e-2",
                f"data.path={base.with_name('rows.json')}", "data.val_fraction=0.2", "data.test_fraction=0.2",
                "lora.targets=[qkv_proj,out_proj,gate_proj,up_proj,down_proj]", "callbacks.samples.prompts=null",
                "callbacks.responses.max_new_tokens=4", f"hydra.run.dir={folder}",
            ]
        )  # fmt: skip
    assert outcome.code == 0, outcome.err
    return folder


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    output = model.eval()(IDS)
    return output if isinstance(output, torch.Tensor) else output.logits


@pytest.mark.slow
def test_merged(base: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the dev extra: transformers")
    folder, whole = tmp_path / "merged", load_model(tuned)
    assert (logits(whole.gpt) - logits(load_model(base).gpt)).abs().max() > 1e-2, "it was trained"
    assert cli(["export", str(tuned), str(folder)]) == 0
    assert "chat template: transformers makes our tokens of 4 conversations" in capsys.readouterr().out
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(theirs), logits(whole.gpt), rtol=1e-5, atol=1e-5)
    lineage = json.loads((folder / "export_report.json").read_text())["lineage"]
    assert lineage["parent_name"] == base.name, "without the folders of this machine"
    assert lineage["parent"] == load_model(base).header["digest"]
    assert lineage["digest"] == whole.header["digest"]

    again = load_model(folder)
    torch.testing.assert_close(logits(again.gpt), logits(whole.gpt), rtol=1e-5, atol=1e-5)
    assert again.tokenizer.describe() == whole.tokenizer.describe()
    assert again.header["template"] == whole.header["template"] == load_model(base).header["template"]
    assert again.header["generation"] == GENERATION
    asked = transformers.AutoTokenizer.from_pretrained(folder)
    before = transformers.AutoTokenizer.from_pretrained(base)
    assert asked.apply_chat_template(MESSAGES) == before.apply_chat_template(MESSAGES)


@pytest.mark.slow
def test_the_adapter_alone(base: Path, tuned: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs the dev extra: peft")
    transformers = pytest.importorskip("transformers", reason="needs the dev extra: transformers")
    folder, whole = tmp_path / "adapter", load_model(tuned)
    assert cli(["export", str(tuned), str(folder), "--format", "peft"]) == 0
    theirs = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), folder)
    torch.testing.assert_close(logits(theirs), logits(whole.gpt), rtol=1e-5, atol=1e-5)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    asked = transformers.AutoTokenizer.from_pretrained(folder)
    before = transformers.AutoTokenizer.from_pretrained(base)
    assert asked.apply_chat_template(MESSAGES) == before.apply_chat_template(MESSAGES)

    ours = load_model(folder)
    torch.testing.assert_close(logits(ours.gpt), logits(whole.gpt), rtol=1e-5, atol=1e-5)
    assert ours.header["lora"]["qkv"] == "fused"
    assert ours.header["template"] == whole.header["template"]
    assert cli(["export", str(folder), str(tmp_path / "merged")]) == 0
    torch.testing.assert_close(logits(load_model(tmp_path / "merged").gpt), logits(whole.gpt), rtol=1e-5, atol=1e-5)
    (folder / "chat_template.jinja").write_text("changed")
    with pytest.raises(ValueError, match=r"chat_template.jinja is not what was exported"):
        load_model(folder)


def test_a_template_of_the_training_travels_instead_of_the_bases_own(base: Path, tmp_path: Path) -> None:
    """An adapter trained in the alpaca template, as a folder of PEFT's: the base's own template is not its template."""
    transformers = pytest.importorskip("transformers", reason="needs the dev extra: transformers")
    from llm_lightning.models.lora import LoRAConfig, apply_lora
    from llm_lightning.weights.peft_format import export_peft

    loaded, alpaca = load_model(base), choose_template("alpaca")
    config = LoRAConfig(rank=2, targets=("qkv_proj",))
    apply_lora(loaded.model, config)
    chat = chat_of(alpaca, loaded.tokenizer)
    folder = tmp_path / "adapter"
    export_peft(loaded.model, config, folder, base_name=str(base), tokenizer=loaded.tokenizer, chat=chat)
    assert load_model(folder).header["template"] == alpaca.describe()
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for messages, ids in chat.prompts:
        assert theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == ids
