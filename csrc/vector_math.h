// Elementary functions as plain arithmetic, so that loops over them become vector instructions; the C library's are calls.
#pragma once
#include <cmath>

#include "numeric.h"

namespace slicefine {
namespace SLICEFINE_ISA {

// e^x within 2 units in the last place of float32 for -87 <= x <= 88, held to that range outside of it.
static inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  // adding 1.5 * 2^23 rounds to a whole number, which then stands in the low bits
  const float shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return bits_float(float_bits(p) + ((float_bits(shifted) - 0x4B400000u) << 23));
}

static inline double exponential(double x) { return std::exp(x); }

// 1 / (1 + e^-x)
template <typename A>
static inline A logistic(A x) { return A(1) / (A(1) + exponential(-x)); }

}  // namespace SLICEFINE_ISA
}  // namespace slicefine
