"""Peak memory of reading weights, of processes of their own, in multiples of the file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llm_lightning.models.gpt import GPTConfig
from llm_lightning.models.shapes import parameter_shapes
from llm_lightning.weights.families.choose import family_of

CONFIGS = {
    "llama": GPTConfig(
        49152, 2048, 30, 9, 576, norm="rms", position="rope", mlp="swiglu", n_kv_head=3, head_dim=64, ffn_width=1536,
        qkv_bias=False, out_bias=False, mlp_bias=False,
    ),
    "gpt2": GPTConfig(n_layer=14),
}  # fmt: skip

MEASURE = """
import sys, threading, time
from dataclasses import replace
import safetensors, torch
import llm_lightning.weights.pretrained
from llm_lightning.models.surgery import adapt
from llm_lightning.weights.load import load_model

def anonymous():
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("RssAnon")).split()[1]) * 1024

def watch():
    while not ended.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.001)

torch.ones(2, 2) @ torch.ones(2, 2)
before, peak, ended = anonymous(), [0], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
dtype = torch.float32 if sys.argv[2] == "training" else None
model = load_model(sys.argv[1], dtype=dtype).model
if dtype is not None:
    model = adapt(model, replace(model.config, context_length=256))
assert model.dtype is (dtype or torch.bfloat16)
ended.set()
watcher.join()
print(max(peak[0], anonymous()) - before)
"""


def write_folder(folder: Path, config: GPTConfig) -> int:
    """A model of bfloat16 in two shards, as the hub has them; returns its bytes."""
    state = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in parameter_shapes(config).items()}
    for tensor in state.values():
        tensor.fill_(0.01)
    state["lm_head.weight"] = state["token_embedding.weight"]
    theirs = family_of(config).to_hf(state, config)
    shards = {f"model-0000{number}-of-00002.safetensors": list(theirs)[number - 1 :: 2] for number in (1, 2)}
    for name, part in shards.items():
        save_file({tensor: theirs[tensor].contiguous() for tensor in part}, folder / name)
    index = {"weight_map": {tensor: name for name, part in shards.items() for tensor in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(family_of(config).config_to_hf(config, None)))
    (folder / "llm_lightning.json").write_text(json.dumps({"format": 1, "tokenizer": {"name": "byte"}}))
    return sum((folder / name).stat().st_size for name in shards)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("family", CONFIGS)
def test_a_file_is_never_in_memory_twice(family: str, tmp_path: Path) -> None:
    size = write_folder(tmp_path, CONFIGS[family])
    for purpose, most in (("inference", 1.2), ("training", 2.2)):
        words = [sys.executable, "-c", MEASURE, str(tmp_path), purpose]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        share = int(done.stdout) / size
        assert share < most, f"{purpose}: {share:.2f} of {size:,} bytes"
