// out [n, K] = X[:, cols]: what a column slice keeps of its input. Elements are copied as bits; no instruction set of its own.
#include <cstring>

#include "ops.h"
#include "parallel.h"

namespace slicefine {
namespace {

constexpr int64_t kAhead = 16;  // rows between a prefetch and its use: each row of X is on a page of its own

template <typename Bits>
void take(const Bits* x, int64_t stride, const int64_t* cols, int64_t n, int64_t K, Bits* out, int threads) {
  bool neighbors = true;
  for (int64_t i = 1; i < K; ++i) neighbors &= cols[i] == cols[0] + i;
  parallel_for(n, threads, 1 + (1 << 15) / K, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const Bits* row = x + t * stride;
      if (neighbors) {
#if defined(__GNUC__)
        if (t + kAhead < end) __builtin_prefetch(row + kAhead * stride + cols[0]);
#endif
        std::memcpy(out + t * K, row + cols[0], K * sizeof(Bits));
      } else {
        for (int64_t i = 0; i < K; ++i) out[t * K + i] = row[cols[i]];
      }
    }
  });
}

}  // namespace

void take_columns(const void* x, int64_t stride, const int64_t* cols, int64_t n, int64_t K, DType dtype, void* out, int threads) {
  if (n == 0 || K == 0) return;
  switch (dtype) {
    case DType::f64: return take(static_cast<const uint64_t*>(x), stride, cols, n, K, static_cast<uint64_t*>(out), threads);
    case DType::f32: return take(static_cast<const uint32_t*>(x), stride, cols, n, K, static_cast<uint32_t*>(out), threads);
    case DType::bf16:
    case DType::fp16: return take(static_cast<const uint16_t*>(x), stride, cols, n, K, static_cast<uint16_t*>(out), threads);
  }
}

}  // namespace slicefine
