// What slice_adamw and slice_adamw_8bit share: a table of slices that travels as a kernel parameter (no copy to the
// device, no allocation, so a CUDA graph can capture the op), and four neighboring elements of a slice on their way.
#pragma once
#include "device.h"
#include "slice_update.h"

namespace slicefine::cuda {

constexpr int kParameterBytes = 32764;  // CUDA 12.1 and newer, sm_70 and newer
constexpr int kVector = 4;              // elements of one 16-byte access

template <typename State, int Capacity>
struct SliceTable {
  AdamWStep step;
  int32_t count;
  Slice slices[Capacity];
  State moments[Capacity];
};

// Calls send(table, blocks) for as many tables as the slices need; a block takes `per_block` elements of one slice.
template <typename Table, typename State, typename Send>
void for_each_table(Slice* slices, const State* moments, int64_t count, const AdamWStep& step, int per_block,
                    const Send& send) {
  constexpr int32_t kCapacity = int32_t(sizeof(Table::slices) / sizeof(Slice));
  Table table{step, 0, {}, {}};
  int64_t blocks = 0;
  const auto flush = [&] {
    if (blocks) send(table, blocks);
    table.count = 0;
    blocks = 0;
  };
  for (int64_t i = 0; i < count; ++i) {
    const int64_t needed = ceil_div(int64_t(slices[i].R) * slices[i].K, per_block);
    if (needed == 0) continue;
    if (table.count == kCapacity || blocks + needed > INT32_MAX) flush();
    slices[i].first_block = int32_t(blocks);
    table.slices[table.count] = slices[i];
    table.moments[table.count++] = moments[i];
    blocks += needed;
  }
  flush();
}

struct Quad { float value[kVector]; };

// `vector`: all four exist and the address is a multiple of 16; else the first `valid` one by one, zeros behind them.
static __device__ __forceinline__ Quad load_quad(const float* p, int valid, bool vector) {
  Quad q = {};
  if (vector) {
    const float4 f = *reinterpret_cast<const float4*>(p);
    q = {{f.x, f.y, f.z, f.w}};
  } else {
    for (int i = 0; i < kVector; ++i)
      if (i < valid) q.value[i] = p[i];
  }
  return q;
}

static __device__ __forceinline__ void store_quad(float* p, const Quad& q, int valid, bool vector) {
  if (vector) {
    *reinterpret_cast<float4*>(p) = float4{q.value[0], q.value[1], q.value[2], q.value[3]};
  } else {
    for (int i = 0; i < kVector; ++i)
      if (i < valid) p[i] = q.value[i];
  }
}

// Elements [first, first + valid) of the slice into W.
static __device__ __forceinline__ void write_quad(const Slice& s, const AdamWStep& step, int64_t first, const Quad& p,
                                                  int valid) {
  int64_t row = row_of(first, s.K), col = first - row * s.K;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (i < valid) write_through(s, step, first + i, weight_offset(s, row, col), p.value[i]);
    if (++col == s.K) {
      col = 0;
      ++row;
    }
  }
}

}  // namespace slicefine::cuda
