"""gpu_kernels.py CSV [--toy]: the kernels of bitsandbytes, PEFT and PyTorch at the shapes of a 7B, on one GPU, under the names
of op and shape of `halfbyte bench kernels`. Prints a table and appends its rows to CSV. Started by gpu-race.

--toy: small shapes on the CPU, to try the script itself."""
import argparse

import gpu_common as common

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("csv")
parser.add_argument("--toy", action="store_true")
args = parser.parse_args()

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from bitsandbytes import functional as bnbf
from torch.nn.attention import SDPBackend, sdpa_kernel

DEVICE = "cpu" if args.toy else "cuda"
MODEL, C, FF, H, G, D, LAYERS = ("toy", 256, 512, 4, 2, 64, 2) if args.toy else ("7b", 4096, 14336, 32, 8, 128, 32)
TOKENS = (1, 16) if args.toy else (1, 16, 128, 512, 2048, 8192, 16384)
SAMPLES = 3 if args.toy else 30
R = 16
BLOCK, NESTED = 64, 256
# Name, widths of the projections side by side, K.
LINEARS = [("q|k|v", [H * D, G * D, G * D], C), ("o", [C], H * D), ("gate|up", [FF, FF], C), ("down", [C], FF)]
TORCH, BNB = f"torch {torch.__version__}", common.version("bitsandbytes")


def random(*shape, scale=1.0):
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) * scale


class Table:
    def __init__(self):
        self.card, self.clock = common.Card(DEVICE), common.Clock(DEVICE)
        self.copy, self.product = self.ceilings()
        print(f"{self.card.name}, driver {self.card.driver()}; copy {self.copy / 1e9:.0f} GB/s, "
              f"product {self.product / 1e12:.1f} TFLOP/s", flush=True)

    def ceilings(self):
        """Bytes a second of the best copy, read and write counted; operations a second of the best product."""
        size = (1 if args.toy else 512) << 20
        source, target = torch.zeros(size, dtype=torch.uint8, device=DEVICE), torch.empty(size, dtype=torch.uint8, device=DEVICE)
        copy = 2 * size / self.clock.seconds(lambda: target.copy_(source), SAMPLES)[0]
        del source, target
        product = 0.0
        for m, n, k in [(64, C, C)] if args.toy else [(8192, 4096, 4096), (8192, 8192, 8192), (8192, 28672, 4096)]:
            x, w = random(m, k), random(n, k, scale=0.02)
            product = max(product, 2.0 * m * n * k / self.clock.seconds(lambda: x @ w.T, SAMPLES)[0])
        return copy, product

    def row(self, tool, op, shape, implementation, run, nbytes, flops=0.0, tokens=None, before=None, graph=True):
        """Times `run`, which takes what `before` gives, and adds a row; one that fails is a line of the log and no more."""
        try:
            floor = max(nbytes / self.copy, flops / self.product)
            times = self.clock.seconds(run, SAMPLES, graph, before)
            if graph and common.median(times) < 0.5 * floor:  # part of it went into another stream
                times = self.clock.seconds(run, SAMPLES, False, before)
        except (RuntimeError, NotImplementedError) as e:
            print(f"{op:<18} {shape:<36} {implementation:<34} not run: {' '.join(str(e).split())[:160]}", flush=True)
            if DEVICE == "cuda":
                torch.cuda.empty_cache()
            return
        here = self.card.environment()
        median = common.median(times)
        common.append(args.csv, common.KERNEL_COLUMNS, [here | {
            "tool": tool, "model": MODEL, "op": op, "shape": shape, "tokens": tokens, "implementation": implementation,
            "samples": len(times), "median_us": median * 1e6, "least_us": times[0] * 1e6, "most_us": times[-1] * 1e6,
            "bytes": int(nbytes), "flops": int(flops), "gb_per_s": nbytes / median / 1e9,
            "tflop_per_s": flops / median / 1e12, "copy_gb_per_s": self.copy / 1e9,
            "product_tflop_per_s": self.product / 1e12, "floor_us": floor * 1e6,
            "percent_of_floor": 100 * floor / median, "checked": 0}])
        print(f"{op:<18} {shape:<36} {implementation:<34} {median * 1e6:>10.1f} us {nbytes / median / 1e9:>6.0f} GB/s "
              f"{flops / median / 1e12:>6.1f} TFLOP/s {100 * floor / median:>5.1f}% of floor", flush=True)


