// W[slice] = cast(master), to nearest, for many slices in one call.
#include <algorithm>

#include "parallel.h"
#include "update.h"

namespace slicefine {
namespace SLICEFINE_ISA {

template <typename P>
void write_rows(const Slice& slice, const void* master, int64_t begin, int64_t end) {
  const AdamWOptions nearest{};
  const bool neighbors = are_neighbors(slice, 0, slice.K);
  const P* value = static_cast<const P*>(master) + begin * slice.K;
  for (int64_t row = begin; row < end; ++row, value += slice.K) write_row(slice, row, 0, slice.K, neighbors, nearest, 0, value);
}

void write_slices(const Slice* slices, const void* const* masters, int64_t count, int threads) {
  for_each_part(slices, count, threads, [&](int64_t i, int64_t begin, int64_t end) {
    if (slices[i].dtype == DType::f64) write_rows<double>(slices[i], masters[i], begin, end);
    else write_rows<float>(slices[i], masters[i], begin, end);
  });
}

}  // namespace SLICEFINE_ISA
}  // namespace slicefine
