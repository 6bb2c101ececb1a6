// The gradient of a slice, tile by tile: G = dY[:, rows]^T X, handed to `consume` while it is still in registers.
//
// One operand is wide (read in place, vectorised), the other thin (r columns, gathered and packed once):
// without rows dY is wide and X thin, with rows X is wide and dY[:, rows] thin.
#pragma once
#include <algorithm>

#include "ops.h"
#include "parallel.h"

namespace slicefine {
namespace SLICEFINE_ISA {

constexpr int kLanes = SLICEFINE_LANES;
constexpr int kVectors = 2;                // wide features per tile: 2 vectors
constexpr int kWide = kVectors * kLanes;
constexpr int kThin = 8;                   // thin features per tile: 2 x 8 accumulators fill half of AVX-512's registers

template <typename A>
struct Vector {
#if defined(__GNUC__)
  typedef A type __attribute__((vector_size(sizeof(A) * kLanes)));
#else
  struct type {
    A lane[kLanes];
    A& operator[](int i) { return lane[i]; }
    A operator[](int i) const { return lane[i]; }
    friend type operator*(A s, const type& v) { type r; for (int i = 0; i < kLanes; ++i) r.lane[i] = s * v.lane[i]; return r; }
    type& operator+=(const type& o) { for (int i = 0; i < kLanes; ++i) lane[i] += o.lane[i]; return *this; }
  };
#endif
};

template <typename T>
SLICEFINE_HD typename Vector<accumulate_t<T>>::type load_vector(const T* p) {
  typename Vector<accumulate_t<T>>::type v;
  for (int i = 0; i < kLanes; ++i) v[i] = load(p + i);
  return v;
}

template <typename A>
struct Tile {
  A value[kThin][kWide];
};

// wide (n, >= kWide at this offset), thin packed [n, kThin] -> tile [kThin, kWide]
template <typename T>
Tile<accumulate_t<T>> multiply(const T* wide, int64_t stride, const accumulate_t<T>* thin, int64_t n) {
  using A = accumulate_t<T>;
  typename Vector<A>::type acc[kThin][kVectors] = {};
  for (int64_t t = 0; t < n; ++t, wide += stride, thin += kThin) {
    typename Vector<A>::type w[kVectors];
    for (int j = 0; j < kVectors; ++j) w[j] = load_vector(wide + j * kLanes);
    for (int p = 0; p < kThin; ++p)
      for (int j = 0; j < kVectors; ++j) acc[p][j] += thin[p] * w[j];
  }
  Tile<A> tile;
  for (int p = 0; p < kThin; ++p)
    for (int j = 0; j < kVectors; ++j)
      for (int i = 0; i < kLanes; ++i) tile.value[p][j * kLanes + i] = acc[p][j][i];
  return tile;
}

// The same at the right border, where fewer than kWide features are left.
template <typename T>
Tile<accumulate_t<T>> multiply_border(const T* wide, int64_t stride, const accumulate_t<T>* thin, int64_t n, int64_t width) {
  Tile<accumulate_t<T>> tile = {};
  for (int64_t t = 0; t < n; ++t, wide += stride, thin += kThin)
    for (int p = 0; p < kThin; ++p)
      for (int64_t i = 0; i < width; ++i) tile.value[p][i] += thin[p] * load(wide + i);
  return tile;
}

static inline int64_t groups(int64_t thin) { return (thin + kThin - 1) / kThin; }

// thin features -> [groups, n, kThin], zero-padded
template <typename T>
void pack(const T* thin, int64_t stride, const int64_t* index, int64_t n, int64_t width, accumulate_t<T>* packed, int threads) {
  parallel_for(groups(width) * n, threads, 1 << 13, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i / n, t = i % n;
      for (int p = 0; p < kThin; ++p) {
        const int64_t feature = group * kThin + p;
        packed[i * kThin + p] = feature < width ? load(thin + t * stride + (index ? index[feature] : feature))
                                                : accumulate_t<T>(0);
      }
    }
  });
}

// consume(tile, wide0, wide_count, thin0, thin_count) for every tile of G, from several threads, each tile once.
template <typename T, typename Consume>
void for_each_tile(const GradInputs& in, int threads, const Consume& consume) {
  using A = accumulate_t<T>;
  const T *dy = static_cast<const T*>(in.grad_output), *x = static_cast<const T*>(in.input);
  A* packed = static_cast<A*>(in.workspace);
  const bool dy_is_thin = in.rows != nullptr;
  const T* wide = dy_is_thin ? x : dy;
  const int64_t stride = dy_is_thin ? in.stride_input : in.stride_grad_output;
  const int64_t wide_count = dy_is_thin ? in.K : in.R, thin_count = dy_is_thin ? in.R : in.K;
  pack(dy_is_thin ? dy : x, dy_is_thin ? in.stride_grad_output : in.stride_input, in.rows, in.n, thin_count, packed, threads);

  const int64_t strips = (wide_count + kWide - 1) / kWide;
  const int64_t flops_per_strip = 2 * in.n * kWide * thin_count;
  parallel_for(strips, threads, 1 + (1 << 20) / std::max<int64_t>(flops_per_strip, 1), [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; ++strip)
      for (int64_t group = 0; group < groups(thin_count); ++group) {
        const int64_t w0 = strip * kWide, p0 = group * kThin;
        const int64_t w = std::min<int64_t>(kWide, wide_count - w0), p = std::min<int64_t>(kThin, thin_count - p0);
        const A* thin = packed + group * in.n * kThin;
        consume(w == kWide ? multiply(wide + w0, stride, thin, in.n) : multiply_border(wide + w0, stride, thin, in.n, w),
                w0, w, p0, p);
      }
  });
}

template <typename Body>
void dispatch(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32: return body(float{});
    case DType::f64: return body(double{});
    case DType::bf16: return body(bf16{});
    case DType::fp16: return body(fp16{});
  }
}

}  // namespace SLICEFINE_ISA
}  // namespace slicefine
