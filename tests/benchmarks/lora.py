"""LoRA at 124M, batch 4 x 256: ours through a real Trainer, PEFT on transformers' GPT-2.

    python tests/benchmarks/run.py lora [--quick]

Rank 16 on every linear layer of the blocks, adapters in fp32, next-token loss on random tokens, AdamW and clipping,
bf16 autocast. Ours keeps the frozen weights in bf16. PEFT does so in `peft_bf16`, its strongest form; `peft` has them
in fp32, as its examples leave them.
"""

from __future__ import annotations

from contest import Run, peak_mib, timed
from training import BATCH, TIME, VOCABULARY, WARMUP_STEPS, contest_of, train_ours

SETTINGS = {"parameters": "124M", "rank": 16, "batch": f"{BATCH} x {TIME}"}


def ours(steps: int) -> tuple[float, Run]:
    """A PretrainingModule with adapters."""
    from llm_lightning.models.lora import LoRAConfig

    return train_ours(steps, lora=LoRAConfig(rank=16, alpha=16))


def peft(steps: int) -> tuple[float, Run]:
    """fp32 weights under bf16 autocast."""
    return with_peft(steps, bf16_base=False)


def peft_bf16(steps: int) -> tuple[float, Run]:
    """Frozen weights in bf16, adapters in fp32."""
    return with_peft(steps, bf16_base=True)


def with_peft(steps: int, *, bf16_base: bool) -> tuple[float, Run]:
    """Train adapters on a GPT2LMHeadModel as the Trainer of transformers does."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    baseline = peak_mib()
    base = GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    if bf16_base:
        base.bfloat16()
    targets = ["c_attn", "c_proj", "c_fc"]
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=16, target_modules=targets, fan_in_fan_out=True)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=4e-4, weight_decay=0.1, fused=True)

    def step() -> None:
        tokens = torch.randint(0, VOCABULARY, (BATCH, TIME))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    timed(step, WARMUP_STEPS)
    return baseline, timed(step, steps)


CONTENDERS = {"ours": ours, "peft": peft, "peft_bf16": peft_bf16}


if __name__ == "__main__":
    contest_of(__file__, __doc__, CONTENDERS, "lora", SETTINGS)
