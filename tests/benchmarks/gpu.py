"""One command for a machine with a GPU, offline, at most four minutes: what must run there, and how fast it runs.

    python tests/benchmarks/gpu.py [--parts tests,training] [--minutes 4] [--out FOLDER]
    python tests/benchmarks/gpu.py --rehearse        the same on a CPU with tiny sizes, to see that it works

Parts, in order of value:

- `tests`: the tests marked gpu.
- `training`: 124M parameters, context 1024, bf16. Ours through a Trainer, eager and compiled; GPT2LMHeadModel under
  autocast, eager and compiled; a bare loop with a compiled model and fused AdamW, as nanoGPT's. Tokens/s, MFU, memory.
- `sft`: an epoch of the book's records at 124M, by `sft.py`: ours, packed and padded, and TRL's under autocast.
- `dpo`: the book's pairs at 124M, by `dpo.py`: ours with a copy as reference, and TRL's. These two parts need the
  package trl, and $LLM_LIGHTNING_DATA.
- `generation`: greedy, 124M parameters in bf16, batch 1, 8 and 64, beside `generate` of transformers.
- `lora`: `training` with adapters of rank 16; PEFT with a base in bf16.
- `runs`: every task through train.py, whole and in two sittings; both must end with the same bits. So must one process
  of ddp and fsdp with NCCL. Then the verbs that read such a run, on the GPU.

Peak memory is in the results of each contender. Every contender is a process with a time limit of its own, and none
goes beyond the limit of all; what then lacks is named, and `--parts` runs it. Each result is printed and written to
FOLDER/gpu.json as it ends, and all of them as a table to FOLDER/gpu.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = 50257
PART_SECONDS = {"tests": 90, "training": 60, "sft": 45, "dpo": 45, "generation": 30, "lora": 40, "runs": 120}
"""Most seconds of `tests`; of each contender of the others, and of each command of `runs`."""
LEAST_SECONDS = 10
"""Of a contender: with less left it is not started."""
UNTIL = "LLM_LIGHTNING_UNTIL"
"""Environment variable with the time at which everything ends, in seconds since 1970."""
REHEARSAL = os.environ.get("LLM_LIGHTNING_REHEARSAL") == "1"
DEVICE = "cpu" if REHEARSAL else "cuda"
BATCH, TIME, STEPS, WARMUP = (2, 32, 2, 1) if REHEARSAL else (16, 1024, 20, 5)
SIZES: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 32} if REHEARSAL else {}


def main() -> None:
    """Run the parts, or one contender in this process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PART_SECONDS), help="which parts to run, in this order")
    parser.add_argument("--minutes", type=float, default=4, help="most minutes of all parts together")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "benchmarks", help="where gpu.json goes")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        warnings.filterwarnings("ignore")
        for one in options.contender.split(","):
            name, _, argument = one.partition(":")
            print(json.dumps(CONTENDERS[name](*([int(argument)] if argument else []))), flush=True)
        return
    if options.rehearse:
        options.minutes = max(options.minutes, 20)  # a machine may be slow; it is to end, not to be fast
    environment = dict(os.environ)
    if options.rehearse:  # on one thread: idle ones would spin on the cores that the compilers need
        environment = {"OMP_NUM_THREADS": "1", **environment, "LLM_LIGHTNING_REHEARSAL": "1"}
    environment[UNTIL] = str(time.time() + 60 * options.minutes)
    options.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": machine()}
    for part in options.parts.split(","):
        started = time.monotonic()
        for name, outcome in PARTS[part](environment):
            results.setdefault(part, {})[name] = outcome
            print(f"{part:10s} {name:32s} {json.dumps(outcome)}", flush=True)
            (options.out / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
            (options.out / "gpu.md").write_text(table(results))
        print(f"{part:10s} {time.monotonic() - started:.0f} s", flush=True)
    print(table(results))
    sys.exit(
        any(
            "exit_code" in one and one["exit_code"]
            for part in options.parts.split(",")
            for one in results[part].values()
        )
    )


def table(results: dict[str, Any]) -> str:
    """The results in Markdown, with date and device."""
    machine = results["machine"]
    device = machine["gpu"] or "CPU (rehearsal)"
    lines = [
        f"{device}, torch {machine['torch']}, {machine['date']}",
        "",
        "| part | contender | result |",
        "|---|---|---|",
    ]
    for part in [name for name in results if name != "machine"]:
        for name, outcome in results[part].items():
            says = outcome.get("says")
            failed = f"failed ({outcome['exit_code']})" if outcome.get("exit_code") else None
            shown = {key: value for key, value in outcome.items() if key not in ("says", "exit_code")}
            words = [failed, *(f"{key.replace('_', ' ')} {value}" for key, value in shown.items())]
            words += [says] if isinstance(says, str) and not shown else []
            lines.append(f"| {part} | {name} | {', '.join(map(str, filter(None, words)))} |")
    return "\n".join(lines) + "\n"


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"date": time.strftime("%Y-%m-%d"), "gpu": gpu, "torch": torch.__version__, "cores": os.cpu_count()}


