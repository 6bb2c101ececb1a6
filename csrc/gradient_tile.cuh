// One tile of a slice's gradient, G = dY[:, rows]^T X, and what becomes of it: the kernel of slice_grad and slice_grad_adamw.
//
// A block multiplies its share of the tokens. Where several blocks share a tile, each leaves its partial sum in the
// workspace and takes a ticket; the one that comes last adds all partial sums in the order of the splits, so that the
// result is the same on every run.
#pragma once
#include "device.h"
#ifndef SLICEFINE_ON_HOST
#include "ptx.cuh"
#endif
#include "multiply.cuh"

namespace slicefine::cuda {

// (tokens, width) with features contiguous; `index` chooses the features, null takes them in order.
struct Operand {
  const void* data;
  int64_t stride;        // between tokens, in elements
  const int64_t* index;
  int64_t width;
  bool aligned;          // address and stride are multiples of 16 bytes
};

struct GradArguments {
  Operand wide, thin;
  GradPlan plan;
  bool rows_are_wide;    // the wide operand is dY
  int64_t K;
  float* workspace;      // [blocks, accumulators, threads]
  int32_t* counters;     // [tiles]
};

// `Block` features of one operand, from global to shared memory, a stage of tokens at a time.
template <typename T, int Block>
struct Reader {
  static constexpr int kTokens = tokens_per_stage(sizeof(T));
  static constexpr int kPitch = Block + kPad;
  static constexpr int kLane = 16 / sizeof(T);  // features of one 16-byte copy
  static_assert(kGradThreads % Block == 0, "a thread that copies single values stays on one feature");

  const T* data;         // first feature of the tile; of single values: this thread's feature
  int64_t stride;
  int width;             // features of the tile that exist
  bool vector;           // copy 16 bytes at a time

  __device__ __forceinline__ Reader(const Operand& o, int64_t first) : stride(o.stride), vector(o.aligned) {
    width = o.width - first < Block ? int(o.width - first) : Block;
    const int mine = int(threadIdx.x) % Block < width ? int(threadIdx.x) % Block : 0;
    int64_t start = first, own = first + mine;
    if (o.index) {
      start = o.index[first];
      own = o.index[first + mine];
      // only the device knows whether the chosen features lie side by side; those of a contiguous slice do
      vector = __syncthreads_and(o.aligned && own == start + mine && start % kLane == 0);
    }
    data = static_cast<const T*>(o.data) + (vector ? start : own);
  }

  // Tokens [t, t + kTokens) -> tile [kTokens, kPitch]; tokens from `end` on and features that do not exist are zero.
  __device__ __forceinline__ void fill(T* tile, int64_t t, int64_t end) const {
    const int left = end - t < kTokens ? int(end - t) : kTokens;
    if (vector) fill_vectors(tile, data + t * stride, left);
    else fill_values(tile, data + t * stride, left);
  }

 private:
  __device__ __forceinline__ void fill_vectors(T* tile, const T* from, int left) const {
    constexpr int kPerToken = Block / kLane, kStep = kGradThreads / kPerToken;  // copies of a token; tokens at a time
    static_assert(kGradThreads % kPerToken == 0, "a thread stays on its features");
    static_assert(kTokens % kStep == 0 || kStep > kTokens, "whole passes over the tokens, or a part of one");
    const int mine = int(threadIdx.x) / kPerToken, feature = int(threadIdx.x) % kPerToken * kLane;
    const int some = width - feature < kLane ? (width - feature) * int(sizeof(T)) : 16;
#pragma unroll
    for (int first = 0; first < kTokens; first += kStep) {
      const int token = first + mine;
      if (kStep > kTokens && token >= kTokens) break;
      const int bytes = token < left && some > 0 ? some : 0;
      cp_async_16(tile + token * kPitch + feature, bytes ? from + token * stride + feature : from, bytes);
    }
  }

  __device__ __forceinline__ void fill_values(T* tile, const T* from, int left) const {
    constexpr int kStep = kGradThreads / Block, kCount = kTokens / kStep, kBatch = kCount < 8 ? kCount : 8;
    const int feature = int(threadIdx.x) % Block, first = int(threadIdx.x) / Block;
#pragma unroll 1
    for (int i = 0; i < kCount; i += kBatch) {
      T value[kBatch];  // all loads of a batch are on their way before the first is stored
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int token = first + (i + j) * kStep;
        value[j] = token < left && feature < width ? from[token * stride] : T{};
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) tile[(first + (i + j) * kStep) * kPitch + feature] = value[j];
    }
  }
};

