// Which element of which slice a thread holds, and how it reaches W; for host and device.
#pragma once
#include "ops_cuda.h"

namespace slicefine::cuda {

SLICEFINE_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The slice that a block of the launch works on: the last one that starts at or before it.
SLICEFINE_HD int32_t slice_of_block(const Slice* slices, int32_t count, int32_t block) {
  int32_t low = 0, high = count - 1;
  while (low < high) {
    const int32_t middle = (low + high + 1) / 2;
    if (slices[middle].first_block <= block) low = middle;
    else high = middle - 1;
  }
  return low;
}

// Row of an element of a contiguous [R, K]; a 64-bit division costs a GPU several times a 32-bit one.
SLICEFINE_HD int64_t row_of(int64_t element, int32_t K) {
  return element <= UINT32_MAX ? int64_t(uint32_t(element) / uint32_t(K)) : element / K;
}

// Where element (row, col) of the slice lives in W, in elements.
SLICEFINE_HD int64_t weight_offset(const Slice& s, int64_t row, int64_t col) {
  return (s.rows ? s.rows[row] : row) * s.stride_row + (s.cols ? s.cols[col] : col) * s.stride_col;
}

// W[offset] = cast(value); `element` is the place in the contiguous [R, K] master.
SLICEFINE_HD void write_through(const Slice& s, const AdamWStep& step, int64_t element, int64_t offset, float value) {
  if (s.dtype == DType::f32) {
    static_cast<float*>(s.weight)[offset] = value;
  } else if (s.dtype == DType::fp16) {
    store(static_cast<fp16*>(s.weight) + offset, value);
  } else {
    bf16* place = static_cast<bf16*>(s.weight) + offset;
    place->bits = step.stochastic ? round_bf16_stochastic(value, philox(step.seed, uint32_t(element), s.id))
                                  : round_bf16(value);
  }
}

}  // namespace slicefine::cuda
