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
  if (count == 0) return;
  const int64_t rows = slices[count - 1].first_row + slices[count - 1].R;
  int64_t elements = 0;
  for (int64_t i = 0; i < count; ++i) elements += slices[i].R * slices[i].K;
  const int64_t rows_per_thread = elements ? 1 + rows * (1 << 15) / elements : 1;

  parallel_for(rows, threads, rows_per_thread, [&](int64_t begin, int64_t end) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t from = std::max<int64_t>(begin - slices[i].first_row, 0), to = std::min(end - slices[i].first_row, slices[i].R);
      if (from >= to) continue;
      if (slices[i].dtype == DType::f64) update_rows<double>(slices[i], moments[i], options, uint32_t(i), from, to);
      else update_rows<float>(slices[i], moments[i], options, uint32_t(i), from, to);
    }
  });
}

}  // namespace SLICEFINE_ISA
}  // namespace slicefine
