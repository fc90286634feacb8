"""peft_cpu.py MODEL DATA TOKENS STEPS THREADS OUT [--checkpointing]: trains a LoRA with transformers + PEFT in float32 on the CPU,
one row of TOKENS tokens a step, and writes {"loss": [...], "seconds": [...], "version": "..."} to OUT. Started by cpu-race.

The loop is the bare one (no Trainer), which is the fastest that a user of these libraries would write."""
import argparse
import json
import time

parser = argparse.ArgumentParser()
for name in ("model", "data", "tokens", "steps", "threads", "out"):
    parser.add_argument(name)
parser.add_argument("--checkpointing", action="store_true")
args = parser.parse_args()

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(int(args.threads))
torch.manual_seed(42)
tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="sdpa")
if args.checkpointing:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
model.config.use_cache = False
projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=projections,
                                         task_type="CAUSAL_LM"))
model.train()
weights = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(weights, lr=2e-4, weight_decay=0.0)

rows = [json.loads(line)["text"] for line in open(args.data, encoding="utf-8")]
losses, seconds = [], []
for step in range(int(args.steps)):
    ids = tokenizer(rows[step % len(rows)], add_special_tokens=False)["input_ids"][: int(args.tokens)]
    assert len(ids) == int(args.tokens), f"row {step} has {len(ids)} tokens"
    ids = torch.tensor([ids])
    start = time.perf_counter()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    seconds.append(time.perf_counter() - start)
with open(args.out, "w") as f:
    versions = f"transformers {transformers.__version__} peft {peft.__version__} torch {torch.__version__}"
    json.dump({"loss": losses, "seconds": seconds, "version": versions}, f)
