// The gradient of a slice, panel by panel: G = dY[:, rows]^T X, handed to `consume` while it is still in the cache.
//
// One operand is wide (read in place, vectorized), the other thin (r columns, gathered and packed once unless they lie as the
// multiplication wants them): without rows dY is wide and X thin, with rows X is wide and dY[:, rows] thin. Tiles of
// kThin x kWide accumulators live in registers for kBlock tokens at a time and in a panel of at most kTiles tiles between; the
// lines that the next tile needs are asked for meanwhile, because no hardware prefetcher follows a stride of a row.
#pragma once
#include <algorithm>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "ops.h"
#include "parallel.h"

namespace slicefine {
namespace SLICEFINE_ISA {

constexpr int kLanes = SLICEFINE_LANES;
constexpr int kVectors = 2;                // wide features per tile: 2 vectors
constexpr int kWide = kVectors * kLanes;
constexpr int kThin = 8;                   // thin features per tile: 2 x 8 accumulators fill half of AVX-512's registers
constexpr int kTiles = 32;                 // a panel of float tiles: 32 KiB with AVX-512
constexpr int kBlock = 64;                 // tokens between two visits to the panel

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

#if defined(__AVX512F__)
SLICEFINE_HD Vector<float>::type load_vector(const fp16* p) {
  static_assert(kLanes == 16, "one 256-bit load of float16");
  return (Vector<float>::type)_mm512_maskz_cvtph_ps(0xFFFF, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
#endif

template <typename A>
struct Tile {
  typename Vector<A>::type value[kThin][kVectors];
};

// The lines of one token that hold kWide features; they need not exist.
template <typename T>
SLICEFINE_HD void prefetch_wide(const T* ahead) {
#if defined(__GNUC__)
  for (size_t byte = 0; byte < kWide * sizeof(T); byte += 64) __builtin_prefetch(reinterpret_cast<const char*>(ahead) + byte);
#else
  (void)ahead;
#endif
}

// How operands of type T are multiplied. Packed: what one thin feature of kTokens tokens becomes.
template <typename T>
struct Multiply {
  using A = accumulate_t<T>;
  using Packed = A;
  static constexpr int kTokens = 1;

  static Packed pack(const T* thin, int64_t, int64_t) { return load(thin); }

  // tile [kThin, kWide] += thin [count, kThin]^T @ wide [count, kWide]; ahead: where to prefetch as many of the next, or null
  static void add(Tile<A>& tile, const T* wide, int64_t stride, const Packed* thin, int64_t thin_stride, int64_t count, const T* ahead) {
    Tile<A> acc = {};  // a sum of its own for each block of tokens: the error of one long sum grows with its length
    for (int64_t t = 0; t < count; ++t, wide += stride, thin += thin_stride) {
      if (ahead) prefetch_wide(ahead + t * stride);
      typename Vector<A>::type w[kVectors];
      for (int j = 0; j < kVectors; ++j) w[j] = load_vector(wide + j * kLanes);
      for (int p = 0; p < kThin; ++p)
        for (int j = 0; j < kVectors; ++j) acc.value[p][j] += thin[p] * w[j];
    }
    for (int p = 0; p < kThin; ++p)
      for (int j = 0; j < kVectors; ++j) tile.value[p][j] += acc.value[p][j];
  }

  static int place(int feature) { return feature; }  // of a wide feature among a tile row's accumulators
};

#if defined(__AVX512BF16__)
// Two tokens at a time: vdpbf16ps multiplies bfloat16 pairs exactly and adds them in float32.
template <>
struct Multiply<bf16> {
  using A = float;
  using Packed = uint32_t;
  static constexpr int kTokens = 2;
  static_assert(kVectors == 2 && kLanes == 16, "one 512-bit load holds the 32 wide features of a tile");

  static Packed pack(const bf16* thin, int64_t stride, int64_t left) {
    return thin[0].bits | (left > 1 ? uint32_t(thin[stride].bits) << 16 : 0u);
  }

  static void add(Tile<float>& tile, const bf16* wide, int64_t stride, const Packed* thin, int64_t thin_stride, int64_t count,
                  const bf16* ahead) {
    __m512 acc[kThin][2];
    for (int p = 0; p < kThin; ++p)
      for (int j = 0; j < 2; ++j) acc[p][j] = _mm512_setzero_ps();
    for (int64_t t = 0; t < count; t += 2, wide += 2 * stride, thin += thin_stride) {
      if (ahead) prefetch_wide(ahead + t * stride), prefetch_wide(ahead + (t + 1) * stride);
      const __m512i a = _mm512_loadu_si512(wide), b = t + 1 < count ? _mm512_loadu_si512(wide + stride) : _mm512_setzero_si512();
      const __m512bh low = (__m512bh)_mm512_unpacklo_epi16(a, b), high = (__m512bh)_mm512_unpackhi_epi16(a, b);
      for (int p = 0; p < kThin; ++p) {
        const __m512bh pair = (__m512bh)_mm512_set1_epi32(int(thin[p]));
        acc[p][0] = _mm512_dpbf16_ps(acc[p][0], low, pair);
        acc[p][1] = _mm512_dpbf16_ps(acc[p][1], high, pair);
      }
    }
    for (int p = 0; p < kThin; ++p)
      for (int j = 0; j < 2; ++j) tile.value[p][j] += (typename Vector<float>::type)acc[p][j];
  }

  // unpack works within 128-bit lanes: features 0-3, 8-11, ... are in the first vector, 4-7, 12-15, ... in the second
  static int place(int feature) { return (feature & 4) * 4 + (feature >> 3) * 4 + (feature & 3); }
};
#endif

static inline int64_t groups(int64_t thin) { return (thin + kThin - 1) / kThin; }

// The thin operand as `add` reads it: feature p of a group at `step` tokens (of kTokens each) is value[group * group_stride + step * step_stride + p].
template <typename P>
struct Thin {
  const P* value;
  int64_t group_stride, step_stride;
  std::unique_ptr<P[]> owner;  // null where the operand is read in place
};

// thin features -> [groups, n / kTokens, kThin], zero-padded
template <typename T>
Thin<typename Multiply<T>::Packed> pack(const T* thin, int64_t stride, const int64_t* index, int64_t n, int64_t width, int threads) {
  using M = Multiply<T>;
  using Packed = typename M::Packed;
  if constexpr (std::is_same_v<T, Packed>)
    if (!index && width % kThin == 0 && stride == width) return {thin, kThin, stride, nullptr};
  const int64_t steps = (n + M::kTokens - 1) / M::kTokens;
  std::unique_ptr<Packed[]> packed(new Packed[groups(width) * steps * kThin]);
  parallel_for(steps, threads, 1 << 11, [&](int64_t begin, int64_t end) {
    for (int64_t group = 0; group < groups(width); ++group) {
      const int64_t first = group * kThin, features = std::min<int64_t>(kThin, width - first);
      for (int64_t step = begin; step < end; ++step) {
        Packed* place = packed.get() + (group * steps + step) * kThin;
        const int64_t t = step * M::kTokens;
        const T* row = thin + t * stride;
        if (!index && features == kThin) {
          for (int p = 0; p < kThin; ++p) place[p] = M::pack(row + first + p, stride, n - t);
        } else {
          for (int p = 0; p < kThin; ++p)
            place[p] = p < features ? M::pack(row + (index ? index[first + p] : first + p), stride, n - t) : Packed(0);
        }
      }
    }
  });
  const Packed* value = packed.get();
  return {value, steps * kThin, kThin, std::move(packed)};
}

// A finished part of G: rows [row0, row0 + rows) x columns [col0, col0 + cols), row-major with `cols` values a row.
template <typename A>
struct Panel {
  const A* value;
  int64_t row0, rows, col0, cols;
};

// tiles [strips, group_count] of wide features [w0, w0 + wide) and thin features [p0, p0 + thin) -> a row-major panel
template <typename T, typename A>
Panel<A> unpack(const Tile<A>* tiles, A* out, bool dy_is_thin, int64_t group_count, int64_t w0, int64_t wide, int64_t p0, int64_t thin) {
  for (int64_t w = 0; w < wide; ++w) {
    const int place = Multiply<T>::place(int(w % kWide));
    for (int64_t p = 0; p < thin; ++p) {
      const A value = tiles[(w / kWide) * group_count + p / kThin].value[p % kThin][place / kLanes][place % kLanes];
      out[dy_is_thin ? p * wide + w : w * thin + p] = value;
    }
  }
  return dy_is_thin ? Panel<A>{out, p0, thin, w0, wide} : Panel<A>{out, w0, wide, p0, thin};
}

// consume(Panel) for every part of G, from several threads, each part once.
template <typename T, typename Consume>
void for_each_panel(const GradInputs& in, int threads, const Consume& consume) {
  using M = Multiply<T>;
  using A = accumulate_t<T>;
  const T *dy = static_cast<const T*>(in.grad_output), *x = static_cast<const T*>(in.input);
  const bool dy_is_thin = in.rows != nullptr;
  const T* wide = dy_is_thin ? x : dy;
  const int64_t stride = dy_is_thin ? in.stride_input : in.stride_grad_output;
  const int64_t wide_count = dy_is_thin ? in.K : in.R, thin_count = dy_is_thin ? in.R : in.K;
  if (wide_count == 0 || thin_count == 0) return;
  const auto packed =
      pack<T>(dy_is_thin ? dy : x, dy_is_thin ? in.stride_grad_output : in.stride_input, in.rows, in.n, thin_count, threads);

  const int64_t panel_groups = std::min<int64_t>(groups(thin_count), kTiles);
  const int64_t strips = (wide_count + kWide - 1) / kWide;
  const int64_t panel_strips = std::min(std::max<int64_t>(1, kTiles / panel_groups), (strips + threads - 1) / threads);
  const int64_t panels = (strips + panel_strips - 1) / panel_strips;
  const int64_t flops_per_panel = 2 * in.n * panel_strips * kWide * thin_count;
  parallel_for(panels, threads, 1 + (1 << 20) / std::max<int64_t>(flops_per_panel, 1), [&](int64_t begin, int64_t end) {
    alignas(64) Tile<A> tiles[kTiles];
    alignas(64) A out[kTiles * kThin * kWide];
    alignas(64) T border[kBlock * kWide];
    for (int64_t panel = begin; panel < end; ++panel)
      for (int64_t group0 = 0; group0 < groups(thin_count); group0 += panel_groups) {
        const int64_t w0 = panel * panel_strips * kWide, wide_here = std::min(panel_strips * kWide, wide_count - w0);
        const int64_t group_count = std::min(panel_groups, groups(thin_count) - group0);
        std::memset(static_cast<void*>(tiles), 0, sizeof(tiles));
        for (int64_t t = 0; t < in.n; t += kBlock) {
          const int64_t count = std::min<int64_t>(kBlock, in.n - t);
          for (int64_t s = 0; s * kWide < wide_here; ++s) {
            const T* source = wide + t * stride + w0 + s * kWide;
            int64_t source_stride = stride;
            if (const int64_t width = wide_here - s * kWide; width < kWide) {  // the right border, widened with zeros
              std::memset(static_cast<void*>(border), 0, sizeof(border));
              for (int64_t i = 0; i < count; ++i) std::memcpy(static_cast<void*>(border + i * kWide), source + i * stride, width * sizeof(T));
              source = border, source_stride = kWide;
            }
            // the next strip of these tokens, or the first of the next block's
            const bool last = (s + 1) * kWide >= wide_here;
            const T* ahead = source == border || (last && t + 2 * kBlock > in.n) ? nullptr : last ? wide + (t + kBlock) * stride + w0 : source + kWide;
            for (int64_t g = 0; g < group_count; ++g)
              M::add(tiles[s * group_count + g], source, source_stride,
                     packed.value + (group0 + g) * packed.group_stride + t / M::kTokens * packed.step_stride, packed.step_stride, count,
                     g == 0 ? ahead : nullptr);
          }
        }
        const int64_t p0 = group0 * kThin;
        consume(unpack<T, A>(tiles, out, dy_is_thin, group_count, w0, wide_here, p0, std::min(group_count * kThin, thin_count - p0)));
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