def weight_bytes(n, k):
    """Packed nibbles, a code a block, an f32 a block of codes, the offset."""
    blocks = -(-n * k // BLOCK)
    return n * k // 2 + blocks + 4 * -(-blocks // NESTED) + 4


def nf4(table):
    for n, k in sorted({(n, k) for _, widths, k in LINEARS for n in (max(widths), sum(widths))} - {(2 * FF, C)}):
        w = random(n, k, scale=0.02)
        packed, state = bnbf.quantize_4bit(w, compress_statistics=True, quant_type="nf4")
        table.row(BNB, "nf4_dequantize", f"{n}x{k} double bf16", "bitsandbytes dequantize_4bit",
                  lambda: bnbf.dequantize_4bit(packed, state), weight_bytes(n, k) + 2 * n * k)
        # halfbyte's op of this shape leaves absmax in f32; the whole of a double quantisation is the second row.
        table.row(BNB, "nf4_quantize", f"{n}x{k} bf16", "bitsandbytes quantize_4bit",
                  lambda: bnbf.quantize_4bit(w, compress_statistics=False, quant_type="nf4"),
                  2 * n * k + n * k // 2 + 4 * n * k // BLOCK)
        table.row(BNB, "nf4_quantize", f"{n}x{k} double bf16", "bitsandbytes quantize_4bit",
                  lambda: bnbf.quantize_4bit(w, compress_statistics=True, quant_type="nf4"), 2 * n * k + weight_bytes(n, k))


def peft_linears(widths, k):
    """A PEFT module for each projection, as get_peft_model makes it of bitsandbytes' Linear4bit; LoRA in f32, B not zero."""
    from peft import LoraConfig, get_peft_model

    class Group(torch.nn.Module):
        is_loaded_in_4bit = True

        def __init__(self):
            super().__init__()
            for i, n in enumerate(widths):
                linear = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=torch.bfloat16, compress_statistics=True,
                                           quant_type="nf4")
                linear.weight = bnb.nn.Params4bit(random(n, k, scale=0.02).cpu(), requires_grad=False,
                                                  compress_statistics=True, quant_type="nf4")
                setattr(self, f"p{i}", linear.to(DEVICE))

        def forward(self, x):
            return [getattr(self, f"p{i}")(x) for i in range(len(widths))]

    names = [f"p{i}" for i in range(len(widths))]
    config = LoraConfig(r=R, lora_alpha=2 * R, lora_dropout=0.0, bias="none", target_modules=names)
    group = get_peft_model(Group(), config).to(DEVICE).train()
    lora = [p for p in group.parameters() if p.requires_grad]
    assert sum(p.numel() for p in lora) == R * sum(n + k for n in widths), "LoRA is not on every projection"
    with torch.no_grad():
        for p in lora:
            p.normal_(std=0.02)
    return group, lora


def linear(table):
    tool = f"{common.version('peft')} + {BNB}"
    for name, widths, k in LINEARS:
        group, lora = peft_linears(widths, k)
        n, r = sum(widths), R * len(widths)
        p = sum(q.numel() for q in lora)
        weight = sum(weight_bytes(width, k) for width in widths)
        for t in TOKENS:
            shape = f"{name} {t}x{k} to {n} r={R}"
            x = random(1, t, k).requires_grad_()
            dy = [random(1, t, width, scale=0.1) for width in widths]

            def forward():
                with torch.autocast(DEVICE, torch.bfloat16):
                    return group(x)

            def without_grad():
                with torch.no_grad():
                    return forward()

            product, side = 2.0 * t * n * k, 2.0 * t * p
            # Read: x, W, A and B. Written: y, and h for the backward.
            nbytes = 2 * t * (k + n + r) + weight + 2 * p
            table.row(tool, "linear_forward", shape, "peft + bitsandbytes", forward, nbytes, product + side, t)
            if t <= 16:  # another kernel than in training
                table.row(tool, "linear_forward", shape, "peft + bitsandbytes (no grad)", without_grad, nbytes, product + side, t)
            # Read: dy, x, h, W, A and B. Written: dx; gradients of A and B in f32, added to.
            nbytes = 2 * t * (n + 2 * k + r) + weight + 2 * p + 8 * p
            table.row(tool, "linear_backward", shape, "peft + bitsandbytes",
                      lambda y: torch.autograd.grad(y, [x, *lora], dy, retain_graph=True), nbytes, product + 2 * side, t,
                      before=forward)
            del x, dy


def gemm(table):
    for n, k in [(sum(widths), k) for _, widths, k in LINEARS]:
        w = random(n, k, scale=0.02)
        for t in TOKENS:
            x = random(t, k)
            table.row(TORCH, "gemm_forward", f"{t}x{n}x{k}", "torch matmul", lambda: x @ w.T,
                      2 * (t * (n + k) + n * k), 2.0 * t * n * k, t)


def elementwise(table):
    for t in TOKENS:
        x, w, gate, up = random(t, C), random(C), random(t, FF), random(t, FF)
        # halfbyte's op also writes 1/rms, in f32.
        table.row(TORCH, "rmsnorm_forward", f"{t}x{C}", "torch rms_norm", lambda: F.rms_norm(x, (C,), w, 1e-5),
                  4 * t * C + 4 * t + 2 * C, tokens=t)
        table.row(TORCH, "swiglu_forward", f"{t}x{FF}", "torch silu*up", lambda: F.silu(gate) * up, 6 * t * FF, tokens=t)


def attention(table):
    for t in TOKENS:
        if t < 16:
            continue
        # (1, heads, T, D) laid out as the projections leave them, T outermost.
        q, do = (random(1, t, H, D, scale=s).transpose(1, 2) for s in (1.0, 0.1))
        k, v = (random(1, t, G, D).transpose(1, 2) for _ in range(2))
        shape, product = f"1x{t} heads {H}:{G}:{D} causal", float(H * D * t * (t + 1))
        forward_bytes = 2 * t * (2 * H + 2 * G) * D + 4 * H * t
        backward_bytes = 4 * t * (2 * H + 2 * G) * D + 4 * H * t
        backends = [("math", SDPBackend.MATH)] if args.toy else [("cudnn", SDPBackend.CUDNN_ATTENTION),
                                                                 ("flash", SDPBackend.FLASH_ATTENTION)]
        for name, backend in backends:
            def forward(q, k, v):
                with sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] != H)

            implementation, inputs = f"torch sdpa ({name})", [q, k, v]
            try:
                forward(*inputs)
            except RuntimeError:
                # It wants a head of k and v for each of q: made outside of the timing, though a model would pay for it.
                implementation = f"torch sdpa ({name}; kv expanded)"
                inputs = [q, *(i.repeat_interleave(H // G, dim=1) for i in (k, v))]
            inputs = [i.detach().requires_grad_() for i in inputs]
            table.row(TORCH, "attention_forward", shape, implementation, lambda: forward(*inputs), forward_bytes, 2 * product, t)
            table.row(TORCH, "attention_backward", shape, implementation,
                      lambda o: torch.autograd.grad(o, inputs, do, retain_graph=True), backward_bytes, 5 * product, t,
                      before=lambda: forward(*inputs))


def adamw(table):
    import bitsandbytes.optim.optimizer as optimizer
    # step() waits for the GPU behind every tensor; the kernels are raced here, not that.
    optimizer.sync_gpu = lambda _: None
    sizes = [R * size for _, widths, k in LINEARS for n in widths for size in (n, k)] * LAYERS
    for bits, kind in [(32, bnb.optim.AdamW32bit), (8, bnb.optim.AdamW8bit)]:
        weights = [torch.nn.Parameter(torch.full((size,), 0.01, device=DEVICE)) for size in sizes]
        for w in weights:
            w.grad = torch.randn_like(w) * 1e-3
        step = kind(weights, lr=1e-4, weight_decay=0.0, is_paged=False).step
        total = sum(sizes)
        # Gradient, weight, m, v read and all but the first written; 8 bits: two f32 a block of 256 as well.
        nbytes = 4 * total + 2 * (4 * total + 2 * bits // 8 * total) + (16 * total // 256 if bits == 8 else 0)
        # It launches into the default stream, whatever the current one is: no graph would hold it.
        table.row(BNB, f"adamw_{bits}bit", f"{total} in {len(sizes)} tensors", "bitsandbytes", step, nbytes, graph=False)


table = Table()
torch.manual_seed(0)
for part in (nf4, linear, gemm, elementwise, attention, adamw):
    part(table)
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
