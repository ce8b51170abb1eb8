"""Weights from a (fake) hub, from folders and files, and out again; transformers is the judge of what comes out."""

from __future__ import annotations

import hashlib
import json
import resource
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hub_server import COMMIT, FakeHub, serving_hub
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from llm_lightning.models.gpt import GPT, GPTConfig
from llm_lightning.tokenizers.build import build_tokenizer, from_description
from llm_lightning.weights import hf_checks
from llm_lightning.weights.families.gpt2 import config_to_hf, to_hf
from llm_lightning.weights.hf_export import export_hf
from llm_lightning.weights.pretrained import load_pretrained
from llm_lightning.weights.releases import RELEASES, Pinned

CONFIG = GPTConfig(vocab_size=300, context_length=16, n_layer=2, n_head=2, n_embd=128)
TEXT = "It's 1,234 apples --  naïve café, ab!\n\tThe End of it." * 3


def random_gpt(config: GPTConfig = CONFIG) -> GPT:
    generator = torch.Generator().manual_seed(5)
    model = GPT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1, generator=generator)
    return model


@pytest.fixture
def model() -> GPT:
    return random_gpt()


@pytest.fixture
def folder(model: GPT, tmp_path: Path) -> Path:
    """A folder as the hub has them."""
    path = tmp_path / "hub_folder"
    path.mkdir()
    weights = to_hf(model.state_dict(), CONFIG)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config_to_hf(CONFIG, 0)))
    return path


def assert_same_weights(state: dict[str, torch.Tensor], model: GPT) -> None:
    expected = model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


