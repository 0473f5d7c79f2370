"""State as integers: encode and decode, one block at a time. Formulas follow the input's dtype, float32 or float64."""

import torch
from torch import Tensor

LOG_LOW, LOG_SPAN = -32, 48  # the 16-bit log code covers [2^-32, 2^16] times the mean
LOG_LEVELS = 65534


# softsign: int8 momentum


def block_spans(cols: int, block_size: int) -> list[tuple[int, int]]:
    """Cuts a row into blocks of min(block_size, cols), the last one possibly shorter; a block never crosses a row."""
    block = max(1, min(block_size, cols))
    return [(start, min(start + block, cols)) for start in range(0, cols, block)]


def softsign_scale(block: Tensor) -> Tensor:
    """Scales a block by its largest element: fp16(min(absmax, 65504)), 0 where absmax < 2^-14."""
    absmax = block.abs().max()
    return (absmax.clamp(max=65504) if absmax >= 2.0**-14 else torch.zeros_like(absmax)).to(torch.float16)


def encode_softsign(x: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Compands each block: [rows, cols] -> int8 codes of the same shape, fp16 scales [rows, n_blocks].

    z = clamp(x / scale, -1, 1), y = 2z / (1 + |z|), code = round_half_even(127 y).
    """
    spans = block_spans(x.shape[1], block_size)
    codes = torch.zeros(x.shape, dtype=torch.int8)
    scale = torch.zeros(x.shape[0], len(spans), dtype=torch.float16)
    for i in range(x.shape[0]):
        for b, (start, stop) in enumerate(spans):
            block = x[i, start:stop]
            scale[i, b] = softsign_scale(block)
            if scale[i, b] > 0:
                z = (block / scale[i, b].to(x.dtype)).clamp(-1, 1)
                codes[i, start:stop] = (127 * (2 * z / (1 + z.abs()))).round().to(torch.int8)
    return codes, scale


def expand_scale(scale: Tensor, cols: int, block_size: int, dtype: torch.dtype) -> Tensor:
    """Repeats the scale of each block over the block's elements: [rows, n_blocks] -> [rows, cols]."""
    spans = block_spans(cols, block_size)
    repeats = torch.tensor([stop - start for start, stop in spans])
    return scale.to(dtype).repeat_interleave(repeats, dim=1)


def decode_softsign(codes: Tensor, scale: Tensor, block_size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Expands: y = code / 127, x = scale * y / (2 - |y|); code 0 is an exact zero."""
    y = codes.to(dtype) / 127
    return expand_scale(scale, codes.shape[1], block_size, dtype) * y / (2 - y.abs())


# affine: seed A's uint8 blocks


def encode_affine(x: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Spreads 256 levels over each flat block, from its smallest to its largest value.

    zero = min, scale = (max - min) / 255, code = clamp(round((x - zero) / scale), 0, 255). A constant
    block has scale 0 and code 0, hence decodes exactly. Zero itself is in general not representable.
    """
    codes, scales, zeros = [], [], []
    for block in x.flatten().split(block_size):
        zero, scale = block.min(), (block.max() - block.min()) / 255
        safe = scale if scale > 0 else torch.ones_like(scale)
        codes.append(((block - zero) / safe).round().clamp(0, 255).to(torch.uint8))
        scales.append(scale)
        zeros.append(zero)
    return torch.cat(codes), torch.stack(scales), torch.stack(zeros)


def decode_affine(codes: Tensor, scale: Tensor, zero: Tensor, block_size: int) -> Tensor:
    """Maps codes back to values, flat: x = code * scale + zero."""
    blocks = codes.split(block_size)
    return torch.cat([block.to(scale.dtype) * scale[b] + zero[b] for b, block in enumerate(blocks)])


# 16-bit log: row and column vectors


def encode_log16(x: Tensor) -> tuple[Tensor, Tensor]:
    """Takes logs of a non-negative vector: codes 0..65535 (int32 here), one fp32 scale, its mean; code 0 is zero.

    code = 1 + clamp(round((log2(x / scale) + 32) * 65534 / 48), 0, 65534): neighbours differ by 0.05%.
    """
    scale = x.mean().to(torch.float32)
    if scale == 0:
        return torch.zeros_like(x, dtype=torch.int32), scale
    logs = torch.log2(x / scale.to(x.dtype))  # -inf at zero
    codes = 1 + ((logs - LOG_LOW) * (LOG_LEVELS / LOG_SPAN)).round().clamp(0, LOG_LEVELS)
    return torch.where(x > 0, codes, torch.zeros_like(codes)).to(torch.int32), scale


def decode_log16(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Maps codes back to values: x = scale * 2^((code - 1) * 48 / 65534 - 32), and 0 for code 0."""
    x = scale.to(dtype) * torch.exp2((codes.to(dtype) - 1) * (LOG_SPAN / LOG_LEVELS) + LOG_LOW)
    return torch.where(codes > 0, x, torch.zeros_like(x))


# error feedback: a 4-bit residual


def local_step(codes: Tensor, scale: Tensor, block_size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Width of the softsign code at each element: dx/dcode = (scale / 127) * 2 / (2 - |y|)^2."""
    y = codes.to(dtype) / 127
    return expand_scale(scale, codes.shape[1], block_size, dtype) / 127 * 2 / (2 - y.abs()).square()


def encode_with_feedback(x: Tensor, error: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Encodes x plus what earlier roundings lost: e <- e + x - Q(x + e). Returns both as they would be decoded.

    The error is kept in 4 bits: fifteen values -7..7 tile one local step of the code, so it needs no scale of its own.
    """
    codes, scale = encode_softsign(x + error, block_size)
    decoded = decode_softsign(codes, scale, block_size, x.dtype)
    unit = local_step(codes, scale, block_size, x.dtype) / 15
    units = torch.where(unit > 0, (error + x - decoded) / unit, torch.zeros_like(x))
    return decoded, units.round().clamp(-7, 7) * unit
