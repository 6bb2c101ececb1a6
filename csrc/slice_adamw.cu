// AdamW on the masters of many slices, each written through to its weight: one launch for up to kCapacity slices.
//
// The table of slices is a kernel parameter: no copy to the device, no allocation, so a CUDA graph can capture the op.
#include "device.h"
#include "slice_update.h"

namespace slicefine::cuda {

constexpr int kThreads = 256;
constexpr int kVector = 4;                     // elements per thread, one 16-byte access of each tensor
constexpr int kPerBlock = kThreads * kVector;
constexpr int kParameterBytes = 32764;         // CUDA 12.1 and newer, sm_70 and newer
constexpr int kCapacity = 300;                 // slices per launch

struct SliceTable {
  AdamWStep step;
  int32_t count;
  Slice slices[kCapacity];
};
static_assert(sizeof(SliceTable) <= kParameterBytes, "the table of slices must fit the parameters of one kernel");

struct Quad { float value[kVector]; };

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

static __global__ void __launch_bounds__(kThreads) slice_adamw_kernel(const __grid_constant__ SliceTable table) {
  const Slice& s = table.slices[slice_of_block(table.slices, table.count, int32_t(blockIdx.x))];
  const int64_t elements = int64_t(s.R) * s.K;
  const int64_t first = int64_t(int32_t(blockIdx.x) - s.first_block) * kPerBlock + int64_t(threadIdx.x) * kVector;
  if (first >= elements) return;
  const int valid = elements - first < kVector ? int(elements - first) : kVector;
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(s.master) | reinterpret_cast<uintptr_t>(s.grad) |
                              reinterpret_cast<uintptr_t>(s.exp_avg) | reinterpret_cast<uintptr_t>(s.exp_avg_sq);
  const bool vector = valid == kVector && addresses % 16 == 0;

  const AdamWScalars<float> scalars = adamw_scalars(table.step.constants, *s.step);
  Quad p = load_quad(s.master + first, valid, vector), g = load_quad(s.grad + first, valid, vector);
  Quad m = load_quad(s.exp_avg + first, valid, vector), v = load_quad(s.exp_avg_sq + first, valid, vector);
#pragma unroll
  for (int i = 0; i < kVector; ++i) p.value[i] = adamw_update(p.value[i], g.value[i], m.value[i], v.value[i], scalars);
  store_quad(s.master + first, p, valid, vector);
  store_quad(s.exp_avg + first, m, valid, vector);
  store_quad(s.exp_avg_sq + first, v, valid, vector);

  int64_t row = row_of(first, s.K), col = first - row * s.K;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (i < valid) write_through(s, table.step, first + i, weight_offset(s, row, col), p.value[i]);
    if (++col == s.K) {
      col = 0;
      ++row;
    }
  }
}

void slice_adamw(Slice* slices, int64_t count, const AdamWStep& step, const Launch& launch) {
  const DeviceGuard guard(launch.device, "slice_adamw");
  SliceTable table{step, 0, {}};
  int64_t blocks = 0;
  const auto flush = [&] {
    if (blocks) launch_kernel("slice_adamw", slice_adamw_kernel, blocks, kThreads, launch.stream, table);
    table.count = 0;
    blocks = 0;
  };
  for (int64_t i = 0; i < count; ++i) {
    const int64_t needed = ceil_div(int64_t(slices[i].R) * slices[i].K, kPerBlock);
    if (needed == 0) continue;
    if (table.count == kCapacity || blocks + needed > INT32_MAX) flush();
    slices[i].first_block = int32_t(blocks);
    table.slices[table.count++] = slices[i];
    blocks += needed;
  }
  flush();
}

}  // namespace slicefine::cuda
