"""Routes bitsandbytes' CPU ops to its own pure-torch kernels.

bitsandbytes 0.50.2's compiled CPU kernels are wrong on some processors: 4-bit dequantisation where a row's length is a
multiple of 16 but not of 64, and near-ties of the nested 8-bit codes. The pure-torch kernels of the same package agree with its
CUDA kernels, so files are judged by those."""
import math

import bitsandbytes  # noqa: F401  registers the ops
import torch
from bitsandbytes.backends.default import ops
from bitsandbytes.backends.utils import _get_4bit_code


def plain(f):
    """The function under torch.compile's wrapper."""
    return getattr(f, "__wrapped__", f)


_dequantize_4bit, _dequantize_8bit = plain(ops._dequantize_4bit_compute), plain(ops._dequantize_blockwise_compute)


def dequantize_4bit(a, absmax, blocksize, quant_type, shape, dtype):
    code = _get_4bit_code(quant_type, a.device)
    flat = _dequantize_4bit(a.view(torch.uint8).reshape(-1), absmax.float(), code, blocksize, (math.prod(shape),), dtype)
    return flat.reshape(tuple(shape))


def dequantize_blockwise(a, absmax, code, blocksize, dtype):
    return _dequantize_8bit(a.reshape(-1), absmax, code, blocksize, dtype).reshape(a.shape)


def quantize_blockwise(a, code, blocksize):
    """The nearest code, the lower of two that are equally near."""
    flat = a.reshape(-1).float()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % blocksize)).view(-1, blocksize)
    absmax = blocks.abs().amax(dim=1)
    share = blocks / torch.where(absmax == 0, 1.0, absmax)[:, None]
    codes = torch.searchsorted((code[:-1] + code[1:]) * 0.5, share.contiguous())
    return codes.to(torch.uint8).reshape(-1)[: flat.numel()].reshape(a.shape), absmax


def install():
    library = torch.library.Library("bitsandbytes", "IMPL")
    library.impl("dequantize_4bit", dequantize_4bit, "CPU", allow_override=True)
    library.impl("dequantize_blockwise", dequantize_blockwise, "CPU", allow_override=True)
    library.impl("quantize_blockwise", quantize_blockwise, "CPU", allow_override=True)
    return library  # the overrides live as long as this
