// slice_adamw with both moments in 8 bits: codes of a codebook, one scale per kQuantum of them (Dettmers et al. 2022).
//
// A warp has kQuantum elements, so the magnitude that becomes their scale never leaves it.
#include "slice_table.cuh"

namespace slicefine::cuda {

constexpr int kThreads = 256;
constexpr int kPerBlock = kThreads / 32 * int(kQuantum);
constexpr int kQuads = int(kQuantum) / (32 * kVector);  // of a thread; the lanes of a warp have neighboring ones
constexpr int kCapacity = 270;                          // slices per launch
constexpr int kBlocksPerProcessor = 4;                  // leaves a thread 64 registers
static_assert(kThreads == 256, "every thread stages one code of each codebook");

using Table = SliceTable<Moments8, kCapacity>;
static_assert(sizeof(Table) + sizeof(const float*) <= kParameterBytes,
              "the table of slices and the codebook's address must fit the parameters of one kernel");

// The ascending values of a codebook and the midpoints between them, as a search tree: the children of node i are
// 2 i and 2 i + 1, so the nodes of a depth lie side by side and a warp finds most of them in different banks.
struct Book {
  float value[256], middle[256];  // middle[0] has no meaning
};
struct Books {
  Book of_exp_avg, of_exp_avg_sq;
};

// codebook [256] -> book; thread i stages value i and the midpoint below it.
static __device__ __forceinline__ void stage(Book& book, const float* codebook) {
  const uint32_t i = threadIdx.x;
  const float value = codebook[i];
  book.value[i] = value;
  // a midpoint's depth is 7 less the zeros that its number ends with, and the bits above them are the way to it
  if (i) book.middle[(256 + i) / (2 * (i & (0u - i)))] = (codebook[i - 1] + value) * 0.5f;
}

// The number of midpoints below the ratio.
static __device__ __forceinline__ uint32_t nearest_code(const Book& book, float ratio) {
  uint32_t node = 1;
#pragma unroll
  for (int depth = 0; depth < 8; ++depth) node = 2 * node + (ratio > book.middle[node] ? 1 : 0);
  return node - 256;
}

struct Codes { uint32_t word[kQuads]; };  // four to a word, the first in its low bits

// `vector`: all of them exist and the address is a multiple of 4.
static __device__ __forceinline__ uint32_t load_codes(const uint8_t* p, int valid, bool vector) {
  if (vector) return *reinterpret_cast<const uint32_t*>(p);
  uint32_t word = 0;
  for (int i = 0; i < kVector; ++i)
    if (i < valid) word |= uint32_t(p[i]) << 8 * i;
  return word;
}

static __device__ __forceinline__ void store_codes(uint8_t* p, uint32_t word, int valid, bool vector) {
  if (vector) {
    *reinterpret_cast<uint32_t*>(p) = word;
  } else {
    for (int i = 0; i < kVector; ++i)
      if (i < valid) p[i] = uint8_t(word >> 8 * i);
  }
}

static __device__ __forceinline__ Quad dequantize(uint32_t word, float scale, const Book& book, int valid) {
  Quad q;
#pragma unroll
  for (int i = 0; i < kVector; ++i) q.value[i] = i < valid ? book.value[word >> 8 * i & 255] * scale : 0.0f;
  return q;
}

// The largest magnitude of a warp's values: without their sign, the bits of floats are in the order of the floats, a
// NaN above all of them.
static __device__ __forceinline__ float largest_of_warp(const Quad (&x)[kQuads]) {
  uint32_t largest = 0;
#pragma unroll
  for (int j = 0; j < kQuads; ++j)
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const uint32_t magnitude = float_bits(x[j].value[i]) & 0x7FFFFFFFu;
      largest = magnitude > largest ? magnitude : largest;
    }
  return bits_float(__reduce_max_sync(0xFFFFFFFFu, largest));
}

static __device__ __forceinline__ Codes quantize(const Quad (&x)[kQuads], float scale, const Book& book) {
  const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;  // zeros stay zeros
  Codes codes;
#pragma unroll
  for (int j = 0; j < kQuads; ++j) {
    codes.word[j] = 0;
#pragma unroll
    for (int i = 0; i < kVector; ++i) codes.word[j] |= nonzero_code(nearest_code(book, x[j].value[i] * inverse), x[j].value[i]) << 8 * i;
  }
  return codes;
}

