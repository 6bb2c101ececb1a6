// AdamW on a part of one slice's master, and W[slice] = cast(master): what the two updating ops share on the host.
#pragma once
#include <algorithm>

#include "ops.h"
#include "parallel.h"

namespace slicefine {
namespace SLICEFINE_ISA {

// Gradients of rows [row0, row0 + rows) x columns [col0, col0 + cols) of a slice; `stride` values from row to row.
template <typename P>
struct Gradients {
  const P* value;
  int64_t stride, row0, rows, col0, cols;
};

template <typename P>
void adamw_run(P* __restrict__ p, const P* __restrict__ g, P* __restrict__ m, P* __restrict__ v, int64_t count, const AdamWScalars<P>& s) {
  for (int64_t i = 0; i < count; ++i) p[i] = adamw_update(p[i], g[i], m[i], v[i], s);
}

// One row of a part, `count` values from column col0 on, to its places in W; W's neighboring columns in one run of stores.
template <typename W, typename P>
void write_run(const Slice& slice, int64_t row, int64_t col0, int64_t count, bool neighbors, const P* value) {
  W* place = static_cast<W*>(slice.weight) + (slice.rows ? slice.rows[row] : row) * slice.stride_row;
  if (neighbors) {
    place += (slice.cols ? slice.cols[col0] : col0) * slice.stride_col;
    for (int64_t i = 0; i < count; ++i) store(place + i, value[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) store(place + (slice.cols ? slice.cols[col0 + i] : col0 + i) * slice.stride_col, value[i]);
  }
}

inline void write_run_stochastic(const Slice& slice, int64_t row, int64_t col0, int64_t count, uint64_t seed, uint32_t slice_id,
                                 const float* value) {
  bf16* place = static_cast<bf16*>(slice.weight) + (slice.rows ? slice.rows[row] : row) * slice.stride_row;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t col = slice.cols ? slice.cols[col0 + i] : col0 + i;
    const uint32_t random = philox(seed, uint32_t(row * slice.K + col0 + i), slice_id);
    place[col * slice.stride_col].bits = round_bf16_stochastic(value[i], random);
  }
}

// One row of a part, whatever W's type; float64 weights have float64 masters, all others float32.
template <typename P>
void write_row(const Slice& slice, int64_t row, int64_t col0, int64_t count, bool neighbors, const AdamWOptions& options,
               uint32_t slice_id, const P* value) {
  if constexpr (sizeof(P) == sizeof(double)) {
    write_run<double>(slice, row, col0, count, neighbors, value);
  } else {
    switch (slice.dtype) {
      case DType::f64: break;
      case DType::f32: write_run<float>(slice, row, col0, count, neighbors, value); break;
      case DType::fp16: write_run<fp16>(slice, row, col0, count, neighbors, value); break;
      case DType::bf16:
        if (options.stochastic) write_run_stochastic(slice, row, col0, count, options.seed, slice_id, value);
        else write_run<bf16>(slice, row, col0, count, neighbors, value);
    }
  }
}

// Whether columns [col0, col0 + cols) of a slice are neighbors in W.
inline bool are_neighbors(const Slice& slice, int64_t col0, int64_t cols) {
  if (slice.stride_col != 1) return false;
  if (slice.cols)
    for (int64_t i = 1; i < cols; ++i)
      if (slice.cols[col0 + i] != slice.cols[col0] + i) return false;
  return true;
}

// The lines of W that a part is about to write; asked for before the arithmetic, they arrive during it.
inline void prefetch(const Slice& slice, int64_t row0, int64_t rows, int64_t col0, int64_t element_size) {
#if defined(__GNUC__)
  const char* weight = static_cast<const char*>(slice.weight);
  for (int64_t i = row0; i < row0 + rows; ++i) {
    const int64_t row = slice.rows ? slice.rows[i] : i, col = slice.cols ? slice.cols[col0] : col0;
    __builtin_prefetch(weight + (row * slice.stride_row + col * slice.stride_col) * element_size, 1);
  }
#endif
}

// body(slice, begin, end) for the rows of all slices, spread over threads: rows [begin, end) of a slice, each once.
template <typename Body>
void for_each_part(const Slice* slices, int64_t count, int threads, const Body& body) {
  if (count == 0) return;
  const int64_t rows = slices[count - 1].first_row + slices[count - 1].R;
  int64_t elements = 0;
  for (int64_t i = 0; i < count; ++i) elements += slices[i].R * slices[i].K;
  const int64_t rows_per_thread = elements ? 1 + rows * (1 << 15) / elements : 1;
  parallel_for(rows, threads, rows_per_thread, [&](int64_t begin, int64_t end) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t from = std::max<int64_t>(begin - slices[i].first_row, 0), to = std::min(end - slices[i].first_row, slices[i].R);
      if (from < to) body(i, from, to);
    }
  });
}

template <typename P>
void update(const Slice& slice, const Moments& moments, const AdamWOptions& options, uint32_t slice_id, const Gradients<P>& g) {
  constexpr int64_t kRows = 64;  // between two prefetches: a line of W each, well within the first-level cache
  const AdamWScalars<P> s = adamw_scalars<P>(options.lr, options.beta1, options.beta2, options.eps, options.weight_decay,
                                             options.maximize, moments.step);
  P *p = static_cast<P*>(moments.master), *m = static_cast<P*>(moments.exp_avg), *v = static_cast<P*>(moments.exp_avg_sq);
  const bool neighbors = are_neighbors(slice, g.col0, g.cols), whole = g.cols == slice.K && g.stride == slice.K;
  const int64_t element_size = slice.dtype == DType::f64 ? 8 : slice.dtype == DType::f32 ? 4 : 2;
  for (int64_t r0 = 0; r0 < g.rows; r0 += kRows) {
    const int64_t rows = std::min(kRows, g.rows - r0), first = (g.row0 + r0) * slice.K + g.col0;
    prefetch(slice, g.row0 + r0, rows, g.col0, element_size);
    if (whole) {
      adamw_run(p + first, g.value + r0 * g.stride, m + first, v + first, rows * g.cols, s);
    } else {
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t e = first + r * slice.K;
        adamw_run(p + e, g.value + (r0 + r) * g.stride, m + e, v + e, g.cols, s);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = g.row0 + r0 + r;
      const P* value = p + first + r * slice.K;
      write_row(slice, row, g.col0, g.cols, neighbors, options, slice_id, value);
    }
  }
}

}  // namespace SLICEFINE_ISA
}  // namespace slicefine
