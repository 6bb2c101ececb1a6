// G = dY[:, rows]^T X  ->  contiguous [R, K], float (double for double inputs).
#include "slice_grad.h"

namespace slicefine {
namespace SLICEFINE_ISA {

int64_t slice_grad_workspace(int64_t n, int64_t thin) { return groups(thin) * n * kThin; }

void slice_grad(const GradInputs& in, void* out, int threads) {
  dispatch(in.dtype, [&](auto type) {
    using T = decltype(type);
    auto* grad = static_cast<accumulate_t<T>*>(out);
    const int64_t wide_stride = in.rows ? 1 : in.K, thin_stride = in.rows ? in.K : 1;
    for_each_tile<T>(in, threads, [&](const auto& tile, int64_t w0, int64_t w, int64_t p0, int64_t p) {
      for (int64_t i = 0; i < w; ++i)
        for (int64_t j = 0; j < p; ++j) grad[(w0 + i) * wide_stride + (p0 + j) * thin_stride] = tile.value[j][i];
    });
  });
}

}  // namespace SLICEFINE_ISA
}  // namespace slicefine
