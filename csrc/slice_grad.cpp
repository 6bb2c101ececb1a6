// G = dY[:, rows]^T X  ->  contiguous [R, K], float (double for double inputs).
#include "slice_grad.h"

namespace slicefine {
namespace SLICEFINE_ISA {

void slice_grad(const GradInputs& in, void* out, int threads) {
  dispatch(in.dtype, [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    A* grad = static_cast<A*>(out);
    for_each_panel<T>(in, threads, [&](const Panel<A>& panel) {
      for (int64_t row = 0; row < panel.rows; ++row)
        std::memcpy(grad + (panel.row0 + row) * in.K + panel.col0, panel.value + row * panel.cols, panel.cols * sizeof(A));
    });
  });
}

}  // namespace SLICEFINE_ISA
}  // namespace slicefine