def child(command: list[str], seconds: float, environment: dict[str, str]) -> tuple[int, str]:
    """Exit code and output of a process; 124 where it took longer, or where too little time is left to start it."""
    left = float(environment[UNTIL]) - time.time()
    if left < LEAST_SECONDS:
        return 124, "not started: the time is over"
    seconds = min(seconds, left)
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=seconds, cwd=ROOT
        )
    except subprocess.TimeoutExpired as late:
        said = (late.stdout or b"").decode(errors="replace")[-1500:]
        return 124, f"{said}\nlonger than {seconds:.0f} s".strip()
    return done.returncode, done.stdout if done.returncode == 0 else done.stdout[-1500:] + done.stderr[-2500:]


# --- tests and runs --------------------------------------------------------------------------------------------------


def run_tests(environment: dict[str, str]) -> Any:
    """pytest -m gpu; in the rehearsal those of one file are collected only."""
    extra = ["--collect-only", "tests/scenarios/test_gpu.py"] if environment.get("LLM_LIGHTNING_REHEARSAL") else []
    command = [sys.executable, "-m", "pytest", "-n", "0", "-m", "gpu", *extra]
    code, output = child(command, PART_SECONDS["tests"], environment)
    lines = output.strip().splitlines()
    yield "pytest -m gpu", {"exit_code": code, "says": lines[-1] if code == 0 else lines[-25:]}


def run_tasks(environment: dict[str, str]) -> Any:
    """Every task with tiny sizes, in two sittings."""
    accelerator = "cpu" if environment.get("LLM_LIGHTNING_REHEARSAL") else "gpu"
    shared = [
        f"accelerator={accelerator}", "model.n_layer=2", "model.n_embd=64", "model.n_head=2", "tokenizer=byte",
        "trainer.enable_progress_bar=false", "trainer.log_every_n_steps=1", "scheduler=constant",
    ]  # fmt: skip
    tasks = {
        "pretraining": ["model.context_length=64", "model.dropout=0.1"],
        "classification": ["task=classification", "model.context_length=64", "task.trained_blocks=1"],
        "sft": ["task=sft", "model.context_length=512", "data.batch_size=4"],
        "lora": ["task=lora", "model.context_length=512", "data.batch_size=4"],
        "dpo": ["task=dpo", "model.context_length=512", "data.batch_size=4"],
        "pretraining, compiled": ["model.context_length=64", "compile=true"],
        "sft, packed, compiled": [
            "task=sft", "model.context_length=512", "data.batch_size=4", "data.packing=true", "compile=true",
        ],
        "pretraining, ddp": ["model.context_length=64", "model.dropout=0.1", *one_process("ddp", accelerator)],
        "pretraining, fsdp": ["model.context_length=64", "model.dropout=0.1", *one_process("fsdp", accelerator)],
        "pretraining, workers": ["model.context_length=64", "data.num_workers=2"],
    }  # fmt: skip
    verbs = {
        "pretraining": [["generate", "RUN", "The"], ["evaluate", "RUN", "--split", "val"], ["export", "RUN", "OUT"]],
        "classification": [["classify", "RUN", "Are you free?"], ["evaluate", "RUN", "--split", "test"]],
        "sft": [["evaluate", "RUN", "--split", "test"], ["respond", "RUN", "--split", "test", "-o", "OUT.json"]],
        "lora": [["generate", "RUN", "The"], ["evaluate", "RUN", "--split", "val"]],
        "dpo": [["evaluate", "RUN", "--split", "test"]],
    }
    if accelerator == "cpu":
        tasks, verbs = {"pretraining": tasks["pretraining"]}, {"pretraining": verbs["pretraining"][:1]}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1 if accelerator == "cpu" else 8) as pool:
        environment = {**environment, "LLM_LIGHTNING_CACHE": f"{folder}/cache"}
        places = {name: Path(folder, name.replace(", ", "_")) for name in tasks}
        futures = {
            name: pool.submit(
                two_sittings, [*replaced(shared, settings), *settings], places[name], environment, verbs.get(name, [])
            )
            for name, settings in tasks.items()
        }
        for name, future in futures.items():
            yield name, future.result()


