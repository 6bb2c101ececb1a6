// One element of AdamW and of the rounding that follows it: the only arithmetic of the optimizer, for host and device.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define SLICEFINE_HD static __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define SLICEFINE_HD static __forceinline
#else
// Never a shared symbol: these bodies are compiled once per instruction set, and the linker must not merge the copies.
#define SLICEFINE_HD static inline __attribute__((always_inline))
#endif

namespace slicefine {

// The scalars of one step of one slice, computed once in double.
template <typename T>
struct AdamWScalars {
  T keep;             // 1 - lr * weight_decay
  T one_minus_beta1;
  T beta2;
  T one_minus_beta2;
  T step_size;        // lr / (1 - beta1^step)
  T sqrt_correction2; // sqrt(1 - beta2^step)
  T eps;
  T sign;             // -1 to maximize
};

template <typename T>
SLICEFINE_HD AdamWScalars<T> adamw_scalars(double lr, double beta1, double beta2, double eps, double weight_decay,
                                           bool maximize, double step) {
  return {T(1.0 - lr * weight_decay), T(1.0 - beta1), T(beta2), T(1.0 - beta2),
          T(lr / (1.0 - pow(beta1, step))), T(sqrt(1.0 - pow(beta2, step))), T(eps), T(maximize ? -1.0 : 1.0)};
}

// What a step needs that does not depend on its count, for kernels that read the count from device memory.
template <typename T>
struct AdamWConstants {
  T lr, keep, one_minus_beta1, beta2, one_minus_beta2, log_beta1, log_beta2, eps, sign;
};

template <typename T>
SLICEFINE_HD AdamWConstants<T> adamw_constants(double lr, double beta1, double beta2, double eps, double weight_decay,
                                               bool maximize) {
  return {T(lr), T(1.0 - lr * weight_decay), T(1.0 - beta1), T(beta2), T(1.0 - beta2),
          T(log(beta1)), T(log(beta2)), T(eps), T(maximize ? -1.0 : 1.0)};
}

// 1 - beta^step = -expm1(step log beta) is accurate in float32 also for a beta close to 1.
template <typename T>
SLICEFINE_HD AdamWScalars<T> adamw_scalars(const AdamWConstants<T>& c, T step) {
  return {c.keep, c.one_minus_beta1, c.beta2, c.one_minus_beta2, c.lr / -std::expm1(step * c.log_beta1),
          std::sqrt(-std::expm1(step * c.log_beta2)), c.eps, c.sign};
}

// Decoupled weight decay, then Adam (Loshchilov & Hutter 2019, algorithm 2), in torch.optim.AdamW's order of operations.
template <typename T>
SLICEFINE_HD T adamw_update(T p, T g, T& m, T& v, const AdamWScalars<T>& s) {
  g *= s.sign;
  p *= s.keep;
  m += (g - m) * s.one_minus_beta1;
  v = v * s.beta2 + s.one_minus_beta2 * g * g;
  return p - s.step_size * (m / (std::sqrt(v) / s.sqrt_correction2 + s.eps));
}

// Philox4x32-10 (Salmon et al. 2011), first of the four words; counter = (c0, c1, 0, 0).
SLICEFINE_HD uint32_t philox(uint64_t seed, uint32_t c0, uint32_t c1) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32), c2 = 0, c3 = 0;
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * c0, b = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(b >> 32) ^ c1 ^ k0;
    c1 = uint32_t(b);
    c2 = uint32_t(a >> 32) ^ c3 ^ k1;
    c3 = uint32_t(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

SLICEFINE_HD uint32_t float_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}

SLICEFINE_HD float bits_float(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

SLICEFINE_HD bool is_inf_or_nan(uint32_t bits) { return (bits & 0x7F800000u) == 0x7F800000u; }

// float -> bfloat16 bits, to nearest, ties to even; a NaN stays a (quiet) NaN.
SLICEFINE_HD uint16_t round_bf16(float x) {
  const uint32_t u = float_bits(x);
  if (is_inf_or_nan(u)) return uint16_t((u >> 16) | ((u & 0xFFFFu) ? 0x40u : 0u));
  return uint16_t((u + 0x7FFFu + ((u >> 16) & 1u)) >> 16);
}

// float -> bfloat16 bits, up with probability = the fraction cut off; `random` is uniform on 32 bits.
SLICEFINE_HD uint16_t round_bf16_stochastic(float x, uint32_t random) {
  const uint32_t u = float_bits(x);
  if (is_inf_or_nan(u)) return round_bf16(x);
  return uint16_t((u + (random & 0xFFFFu)) >> 16);
}

}  // namespace slicefine
