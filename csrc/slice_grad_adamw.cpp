// Gradient, AdamW and write-through of one slice, panel by panel: the gradient never exists at full size.
#include "slice_grad.h"
#include "update.h"

namespace slicefine {
namespace SLICEFINE_ISA {

void slice_grad_adamw(const GradInputs& in, const Slice& slice, const Moments& moments, const AdamWOptions& options, int threads) {
  dispatch(in.dtype, [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    for_each_panel<T>(in, threads, [&](const Panel<A>& panel) {
      update<A>(slice, moments, options, 0, {panel.value, panel.cols, panel.row0, panel.rows, panel.col0, panel.cols});
    });
  });
}

}  // namespace SLICEFINE_ISA
}  // namespace slicefine