def one_process(strategy: str, accelerator: str) -> list[str]:
    """The settings of a strategy for several devices, with one."""
    return [f"accelerator={strategy}", f"trainer.accelerator={accelerator}", "trainer.devices=1"]


def replaced(shared: list[str], settings: list[str]) -> list[str]:
    """`shared` without what `settings` choose; a group can be chosen once only."""
    chosen = tuple(word.partition("=")[0] + "=" for word in settings)
    return [word for word in shared if not word.startswith(chosen)]


def two_sittings(
    settings: list[str], place: Path, environment: dict[str, str], verbs: list[list[str]]
) -> dict[str, Any]:
    """Whether 8 updates at once and 4 and 4 end with the same weights; then the verbs on them."""
    import torch

    started = time.monotonic()
    for run, steps in (("whole", 8), ("parts", 4), ("parts", 8)):
        words = [*settings, f"trainer.max_steps={steps}", f"hydra.run.dir={place / run}"]
        code, message = child([sys.executable, "train.py", *words], PART_SECONDS["runs"], environment)
        if code:
            return {"exit_code": code, "says": message.splitlines()[-12:]}
    precision = next(line for line in message.splitlines() if line.startswith("Precision"))
    checkpoints = [place / run / "checkpoints" / "last.ckpt" for run in ("whole", "parts")]
    one, other = (torch.load(path, map_location="cpu", weights_only=True)["state_dict"] for path in checkpoints)
    equal = all(torch.equal(one[key], other[key]) for key in one)
    found = {"says": precision, "two sittings equal one to the bit": equal}
    for verb in verbs:
        words = [word.replace("RUN", str(place / "whole")).replace("OUT", str(place / "out")) for word in verb]
        code, message = child([sys.executable, "-m", "llm_lightning", *words], PART_SECONDS["runs"], environment)
        found[verb[0]] = "passed" if code == 0 else {"exit_code": code, "says": message.splitlines()[-12:]}
    return {"seconds": round(time.monotonic() - started), **found}


# --- training --------------------------------------------------------------------------------------------------------


def contest(part: str, names: list[str]) -> Callable[[dict[str, str]], Any]:
    """Each contender in a process of its own."""

    def run(environment: dict[str, str]) -> Any:
        rehearses = "LLM_LIGHTNING_REHEARSAL" in environment  # in one process, which imports once
        for together in [names] if rehearses else [[name] for name in names]:
            limit = PART_SECONDS[part] * (20 if rehearses else 1)
            command = [sys.executable, __file__, "--contender", ",".join(together)]
            code, output = child(command, limit, environment)
            lines = [line for line in output.splitlines() if line.startswith("{")]
            for name, line in zip(together, lines, strict=False):
                yield name, json.loads(line)
            if code:
                yield together[len(lines) % len(together)], {"exit_code": code, "says": output[-2500:]}

    return run


def synchronize() -> None:
    import torch

    if DEVICE == "cuda":
        torch.cuda.synchronize()


def figures(seconds: float) -> dict[str, float]:
    """Tokens/s of one step, the share of the card's peak, and the most memory that tensors took."""
    import torch

    from llm_lightning.callbacks.throughput import known_peak
    from llm_lightning.models.gpt import GPT, GPTConfig

    with torch.device("meta"):
        flops = GPT(GPTConfig(context_length=TIME, **SIZES)).flops_per_token(TIME)
    rate = BATCH * TIME / seconds
    found = {"tokens_per_second": round(rate), "step_ms": round(1e3 * seconds, 1)}
    if DEVICE == "cuda":
        peak = known_peak(torch.cuda.get_device_name())
        found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        if peak is not None:
            found["mfu"] = round(rate * flops / (peak * 1e12), 3)
    return found