static __global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
slice_adamw_8bit_kernel(const __grid_constant__ Table table, const float* __restrict__ codebook) {
  SLICEFINE_SHARED(Books, books);
  const int32_t index = slice_of_block(table.slices, table.count, int32_t(blockIdx.x));
  const Slice& s = table.slices[index];
  const Moments8& moments = table.moments[index];
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int64_t elements = int64_t(s.R) * s.K;
  const int64_t quantum = int64_t(int32_t(blockIdx.x) - s.first_block) * (kThreads / 32) + warp;
  const bool exists = quantum * kQuantum < elements;  // the same for all lanes
  const auto first_of = [&](int j) { return quantum * kQuantum + (j * 32 + lane) * kVector; };
  const auto valid_of = [&](int j) {
    const int64_t left = elements - first_of(j);
    return left < 0 ? 0 : left < kVector ? int(left) : kVector;
  };
  const bool quads = (reinterpret_cast<uintptr_t>(s.master) | reinterpret_cast<uintptr_t>(s.grad)) % 16 == 0;
  const bool words = (reinterpret_cast<uintptr_t>(moments.exp_avg) |
                      reinterpret_cast<uintptr_t>(moments.exp_avg_sq)) % 4 == 0;

  // everything is on its way before the books are waited for
  Quad p[kQuads], g[kQuads];
  Codes m_codes, v_codes;
#pragma unroll
  for (int j = 0; j < kQuads; ++j) {
    const int64_t first = first_of(j);
    const int valid = valid_of(j);
    p[j] = load_quad(s.master + first, valid, quads && valid == kVector);
    g[j] = load_quad(s.grad + first, valid, quads && valid == kVector);
    m_codes.word[j] = load_codes(moments.exp_avg + first, valid, words && valid == kVector);
    v_codes.word[j] = load_codes(moments.exp_avg_sq + first, valid, words && valid == kVector);
  }
  float m_scale = exists ? moments.exp_avg_scale[quantum] : 0.0f;
  float v_scale = exists ? moments.exp_avg_sq_scale[quantum] : 0.0f;
  stage(books.of_exp_avg, codebook);
  stage(books.of_exp_avg_sq, codebook + 256);
  __syncthreads();
  if (!exists) return;

  const AdamWScalars<float> scalars = adamw_scalars(table.step.constants, *s.step);
  Quad m[kQuads], v[kQuads];
#pragma unroll
  for (int j = 0; j < kQuads; ++j) {
    const int valid = valid_of(j);
    m[j] = dequantize(m_codes.word[j], m_scale, books.of_exp_avg, valid);
    v[j] = dequantize(v_codes.word[j], v_scale, books.of_exp_avg_sq, valid);
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      p[j].value[i] = adamw_update(p[j].value[i], g[j].value[i], m[j].value[i], v[j].value[i], scalars);
    store_quad(s.master + first_of(j), p[j], valid, quads && valid == kVector);
    write_quad(s, table.step, first_of(j), p[j], valid);
  }

  m_scale = largest_of_warp(m);
  v_scale = largest_of_warp(v);
  m_codes = quantize(m, m_scale, books.of_exp_avg);
  v_codes = quantize(v, v_scale, books.of_exp_avg_sq);
#pragma unroll
  for (int j = 0; j < kQuads; ++j) {
    const int valid = valid_of(j);
    store_codes(moments.exp_avg + first_of(j), m_codes.word[j], valid, words && valid == kVector);
    store_codes(moments.exp_avg_sq + first_of(j), v_codes.word[j], valid, words && valid == kVector);
  }
  if (lane == 0) {
    moments.exp_avg_scale[quantum] = m_scale;
    moments.exp_avg_sq_scale[quantum] = v_scale;
  }
}

void slice_adamw_8bit(Slice* slices, const Moments8* moments, int64_t count, const float* codebook,
                      const AdamWStep& step, const Launch& launch) {
  const DeviceGuard guard(launch.device, "slice_adamw_8bit");
  for_each_table<Table>(slices, moments, count, step, kPerBlock, [&](const Table& table, int64_t blocks) {
    launch_kernel("slice_adamw_8bit", slice_adamw_8bit_kernel, blocks, kThreads, launch.stream, table, codebook);
  });
}

}  // namespace slicefine::cuda