@pytest.fixture
def hub(model: GPT, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeHub]]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("LLM_LIGHTNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "client"))
    with serving_hub((folder / "model.safetensors").read_bytes()) as (handler, address):
        monkeypatch.setenv("HF_ENDPOINT", address)
        yield handler


def release(sha256: str | None) -> Pinned:
    return Pinned("openai-community/gpt2", COMMIT, sha256, asdict(CONFIG))


@pytest.mark.slow
def test_the_table_has_the_released_sizes() -> None:
    parameters = {"gpt2-small": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080}
    for name, expected in (parameters | {"gpt2-xl": 1_557_611_200}).items():
        with torch.device("meta"):
            assert GPT(GPTConfig(**RELEASES[name].config)).num_parameters() == expected


@pytest.mark.parametrize("pinned", [True, False], ids=["digest_in_source", "digest_of_the_hub"])
def test_a_named_download_is_verified_once_and_then_needs_no_hub(
    hub: type[FakeHub], model: GPT, monkeypatch: pytest.MonkeyPatch, pinned: bool
) -> None:
    monkeypatch.setitem(RELEASES, "gpt2-small", release(hub.digest if pinned else None))
    loaded = load_pretrained("gpt2-small")
    assert_same_weights(loaded.state, model)
    assert loaded.config == CONFIG
    assert loaded.tokenizer == {"name": "gpt2"}
    assert loaded.info == {
        "source": f"openai-community/gpt2@{COMMIT}",
        "digest": hub.digest,
        "dtype": "float32",
    }
    address = f"/openai-community/gpt2/resolve/{COMMIT}/model.safetensors"
    asked = [] if pinned else [f"HEAD {address}"]
    assert hub.requests == [*asked, f"HEAD {address}", f"GET {address}", "GET /cdn/blob"]
    assert_same_weights(load_pretrained("gpt2-small").state, model)
    assert len(hub.requests) == len(asked) + 3


@pytest.mark.parametrize("pinned", [True, False], ids=["digest_in_source", "digest_of_the_hub"])
def test_a_wrong_digest_is_refused(
    hub: type[FakeHub], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pinned: bool
) -> None:
    monkeypatch.setitem(RELEASES, "gpt2-small", release(hub.digest if pinned else None))
    hub.content = hub.content[:-1] + bytes([hub.content[-1] ^ 1])
    with pytest.raises(OSError, match=f"sha256 .*, expected {hub.digest}"):
        load_pretrained("gpt2-small")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_folder_file_and_shards_give_the_same_weights(folder: Path, model: GPT) -> None:
    whole = load_pretrained(folder)
    assert_same_weights(whole.state, model)
    assert whole.config == CONFIG
    assert all(tensor.is_contiguous() for tensor in whole.state.values())
    assert whole.state["lm_head.weight"] is whole.state["token_embedding.weight"]
    content = (folder / "model.safetensors").read_bytes()
    assert whole.info["digest"] == hashlib.sha256(content).hexdigest()
    assert_same_weights(load_pretrained(folder / "model.safetensors").state, model)

    tensors = load_file(folder / "model.safetensors")
    parts = [dict(list(tensors.items())[:9]), dict(list(tensors.items())[9:])]
    shards = {f"model-0000{i}-of-00002.safetensors": part for i, part in enumerate(parts, start=1)}
    for name, part in shards.items():
        save_file(part, folder / name)
    index = {"weight_map": {tensor: name for name, part in shards.items() for tensor in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    assert_same_weights(load_pretrained(folder).state, model)


@pytest.mark.parametrize("damage", ["missing", "short", "empty", "twice"])
def test_a_damaged_shard_is_named(folder: Path, damage: str) -> None:
    transformers = pytest.importorskip("transformers")
    whole = transformers.GPT2LMHeadModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    whole.save_pretrained(folder, max_shard_size="500KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert load_pretrained(folder).config == CONFIG
    content = shards[1].read_bytes()
    if damage == "missing":
        shards[1].unlink()
    else:
        size = {"short": len(content) - 1, "empty": 0, "twice": len(content)}[damage]
        shards[1].write_bytes(shards[0].read_bytes() if damage == "twice" else content[:size])
    with pytest.raises((FileNotFoundError, ValueError), match=shards[1].name) as caught:
        load_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_weights_stay_when_their_file_goes(folder: Path, model: GPT) -> None:
    loaded = load_pretrained(folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(0)
    assert_same_weights(loaded.state, model)


def test_a_lone_file_tells_its_sizes(folder: Path, model: GPT, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "config.json").unlink()
    with caplog.at_level("INFO"):
        loaded = load_pretrained(folder / "model.safetensors")
    assert loaded.config == CONFIG
    assert_same_weights(loaded.state, model)
    assert loaded.tokenizer is None  # 300 tokens are nobody's in particular
    assert "n_head=2, because GPT-2's heads are 64 wide" in caplog.text


@pytest.mark.slow
def test_the_tokenizer_of_a_folder_is_recognised(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    transformers = pytest.importorskip("transformers")
    config = replace(CONFIG, vocab_size=50257)
    export_hf(random_gpt(config), config, build_tokenizer("gpt2"), tmp_path / "export")
    (tmp_path / "export" / "llm_lightning.json").unlink()
    assert load_pretrained(tmp_path / "export").tokenizer == {"name": "gpt2"}  # by merges.txt
    assert "plain text" not in caplog.text
    (tmp_path / "export" / "added_tokens.json").write_text('{"<|tool|>": 50257}')
    load_pretrained(tmp_path / "export")
    assert "adds tokens such as <|tool|>, which are plain text here" in caplog.text
    (tmp_path / "export" / "added_tokens.json").unlink()
    transformers.AutoTokenizer.from_pretrained(tmp_path / "export").save_pretrained(folder)
    assert not (folder / "merges.txt").exists()
    assert load_pretrained(folder).tokenizer == {"name": "gpt2"}  # by tokenizer.json
    changed = json.loads((folder / "tokenizer.json").read_text())
    changed["model"]["merges"].pop()
    (folder / "tokenizer.json").write_text(json.dumps(changed))
    assert load_pretrained(folder).tokenizer["name"] == "tokenizer_json"


@pytest.mark.parametrize("tied_head", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("qkv_bias", [True, False], ids=["bias", "no_bias"])
def test_an_exported_folder_gives_transformers_our_logits(tmp_path: Path, tied_head: bool, qkv_bias: bool) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = build_tokenizer("bpe", vocab_size=280, texts=[TEXT])
    config = replace(CONFIG, vocab_size=280, tied_head=tied_head, qkv_bias=qkv_bias)
    model = random_gpt(config)
    report = export_hf(model, config, tokenizer, tmp_path / "export")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "export", attn_implementation="eager")
    ids = torch.arange(32).view(2, 16)
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(ids).logits, model(ids), rtol=0, atol=1e-5)
    assert report["max_logit_difference"] < 1e-5
    assert report == json.loads((tmp_path / "export" / "export_report.json").read_text())
    assert not [path for path in tmp_path.iterdir() if path.name != "export"]
    assert len({path.stat().st_mode for path in (tmp_path / "export").iterdir()}) == 1

    loaded = load_pretrained(tmp_path / "export")
    assert loaded.config == config
    assert from_description(loaded.tokenizer).encode(TEXT) == tokenizer.encode(TEXT)
    assert_same_weights(loaded.state, model)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "bpe", "bpe_without_merges"])
def test_transformers_reads_the_exported_tokenizer(tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    options = {} if name == "gpt2" else {"vocab_size": 280 if name == "bpe" else 257, "texts": [TEXT]}
    tokenizer = build_tokenizer("bpe" if options else "gpt2", **options)
    config = replace(CONFIG, vocab_size=tokenizer.vocab_size, n_layer=1)
    export_hf(random_gpt(config), config, tokenizer, tmp_path / "export")
    for kind in (transformers.AutoTokenizer, transformers.GPT2TokenizerFast):
        theirs = kind.from_pretrained(tmp_path / "export")
        assert theirs(TEXT)["input_ids"] == tokenizer.encode(TEXT)
        assert theirs.decode(tokenizer.encode(TEXT)) == TEXT
        assert (theirs.eos_token_id, len(theirs)) == (tokenizer.eot_id, tokenizer.vocab_size)
    if name == "gpt2":  # the very files that OpenAI published
        digests = [
            hashlib.sha256((tmp_path / "export" / file).read_bytes()).hexdigest()
            for file in ("vocab.json", "merges.txt")
        ]
        assert digests == [
            "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
            "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        ]


@pytest.mark.parametrize("name", ["byte", "word"])
def test_a_tokenizer_that_transformers_lacks_comes_back_to_us(tmp_path: Path, name: str) -> None:
    tokenizer = build_tokenizer(name, **({"texts": [TEXT]} if name == "word" else {}))
    config = replace(CONFIG, vocab_size=tokenizer.vocab_size)
    report = export_hf(random_gpt(config), config, tokenizer, tmp_path / "export")
    assert f"no tokenizer {name}" in report["notes"][0]
    assert load_pretrained(tmp_path / "export").tokenizer == tokenizer.describe()


def test_bfloat16_export(tmp_path: Path) -> None:
    config = replace(CONFIG, vocab_size=257)
    model = random_gpt(config)
    transformers = pytest.importorskip("transformers")
    report = export_hf(model, config, build_tokenizer("byte"), tmp_path / "export", dtype="bfloat16")
    assert transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "export").dtype == torch.bfloat16
    assert report["max_logit_difference"] < 1e-5  # both compute in float32 with the rounded weights
    assert_same_weights(load_pretrained(tmp_path / "export").state, model.bfloat16())
    with pytest.raises(ValueError, match="dtype='int8' must be float32 or bfloat16"):
        export_hf(model, config, build_tokenizer("byte"), tmp_path / "other", dtype="int8")


def test_a_padded_vocabulary_is_cut_to_the_tokenizer(tmp_path: Path) -> None:
    config = replace(CONFIG, vocab_size=320)
    model = random_gpt(config)
    report = export_hf(model.state_dict(), config, build_tokenizer("byte"), tmp_path / "export")
    assert report["notes"][0] == "63 padded rows of the vocabulary cut"
    loaded = load_pretrained(tmp_path / "export")
    assert loaded.config.vocab_size == 257
    assert torch.equal(loaded.state["lm_head.weight"], model.lm_head.weight[:257])
    with pytest.raises(ValueError, match=r"tokenizer has 50257 tokens, but model.vocab_size=320"):
        export_hf(model, config, build_tokenizer("gpt2"), tmp_path / "other")


def test_export_without_transformers_into_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    config = replace(CONFIG, vocab_size=257)
    report = export_hf(random_gpt(config), config, build_tokenizer("byte"), ".")
    assert (report["reloaded"], report["transformers"]) == ("bitwise equal", None)
    assert (tmp_path / "here" / "model.safetensors").is_file()


def test_a_folder_in_use_is_kept(tmp_path: Path) -> None:
    config = replace(CONFIG, vocab_size=257)
    target, tokenizer, model = tmp_path / "export", build_tokenizer("byte"), random_gpt(config)
    target.mkdir()
    export_hf(model, config, tokenizer, target)  # an empty folder is as good as none
    before = {path: path.read_bytes() for path in target.iterdir()}
    with pytest.raises(ValueError, match="is not empty; choose another folder"):
        export_hf(model, config, tokenizer, target)
    assert before == {path: path.read_bytes() for path in target.iterdir()}
    (target / "shard").touch()
    report = json.loads((target / "export_report.json").read_text())
    report["sha256"]["shard"] = "of a larger export"
    (target / "export_report.json").write_text(json.dumps(report))
    export_hf(model, config, tokenizer, target, overwrite=True)
    assert before.keys() == set(target.iterdir())
    (target / "llm_lightning.json").unlink()
    with pytest.raises(ValueError, match="is not an earlier export"):
        export_hf(model, config, tokenizer, target, overwrite=True)


def test_a_failed_export_leaves_nothing_and_keeps_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, vocab_size=257)
    target, tokenizer, model = tmp_path / "export", build_tokenizer("byte"), random_gpt(config)
    export_hf(model, config, tokenizer, target)
    before = {path: path.read_bytes() for path in target.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=r"bytes needed, .* free\): '.*/export'"):
            export_hf(model, config, tokenizer, target, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    monkeypatch.setattr(hf_checks, "_compare_with_transformers", lambda *_: (1.0, 10.0))
    with pytest.raises(ValueError, match="differ by 1; nothing was written"):
        export_hf(model, config, tokenizer, target, overwrite=True)
    with torch.no_grad():
        model.final_norm.bias[3] = float("nan")
    with pytest.raises(ValueError, match=r"transformer.ln_f.bias has values that are not finite"):
        export_hf(model, config, tokenizer, target, overwrite=True)
    assert before == {path: path.read_bytes() for path in target.iterdir()}
    assert list(tmp_path.iterdir()) == [target]


def test_what_is_not_there_or_not_safetensors_is_refused(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no weights at gpt2-smal; .*gpt2-small, gpt2-medium"):
        load_pretrained("gpt2-smal")
    pickled = folder / "pytorch_model.bin"
    torch.save({"a": torch.ones(1)}, pickled)
    with pytest.raises(ValueError, match=r"is not a .safetensors file; pickled weights .* can run code"):
        load_pretrained(pickled)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model.safetensors; pytorch_model.bin is not read, because"):
        load_pretrained(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"wte.weight": "../elsewhere.safetensors"}}')
    with pytest.raises(ValueError, match="weight_map must name files of this folder"):
        load_pretrained(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"wte.weight": "one.safetensors"}}')
    with pytest.raises(FileNotFoundError, match=r"lists one.safetensors, which does not exist"):
        load_pretrained(folder)


def header(content: object) -> bytes:
    text = json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        bytes(8),
        (2**63).to_bytes(8, "little") + b"{}",
        (2**40).to_bytes(8, "little") + b"{}",
        header({"wte.weight": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}),
        header({"wte.weight": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 0]}}),
        header({"wte.weight": {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}}) + bytes(4),
        header({"wte.weight": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}) + bytes(4),
        header({}),
        header([]),
        header({"wte.weight": 3}),
        (8).to_bytes(8, "little") + b"\xff" * 8,
        (100_000).to_bytes(8, "little") + b"[" * 100_000,
        b"PK\x03\x04" + bytes(100),
    ],
)
def test_damaged_and_hostile_files_give_one_clear_error(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model.safetensors|hub_folder") as caught:
        load_pretrained(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_quantised_weights_are_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "transformer.h.0.mlp.c_fc.weight"
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"model.safetensors: {name} is of type F8_E4M3; quantised weights are read"):
        load_pretrained(folder)


def test_every_truncation_is_noticed(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    for size in range(0, len(content), len(content) // 50):
        (folder / "model.safetensors").write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"get it again"):
            load_pretrained(folder)


@pytest.mark.slow
def test_a_flipped_bit_in_the_header_gives_an_error_or_a_float_that_still_fits(folder: Path) -> None:
    """No digest is known for a local file; but nothing else than a ValueError may come out."""
    content = bytearray((folder / "model.safetensors").read_bytes())
    length = 8 + int.from_bytes(content[:8], "little")
    complaints = []
    for position in range(0, length, 7):
        content[position] ^= 1 << position % 8
        (folder / "model.safetensors").write_bytes(content)
        try:
            load_pretrained(folder)
        except ValueError as error:
            complaints.append(str(error))
        content[position] ^= 1 << position % 8
    assert len(complaints) > 100
    assert all("hub_folder" in complaint for complaint in complaints)


@pytest.mark.parametrize("file", ["config.json", "llm_lightning.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, '"\ud800"', "{}"])
def test_damaged_json_is_named(folder: Path, file: str, text: str) -> None:
    if file.startswith("model"):
        (folder / "model.safetensors").unlink()
    (folder / file).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match="hub_folder"):
        load_pretrained(folder)


def test_a_config_of_another_model_is_refused_with_its_path(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(config_to_hf(CONFIG, 0) | {"n_layer": 3}))
    with pytest.raises(ValueError, match=r"hub_folder: the weights do not fit this GPT-2; missing: h\.2\."):
        load_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    with pytest.raises(ValueError, match=r"hub_folder: config.json: model_type='mistral' is not a family known here"):
        load_pretrained(folder)
