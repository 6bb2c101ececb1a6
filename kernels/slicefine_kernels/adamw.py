"""One element of AdamW and of the rounding that follows it; the twin of csrc/adamw.h."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def one_minus_power(log_beta, step):
    """1 - beta**step = -expm1(step * log(beta)), accurate in float32 where beta is close to 1;
    log_beta < 0.
    """
    z = step * log_beta
    # five terms of expm1: 1 - exp(z) loses its digits where z is near 0
    series = -z * (1.0 + z * (0.5 + z * (0.16666667 + z * (0.041666668 + z * 0.008333334))))
    return tl.where(z > -0.25, series, 1.0 - tl.exp(z))


@triton.jit
def adamw_update(p, g, m, v, lr, beta1, beta2, eps, weight_decay, correction1, correction2):
    """Decoupled weight decay, then Adam (Loshchilov & Hutter 2019, algorithm 2) -> (p, m, v)."""
    p = p * (1.0 - lr * weight_decay)
    m = m + (g - m) * (1.0 - beta1)
    v = v * beta2 + (1.0 - beta2) * g * g
    return p - (lr / correction1) * (m / (tl.sqrt(v) / tl.sqrt(correction2) + eps)), m, v


@triton.jit
def round_bf16(x):
    """float32 -> bfloat16, to nearest, ties to even. Spelled out: Triton's interpreter truncates in
    a plain cast.
    """
    bits = x.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return tl.where(finite, nearest.to(tl.float32, bitcast=True), x).to(tl.bfloat16)


@triton.jit
def round_bf16_stochastic(x, random):
    """float32 -> bfloat16, up with probability = the fraction cut off; `random` is uniform on 32
    bits.
    """
    bits = x.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    up = (bits + (random & 0xFFFF)) & 0xFFFF0000
    return tl.where(finite, up.to(tl.float32, bitcast=True), x).to(tl.bfloat16)


@triton.jit
def philox_word(seed, c0, c1):
    """First word of Philox4x32-10 with key seed and counter (c0, c1, 0, 0)."""
    # a tensor of zeros of the counter's shape and type
    zero = c0 * 0
    word, _, _, _ = tl.philox(seed, c0, zero + c1, zero, zero)
    return word