// Shapes and shared memory of the kernel for one kind of arithmetic and one thin tile.
template <typename Multiply, int BlockThin>
struct GradTile {
  using T = typename Multiply::Element;
  using WideReader = Reader<T, kBlockWide>;
  using ThinReader = Reader<T, BlockThin>;
  static constexpr int kStages = BlockThin == kThinNarrow ? 4 : 3;
  static constexpr int kTokens = WideReader::kTokens;
  // four warps: side by side along the wide features, or two by two
  static constexpr int kWarpThin = BlockThin == kThinNarrow ? BlockThin : BlockThin / 2;
  static constexpr int kWarpsThin = BlockThin / kWarpThin;
  static constexpr int kWarpWide = kBlockWide * kWarpsThin * 32 / kGradThreads;
  static constexpr int kAccumulators = kWarpWide * kWarpThin / 32;
  static constexpr int kResultPitch = BlockThin + kPad;
  using Warp = typename Multiply::template Warp<kWarpWide, kWarpThin>;

  struct Stage {
    T wide[kTokens * WideReader::kPitch];
    T thin[kTokens * ThinReader::kPitch];
  };
  union alignas(16) Shared {
    Stage stages[kStages];
    float result[kBlockWide * kResultPitch];
  };
  static_assert(sizeof(Stage) % 16 == 0 && sizeof(T) * kTokens * WideReader::kPitch % 16 == 0, "16-byte copies");
  static_assert(sizeof(Shared) + 16 <= 48 * 1024, "more needs cudaFuncAttributeMaxDynamicSharedMemorySize");
  static_assert(kAccumulators * kGradThreads == kBlockWide * BlockThin, "every element of the tile has one owner");
};

// c += the product over tokens [work.begin, work.end)
template <typename Tile>
static __device__ __forceinline__ void multiply_tokens(float* c, typename Tile::Shared& shared, const GradArguments& a,
                                                       const BlockWork& work) {
  const typename Tile::WideReader wide(a.wide, work.wide);
  const typename Tile::ThinReader thin(a.thin, work.thin);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int warp_wide = warp / Tile::kWarpsThin * Tile::kWarpWide;
  const int warp_thin = warp % Tile::kWarpsThin * Tile::kWarpThin;
  const auto fill = [&](int stage) {
    const int64_t t = work.begin + int64_t(stage) * Tile::kTokens;
    if (t < work.end) {
      typename Tile::Stage& to = shared.stages[stage % Tile::kStages];
      wide.fill(to.wide, t, work.end);
      thin.fill(to.thin, t, work.end);
    }
    cp_async_commit();  // also where there is nothing to copy: the count of groups below stays true
  };

  const int stages = int(ceil_div(work.end - work.begin, Tile::kTokens));
#pragma unroll 1
  for (int stage = 0; stage < Tile::kStages - 1; ++stage) fill(stage);
#pragma unroll 1
  for (int stage = 0; stage < stages; ++stage) {
    cp_async_wait<Tile::kStages - 2>();
    __syncthreads();  // this stage has arrived for all threads, and all are done with the one that is filled next
    fill(stage + Tile::kStages - 1);
    const typename Tile::Stage& s = shared.stages[stage % Tile::kStages];
    Tile::Warp::template multiply<Tile::WideReader::kPitch, Tile::ThinReader::kPitch, Tile::kTokens>(
        c, s.wide + warp_wide, s.thin + warp_thin, lane);
  }
  cp_async_wait<0>();
  __syncthreads();
}

// Leaves c in the workspace; true in the block that comes last for its tile, whose c is then the sum over all splits.
template <int Accumulators>
static __device__ __forceinline__ bool add_splits(float* c, int32_t& ticket, const GradArguments& a,
                                                  const BlockWork& work) {
  // [accumulators, threads]: neighboring threads on neighboring addresses
  float* const tile = a.workspace + int64_t(work.tile) * a.plan.splits * Accumulators * kGradThreads + threadIdx.x;
  float* const mine = tile + int64_t(work.split) * Accumulators * kGradThreads;
#pragma unroll
  for (int i = 0; i < Accumulators; ++i) mine[i * kGradThreads] = c[i];
  __threadfence();  // the partial sum is visible to the device before the ticket is
  __syncthreads();
  if (threadIdx.x == 0) ticket = atomicAdd(a.counters + work.tile, 1);
  __syncthreads();
  if (ticket != a.plan.splits - 1) return false;
  __threadfence();
  if (threadIdx.x == 0) a.counters[work.tile] = 0;  // for the next call
#pragma unroll
  for (int i = 0; i < Accumulators; ++i) c[i] = 0.0f;
  for (int split = 0; split < a.plan.splits; ++split)
#pragma unroll
    for (int i = 0; i < Accumulators; ++i) c[i] += load_from_l2(tile + (int64_t(split) * Accumulators + i) * kGradThreads);
  return true;
}

// Hands every element of the tile to `epilogue`, neighboring threads on neighboring columns of the slice.
template <typename Tile, int BlockThin, typename Epilogue>
static __device__ __forceinline__ void finish_tile(const float* c, typename Tile::Shared& shared, const GradArguments& a,
                                                   const BlockWork& work, const Epilogue& epilogue) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int warp_wide = warp / Tile::kWarpsThin * Tile::kWarpWide;
  const int warp_thin = warp % Tile::kWarpsThin * Tile::kWarpThin;
