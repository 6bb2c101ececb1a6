// W[slice] = cast(master): the value of one master element, at its place in W.
#pragma once
#include "ops.h"

namespace slicefine {
namespace SLICEFINE_ISA {

// How one element reaches W; `index` is its place in the contiguous [R, K] master, `slice_id` tells the slices of a call apart.
template <typename W, bool Stochastic>
struct WriteThrough {
  const Slice& slice;
  uint64_t seed;
  uint32_t slice_id;

  template <typename P>
  void operator()(int64_t row, int64_t col, P value) const {
    const int64_t r = slice.rows ? slice.rows[row] : row, c = slice.cols ? slice.cols[col] : col;
    W* place = static_cast<W*>(slice.weight) + r * slice.stride_row + c * slice.stride_col;
    if constexpr (Stochastic) {
      place->bits = round_bf16_stochastic(value, philox(seed, uint32_t(row * slice.K + col), slice_id));
    } else {
      store(place, value);
    }
  }
};

// body(writer): the one place that turns dtype and rounding into a type.
template <typename Body>
void with_writer(const Slice& slice, const AdamWOptions& options, uint32_t slice_id, const Body& body) {
  const uint64_t seed = options.seed;
  switch (slice.dtype) {
    case DType::f32: return body(WriteThrough<float, false>{slice, seed, slice_id});
    case DType::f64: return body(WriteThrough<double, false>{slice, seed, slice_id});
    case DType::fp16: return body(WriteThrough<fp16, false>{slice, seed, slice_id});
    case DType::bf16:
      if (options.stochastic) return body(WriteThrough<bf16, true>{slice, seed, slice_id});
      return body(WriteThrough<bf16, false>{slice, seed, slice_id});
  }
}

template <typename P>
AdamWScalars<P> scalars(const AdamWOptions& o, double step) {
  return adamw_scalars<P>(o.lr, o.beta1, o.beta2, o.eps, o.weight_decay, o.maximize, step);
}

}  // namespace SLICEFINE_ISA
}  // namespace slicefine