def ours(*, compiled: bool = False, deterministic: bool = True, lora_rank: int = 0) -> dict[str, float]:
    """PretrainingModule and a Trainer, as configured by default."""
    import lightning as L
    import torch

    from llm_lightning.data.base import BaseDataModule
    from llm_lightning.data.batches import Example, collate_padded
    from llm_lightning.models.gpt import GPT, GPTConfig
    from llm_lightning.models.lora import LoRAConfig
    from llm_lightning.optim.adamw import AdamWConfig
    from llm_lightning.optim.schedules import WarmupCosineConfig
    from llm_lightning.tasks.pretraining import PretrainingModule
    from llm_lightning.tokenizers.build import build_tokenizer

    class RandomTokens(BaseDataModule):
        eval_samples: dict[str, Any] = {}  # noqa: RUF012

        def build(self) -> None:
            ids = torch.randint(0, VOCABULARY, ((WARMUP + STEPS) * BATCH, TIME + 1)).numpy()
            self.train_samples = [Example(i, row) for i, row in enumerate(ids)]  # type: ignore[assignment]

        def collate(self, samples: Any) -> Any:
            return collate_padded(samples, pad_id=0)

        def preview(self, n: int) -> str:
            return ""

        def describe(self) -> str:
            return ""

    class Clock(L.Callback):
        """The time of the steps behind the warmup; one wait for the GPU at each end."""

        start = seconds = 0.0

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == WARMUP:
                synchronize()
                self.start = time.perf_counter()
            if trainer.global_step == WARMUP + STEPS:
                synchronize()
                self.seconds = (time.perf_counter() - self.start) / STEPS

    data, clock = RandomTokens(batch_size=BATCH), Clock()
    data.build()
    module = PretrainingModule(
        model=GPT(GPTConfig(context_length=TIME, **SIZES)), tokenizer=build_tokenizer("gpt2"),
        optimizer=AdamWConfig(), scheduler=WarmupCosineConfig(),
        lora=LoRAConfig(rank=lora_rank, alpha=lora_rank) if lora_rank else None,
    )  # fmt: skip
    if compiled:
        module.compile_model()
    trainer = L.Trainer(
        accelerator="gpu" if DEVICE == "cuda" else "cpu", devices=1, precision="bf16-mixed",
        deterministic=deterministic, max_epochs=1, logger=False, callbacks=[clock], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return figures(clock.seconds)


def loop(step: Callable[[], Any]) -> dict[str, float]:
    """Time of `step` behind the warmup."""
    for _ in range(WARMUP):
        step()
    synchronize()
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    synchronize()
    return figures((time.perf_counter() - start) / STEPS)


def transformers(*, compiled: bool) -> dict[str, float]:
    """GPT2LMHeadModel with SDPA, fp32 weights under bf16 autocast, fused AdamW, clipping."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.set_float32_matmul_precision("high")
    sizes = {"n_positions": TIME, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **SIZES}
    model = GPT2LMHeadModel(GPT2Config(**sizes)).to(DEVICE).train()
    run = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.1, fused=True)

    def step() -> None:
        tokens = torch.randint(0, VOCABULARY, (BATCH, TIME), device=DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = run(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return loop(step)


def peft() -> dict[str, float]:
    """Adapters of rank 16 on a GPT2LMHeadModel in bf16, as strong as PEFT is."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_positions": TIME, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **SIZES}
    targets = ["c_attn", "c_proj", "c_fc"]
    config = LoraConfig(r=16, lora_alpha=16, target_modules=targets, fan_in_fan_out=True)
    model = get_peft_model(GPT2LMHeadModel(GPT2Config(**sizes)).bfloat16(), config).to(DEVICE).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=4e-4, weight_decay=0.1, fused=True)

    def step() -> None:
        tokens = torch.randint(0, VOCABULARY, (BATCH, TIME), device=DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return loop(step)


def bare_loop() -> dict[str, float]:
    """The core without Lightning and without our loss: logits, cross_entropy, everything compiled, as nanoGPT does."""
    import torch
    import torch.nn.functional as F

    from llm_lightning.models.gpt import GPT, GPTConfig

    torch.set_float32_matmul_precision("high")
    model = GPT(GPTConfig(context_length=TIME, **SIZES)).to(DEVICE).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.1, fused=True)

    def cost(tokens: torch.Tensor) -> torch.Tensor:
        logits = model(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    compiled = torch.compile(cost)

    def step() -> None:
        tokens = torch.randint(0, VOCABULARY, (BATCH, TIME + 1), device=DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = compiled(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return loop(step)


# --- instruction tuning ----------------------------------------------------------------------------------------------


def sft(name: str) -> dict[str, float]:
    """A contender of `sft.py`: the rate from the third batch on, and the loss of all measured batches."""
    import torch
    from sft import BATCHES, measure, prepare

    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), shuffled=False)
        run = measure(name, Path(folder), 4 if REHEARSAL else BATCHES, shuffled=False)
    found = {key: round(run[key], 4) for key in ("records_per_second", "loss")}
    if DEVICE == "cuda":
        found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return found


def dpo(name: str) -> dict[str, float]:
    """A contender of `dpo.py`: the rate from the third batch on, and the first loss, ln 2."""
    import torch
    from dpo import BATCHES, measure, prepare

    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), 4 if REHEARSAL else BATCHES)
        run = measure(name, Path(folder))
    found = {key: round(run[key], 4) for key in ("pairs_per_second", "first_loss")}
    if DEVICE == "cuda":
        found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return found


