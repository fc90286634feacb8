"""gpu_step.py model DIR                        makes a random model of Mistral-7B's shape
gpu_step.py TOOL CHECKPOINTING DIR CSV          TOOL: unsloth or hf; CHECKPOINTING: true or false

Times whole QLoRA training steps of the model at DIR on one GPU, shape by shape, and appends a row for each to CSV. A shape
that does not fit is a line of the log. unsloth: Unsloth; with checkpointing its own ("unsloth"). hf: transformers, PEFT and
bitsandbytes; without checkpointing also without prepare_model_for_kbit_training, which is faster. Started by gpu-race.

--toy, last: a small model on the CPU, to try the script itself."""
import gc
import os
import sys
import time

import gpu_common as common

words = sys.argv[1:]
TOY = words[-1:] == ["--toy"]
if TOY:
    words.pop()
if words in (["-h"], ["--help"]):
    print(__doc__)
    sys.exit(0)
MAKE = words[:1] == ["model"] and len(words) == 2
if not MAKE and (len(words) != 4 or words[0] not in ("unsloth", "hf") or words[1] not in ("true", "false")):
    sys.exit(__doc__)

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1", TOKENIZERS_PARALLELISM="false",
                  HF_HUB_DISABLE_PROGRESS_BARS="1")
import torch

DEVICE = "cpu" if TOY else "cuda"
SHAPES = [(1, 32), (2, 32)] if TOY else [(1, 512), (1, 2048), (4, 2048), (1, 8192)]
WARM_UP, STEPS = (1, 2) if TOY else (4, 10)
R, PROJECTIONS = 16, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = {"r": R, "lora_alpha": 2 * R, "lora_dropout": 0.0, "bias": "none", "target_modules": PROJECTIONS}
VOCABULARY = 32000


def make(path):
    """Random weights, and a tokenizer that is only there because Unsloth loads one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
             "num_key_value_heads": 8}
    if TOY:
        sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "num_key_value_heads": 2}
    config = MistralConfig(vocab_size=VOCABULARY, max_position_embeddings=32768, rope_theta=1e6, sliding_window=None,
                           bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        model = MistralForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(path, max_shard_size="4GB")
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path)


def load_unsloth(path, checkpointing):
    from unsloth import FastLanguageModel
    free, start = free_memory(), time.perf_counter()
    model, _ = FastLanguageModel.from_pretrained(path, max_seq_length=max(l for _, l in SHAPES), dtype=torch.bfloat16,
                                                 load_in_4bit=True)
    seconds = time.perf_counter() - start
    model = FastLanguageModel.get_peft_model(model, use_gradient_checkpointing="unsloth" if checkpointing else False, **LORA)
    return model, common.version("unsloth"), free, seconds


def load_hf(path, checkpointing):
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    free, start = free_memory(), time.perf_counter()
    quantisation = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                      bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=quantisation, dtype=torch.bfloat16,
                                                 attn_implementation="sdpa", device_map={"": 0 if DEVICE == "cuda" else "cpu"})
    seconds = time.perf_counter() - start
    if checkpointing:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=True,
                                                gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA))
    model.config.use_cache = False
    return model, " + ".join(map(common.version, ("transformers", "peft", "bitsandbytes"))), free, seconds


def free_memory():
    """Bytes of the card that are free; its context is taken by now."""
    return torch.cuda.mem_get_info()[0] if DEVICE == "cuda" else 0


def synchronize():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def start_over():
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def race(tool, checkpointing, path, csv):
    # First of all: Unsloth sets up the allocator, which must not be in use by then.
    model, name, free, load_seconds = (load_unsloth if tool == "unsloth" else load_hf)(path, checkpointing)
    import bitsandbytes as bnb
    card = common.Card(DEVICE)
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    on = [m.gradient_checkpointing for m in model.modules() if hasattr(m, "gradient_checkpointing")]
    weights = sum(p.numel() for p in trainable)
    print(f"{name}, gradient checkpointing {checkpointing} ({sum(map(bool, on))} of {len(on)} modules), loaded in {load_seconds:.1f} s, "
          f"{weights} trainable weights in {trainable[0].dtype}", flush=True)
    if any(on) != checkpointing:
        # Unsloth's own checkpointing need not be in the modules' flags.
        message = "the modules' flags of gradient checkpointing are not as asked for"
        print(f"warning: {message}", flush=True) if tool == "unsloth" else sys.exit(message)
    if not TOY and weights != 41943040:
        sys.exit("LoRA is not on all seven projections")
    optimizer = bnb.optim.PagedAdamW32bit(trainable, lr=1e-4, weight_decay=0.0)

    def step(tokens):
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 0.3)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    torch.manual_seed(1)
    for batch, length in SHAPES:
        start_over()
        times, loss = [], None
        try:
            for _ in range(WARM_UP + STEPS):
                tokens = torch.randint(3, VOCABULARY, (batch, length), device=DEVICE)
                synchronize()
                start = time.perf_counter()
                loss = step(tokens)
                synchronize()
                times.append(time.perf_counter() - start)
        except torch.OutOfMemoryError:
            print(f"{batch} x {length}: out of memory at {torch.cuda.max_memory_allocated() / 1e9:.2f} GB", flush=True)
            loss = None
        if loss is None:
            # Behind the handler: the error held on to the activations.
            optimizer.zero_grad()
            continue
        here = card.environment()
        times = sorted(times[WARM_UP:])
        median = common.median(times)
        peak = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None
        driver = free - free_memory() if DEVICE == "cuda" else None
        common.append(csv, common.STEP_COLUMNS, [here | {
            "tool": name, "shape": "toy" if TOY else "mistral-7b", "batch": batch, "length": length,
            "gradient_checkpointing": str(checkpointing).lower(), "memory": "", "r": R, "lora_dropout": 0.0,
            "optim": "paged_adamw_32bit", "steps": len(times), "ms": median * 1e3, "ms_min": times[0] * 1e3,
            "ms_max": times[-1] * 1e3, "tokens_per_second": batch * length / median, "arena_bytes": peak,
            "optimizer_bytes": paged_bytes(optimizer), "driver_bytes": driver, "layers": "", "loss": float(loss),
            "load_seconds": load_seconds}])
        print(f"{batch} x {length}: {median * 1e3:.1f} ms ({times[0] * 1e3:.1f} to {times[-1] * 1e3:.1f}), "
              f"{batch * length / median:.0f} tokens/s, peak {(peak or 0) / 1e9:.2f} GB, loss {float(loss):.3f}", flush=True)


def paged_bytes(optimizer):
    """Bytes of the states in managed memory, which the allocator's peak leaves out."""
    states = [s for state in optimizer.state.values() for s in state.values() if torch.is_tensor(s)]
    return sum(s.numel() * s.element_size() for s in states if getattr(s, "is_paged", False))


if MAKE:
    make(words[1])
else:
    race(words[0], words[1] == "true", words[2], words[3])
