// AdamW on the masters of many slices, each written through to its weight, in one call.
#include <algorithm>

#include "parallel.h"
#include "update.h"

namespace slicefine {
namespace SLICEFINE_ISA {

template <typename P>
void update_rows(const Slice& slice, const Moments& m, const AdamWOptions& options, uint32_t slice_id, int64_t begin, int64_t end) {
  const P* grad = static_cast<const P*>(m.grad) + begin * slice.K;
  update<P>(slice, m, options, slice_id, {grad, slice.K, begin, end - begin, 0, slice.K});
}

void slice_adamw(const Slice* slices, const Moments* moments, int64_t count, const AdamWOptions& options, int threads) {
  for_each_part(slices, count, threads, [&](int64_t i, int64_t begin, int64_t end) {
    if (slices[i].dtype == DType::f64) update_rows<double>(slices[i], moments[i], options, uint32_t(i), begin, end);
    else update_rows<float>(slices[i], moments[i], options, uint32_t(i), begin, end);
  });
}

}  // namespace SLICEFINE_ISA
}  // namespace slicefine
