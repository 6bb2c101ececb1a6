// AdamW on the masters of many slices, each written through to its weight: one launch for up to kCapacity slices.
#include "slice_table.cuh"

namespace slicefine::cuda {

constexpr int kThreads = 256;
constexpr int kPerBlock = kThreads * kVector;
constexpr int kCapacity = 300;  // slices per launch

using Table = SliceTable<Moments, kCapacity>;
static_assert(sizeof(Table) <= kParameterBytes, "the table of slices must fit the parameters of one kernel");

static __global__ void __launch_bounds__(kThreads) slice_adamw_kernel(const __grid_constant__ Table table) {
  const int32_t index = slice_of_block(table.slices, table.count, int32_t(blockIdx.x));
  const Slice& s = table.slices[index];
  const Moments& moments = table.moments[index];
  const int64_t elements = int64_t(s.R) * s.K;
  const int64_t first = int64_t(int32_t(blockIdx.x) - s.first_block) * kPerBlock + int64_t(threadIdx.x) * kVector;
  if (first >= elements) return;
  const int valid = elements - first < kVector ? int(elements - first) : kVector;
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(s.master) | reinterpret_cast<uintptr_t>(s.grad) |
                              reinterpret_cast<uintptr_t>(moments.exp_avg) |
                              reinterpret_cast<uintptr_t>(moments.exp_avg_sq);
  const bool vector = valid == kVector && addresses % 16 == 0;

  const AdamWScalars<float> scalars = adamw_scalars(table.step.constants, *s.step);
  Quad p = load_quad(s.master + first, valid, vector), g = load_quad(s.grad + first, valid, vector);
  Quad m = load_quad(moments.exp_avg + first, valid, vector), v = load_quad(moments.exp_avg_sq + first, valid, vector);
#pragma unroll
  for (int i = 0; i < kVector; ++i) p.value[i] = adamw_update(p.value[i], g.value[i], m.value[i], v.value[i], scalars);
  store_quad(s.master + first, p, valid, vector);
  store_quad(moments.exp_avg + first, m, valid, vector);
  store_quad(moments.exp_avg_sq + first, v, valid, vector);
  write_quad(s, table.step, first, p, valid);
}

void slice_adamw(Slice* slices, const Moments* moments, int64_t count, const AdamWStep& step, const Launch& launch) {
  const DeviceGuard guard(launch.device, "slice_adamw");
  for_each_table<Table>(slices, moments, count, step, kPerBlock, [&](const Table& table, int64_t blocks) {
    launch_kernel("slice_adamw", slice_adamw_kernel, blocks, kThreads, launch.stream, table);
  });
}

}  // namespace slicefine::cuda
