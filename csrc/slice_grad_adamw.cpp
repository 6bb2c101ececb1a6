// Gradient, AdamW and write-through of one slice, tile by tile: the gradient never reaches memory.
#include "slice_grad.h"
#include "write_through.h"

namespace slicefine {
namespace SLICEFINE_ISA {

void slice_grad_adamw(const GradInputs& in, const Slice& slice, const Moments& moments, const AdamWOptions& options, int threads) {
  dispatch(in.dtype, [&](auto type) {
    using T = decltype(type);
    using P = accumulate_t<T>;
    const AdamWScalars<P> s = scalars<P>(options, moments.step);
    P* master = static_cast<P*>(moments.master);
    P* exp_avg = static_cast<P*>(moments.exp_avg);
    P* exp_avg_sq = static_cast<P*>(moments.exp_avg_sq);
    with_writer(slice, options, 0, [&](const auto& write) {
      for_each_tile<T>(in, threads, [&](const auto& tile, int64_t w0, int64_t w, int64_t p0, int64_t p) {
        for (int64_t i = 0; i < w; ++i)
          for (int64_t j = 0; j < p; ++j) {
            const int64_t row = in.rows ? p0 + j : w0 + i, col = in.rows ? w0 + i : p0 + j, e = row * slice.K + col;
            master[e] = adamw_update(master[e], tile.value[j][i], exp_avg[e], exp_avg_sq[e], s);
            write(row, col, master[e]);
          }
      });
    });
  });
}

}  // namespace SLICEFINE_ISA
}  // namespace slicefine
