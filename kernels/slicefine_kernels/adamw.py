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
    # decoupled: the decay scales p itself and never enters the moments
    p = p * (1.0 - lr * weight_decay)
    # m_t = beta1 m + (1 - beta1) g, as a lerp: the same order of operations as torch's
    m = m + (g - m) * (1.0 - beta1)
    v = v * beta2 + (1.0 - beta2) * g * g
    # eps stands outside the root, beside sqrt(v_hat): where torch.optim.AdamW has it
    return p - (lr / correction1) * (m / (tl.sqrt(v) / tl.sqrt(correction2) + eps)), m, v


@triton.jit
def round_bf16(x):
    """float32 -> bfloat16, to nearest, ties to even. Spelled out: Triton's interpreter truncates in
    a plain cast.
    """
    bits = x.to(tl.uint32, bitcast=True)
    # adding to the bits of a NaN could turn it into an infinity or a zero
    finite = (bits & 0x7F800000) != 0x7F800000
    # half a unit of the bits cut off, plus the last kept bit: a tie goes to the even neighbor
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return tl.where(finite, nearest.to(tl.float32, bitcast=True), x).to(tl.bfloat16)


@triton.jit
def round_bf16_stochastic(x, random):
    """float32 -> bfloat16, up with probability = the fraction cut off; `random` is uniform on 32
    bits.
    """
    bits = x.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    # a carry out of the low 16 bits happens with probability (low 16 bits) / 2^16
    up = (bits + (random & 0xFFFF)) & 0xFFFF0000
    return tl.where(finite, up.to(tl.float32, bitcast=True), x).to(tl.bfloat16)


@triton.jit
def philox_word(seed, c0, c1):
    """First word of Philox4x32-10 with key seed and counter (c0, c1, 0, 0)."""
    # a tensor of zeros of the counter's shape and type
    zero = c0 * 0
    # counter-based: no random state in memory, and any program can draw the bits of any element
    word, _, _, _ = tl.philox(seed, c0, zero + c1, zero, zero)
    return word