# --- generation ------------------------------------------------------------------------------------------------------


def generation(batch: int, peer: bool) -> dict[str, float]:
    """Greedy continuation of prompts of 64 random tokens, bf16; the median of three, behind one to warm up."""
    import torch

    new_tokens = 4 if REHEARSAL else 256
    prompt = 8 if REHEARSAL else 64
    prompts = torch.randint(0, VOCABULARY, (batch, prompt))
    if peer:
        from transformers import GPT2Config, GPT2LMHeadModel

        theirs = GPT2LMHeadModel(GPT2Config(**SIZES)).to(DEVICE, torch.bfloat16).eval()
        options: dict[str, Any] = {"do_sample": False, "min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
        ids = prompts.to(DEVICE)

        def run() -> None:
            theirs.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
    else:
        from llm_lightning.inference.generation import generate
        from llm_lightning.models.gpt import GPT, GPTConfig

        model = GPT(GPTConfig(**SIZES)).to(DEVICE, torch.bfloat16).eval()

        def run() -> None:
            generate(model, prompts.tolist(), max_new_tokens=new_tokens)

    seconds = []
    with torch.no_grad() if peer else nullcontext():
        for _ in range(4):
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            seconds.append(time.perf_counter() - start)
    found = {"tokens_per_second": round(batch * new_tokens / statistics.median(seconds[1:]), 1)}
    if DEVICE == "cuda":
        found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return found


TRAINING: dict[str, Callable[..., Any]] = {
    "ours": ours,
    "ours_compiled": lambda: ours(compiled=True),
    "transformers": lambda: transformers(compiled=False),
    "bare_loop_compiled": bare_loop,
    "transformers_compiled": lambda: transformers(compiled=True),
    "ours_compiled_not_deterministic": lambda: ours(compiled=True, deterministic=False),
}
SFT: dict[str, Callable[..., Any]] = {
    f"sft_{name}": lambda name=name: sft(name) for name in ("ours", "trl_autocast", "ours_padded")
}
DPO: dict[str, Callable[..., Any]] = {f"dpo_{name}": lambda name=name: dpo(name) for name in ("copy", "trl")}
LORA: dict[str, Callable[..., Any]] = {"lora_ours": lambda: ours(lora_rank=16), "lora_peft": peft}
GENERATION: dict[str, Callable[..., Any]] = {
    "ours_batch": lambda batch: generation(batch, peer=False),
    "transformers_batch": lambda batch: generation(batch, peer=True),
}
CONTENDERS = {**TRAINING, **SFT, **DPO, **LORA, **GENERATION}
PARTS = {
    "tests": run_tests,
    "training": contest("training", list(TRAINING)),
    "sft": contest("sft", list(SFT)),
    "dpo": contest("dpo", list(DPO)),
    "generation": contest("generation", [f"{name}:{batch}" for batch in (1, 8, 64) for name in GENERATION]),
    "lora": contest("lora", list(LORA)),
    "runs": run_tasks,
}

if __name__ == "__main__":
    main()
