// Storage types and their conversions on the host, scalar and by vectors of SLICEFINE_LANES floats.
#pragma once
#include "adamw.h"

namespace slicefine {

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

enum class DType { f32 = 0, f64 = 1, bf16 = 2, fp16 = 3 };  // slicefine/backends/cpu.py holds the same numbers

constexpr int64_t kQuantum = 256;  // moments in 8 bits that share a scale; slicefine/backends/operands.py holds the same number

template <typename T> struct Accumulate { using type = float; };
template <> struct Accumulate<double> { using type = double; };
template <typename T> using accumulate_t = typename Accumulate<T>::type;

SLICEFINE_HD float load(const float* p) { return *p; }
SLICEFINE_HD double load(const double* p) { return *p; }
SLICEFINE_HD float load(const bf16* p) { return bits_float(uint32_t(p->bits) << 16); }
SLICEFINE_HD float load(const fp16* p) {
  // Shift into place and rescale by 2^112, which normalizes subnormals too; inf and NaN keep the full exponent.
  const uint32_t magnitude = p->bits & 0x7FFFu, sign = uint32_t(p->bits & 0x8000u) << 16;
  const uint32_t scaled = float_bits(bits_float(magnitude << 13) * 0x1p112f);
  return bits_float((magnitude >= 0x7C00u ? (magnitude << 13) | 0x7F800000u : scaled) | sign);
}

SLICEFINE_HD void store(float* p, float x) { *p = x; }
SLICEFINE_HD void store(double* p, double x) { *p = x; }
SLICEFINE_HD void store(bf16* p, float x) { p->bits = round_bf16(x); }
SLICEFINE_HD void store(fp16* p, float x) {
  const uint32_t u = float_bits(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7FFFFFFFu;
  uint32_t half;
  if (magnitude > 0x7F800000u) {
    half = 0x7E00u;
  } else if (magnitude >= 0x477FF000u) {  // rounds beyond 65504
    half = 0x7C00u;
  } else if (magnitude < 0x38800000u) {   // subnormal: let the addition of 0.5 round at 2^-24
    half = float_bits(bits_float(magnitude) + 0.5f) - 0x3F000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  }
  p->bits = uint16_t(half | sign);
}

// A positive second moment never rounds to zero: the first moment of such an element survives, and its next step would be
// tens of times too large. Among signed codes 0 is the most negative and no positive value's.
SLICEFINE_HD uint32_t nonzero_code(uint32_t code, float value) { return code + (code == 0 && value > 0.0f ? 1u : 0u); }

}  // namespace slicefine