#pragma unroll
  for (int i = 0; i < Tile::kAccumulators; ++i) {
    const int w = warp_wide + Tile::Warp::wide_of(lane, i), t = warp_thin + Tile::Warp::thin_of(lane, i);
    shared.result[w * Tile::kResultPitch + t] = c[i];
  }
  __syncthreads();

  constexpr int kBatch = 4;  // elements whose loads are on their way at the same time
  const auto prepared = epilogue.prepare();
#pragma unroll 1
  for (int first = int(threadIdx.x); first < kBlockWide * BlockThin; first += kBatch * kGradThreads) {
    typename Epilogue::State state[kBatch];
    float g[kBatch];
    int64_t element[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int e = first + i * kGradThreads;
      const int w = a.rows_are_wide ? e / BlockThin : e % kBlockWide;
      const int t = a.rows_are_wide ? e % BlockThin : e / kBlockWide;
      const int64_t wide = work.wide + w, thin = work.thin + t;
      const int64_t row = a.rows_are_wide ? wide : thin, col = a.rows_are_wide ? thin : wide;
      g[i] = shared.result[w * Tile::kResultPitch + t];
      element[i] = wide < a.wide.width && thin < a.thin.width ? row * a.K + col : -1;
      if (element[i] >= 0) state[i] = epilogue.load(element[i], row, col);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (element[i] >= 0) epilogue.store(prepared, element[i], g[i], state[i]);
  }
}

template <typename Multiply, int BlockThin, typename Epilogue>
static __global__ void __launch_bounds__(kGradThreads, kBlocksPerProcessor)
gradient_kernel(const __grid_constant__ GradArguments a, const __grid_constant__ Epilogue epilogue) {
  using Tile = GradTile<Multiply, BlockThin>;
  SLICEFINE_SHARED(typename Tile::Shared, shared);
  SLICEFINE_SHARED(int32_t, ticket);
  const BlockWork work = work_of_block(a.plan, int32_t(blockIdx.x), BlockThin);
  float c[Tile::kAccumulators] = {};
  multiply_tokens<Tile>(c, shared, a, work);
  if (a.plan.splits > 1 && !add_splits<Tile::kAccumulators>(c, ticket, a, work)) return;
  finish_tile<Tile, BlockThin>(c, shared, a, work, epilogue);
}

template <typename Multiply, typename Epilogue>
void launch_tiles(const char* op, const GradArguments& a, const Epilogue& epilogue, const Launch& launch) {
  const int64_t blocks = int64_t(a.plan.wide_tiles) * a.plan.thin_tiles * a.plan.splits;
  const auto kernel = a.thin.width <= kThinNarrow ? gradient_kernel<Multiply, kThinNarrow, Epilogue>
                                                  : gradient_kernel<Multiply, kThinBroad, Epilogue>;
  launch_kernel(op, kernel, blocks, kGradThreads, launch.stream, a, epilogue);
}

// The whole gradient of a slice into `epilogue`, which has State, prepare(), load(element, row, col) and
// store(prepared, element, g, state).
template <typename Epilogue>
void launch_gradient(const char* op, const GradInputs& in, const Epilogue& epilogue, const Launch& launch) {
  if (in.R == 0 || in.K == 0) return;
  const DeviceGuard guard(launch.device, op);
  const int size = in.dtype == DType::f32 ? 4 : 2;
  const auto operand = [&](const void* data, int64_t stride, const int64_t* index, int64_t width) {
    return Operand{data, stride, index, width, reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * size % 16 == 0};
  };
  const Operand dy = operand(in.grad_output, in.stride_grad_output, in.rows, in.R);
  const Operand x = operand(in.input, in.stride_input, nullptr, in.K);
  const bool rows_are_wide = in.R >= in.K;
  const Operand &wide = rows_are_wide ? dy : x, &thin = rows_are_wide ? x : dy;
  const GradPlan plan = plan_gradient(in.n, wide.width, thin.width, size, launch.processors);
  const GradArguments a{wide, thin, plan, rows_are_wide, in.K, launch.workspace, launch.counters};
  switch (in.dtype) {
    case DType::bf16: return launch_tiles<HalfMma<bf16>>(op, a, epilogue, launch);
    case DType::fp16: return launch_tiles<HalfMma<fp16>>(op, a, epilogue, launch);
    case DType::f32:
      if (in.allow_tf32) return launch_tiles<Tf32Mma>(op, a, epilogue, launch);
      return launch_tiles<Fp32Fma>(op, a, epilogue, launch);
    case DType::f64: throw std::runtime_error(std::string(op) + ": float64 runs on the reference backend");
  }
}

}  // namespace slicefine::cuda
