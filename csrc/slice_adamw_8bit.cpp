// slice_adamw with both moments in 8 bits: codes of a codebook, one scale per kQuantum of them (Dettmers et al. 2022).
#include <algorithm>
#include <cmath>

#include "parallel.h"
#include "update.h"

namespace slicefine {
namespace SLICEFINE_ISA {

// The 256 ascending values of a codebook, the 255 midpoints between them, and where to look for a ratio's code.
struct Codebook {
  static constexpr int kFirst = (127 - 24) << 7;          // 2^-24: every smaller magnitude shares a cell
  static constexpr int kCells = ((127 << 7) | 1) - kFirst;  // by exponent and 7 bits of fraction, up to 1
  float value[256], middle[256];
  uint8_t start[2][kCells];  // [sign]: the number of midpoints below the cell; at most one more lies within it

  explicit Codebook(const float* values) {
    for (int i = 0; i < 256; ++i) value[i] = values[i];
    for (int i = 0; i < 255; ++i) middle[i] = (value[i] + value[i + 1]) * 0.5f;
    middle[255] = INFINITY;
    int below = 0;
    for (int cell = 0; cell < kCells; ++cell) {  // positive ratios, upwards
      const float low = cell ? bits_float(uint32_t(kFirst + cell) << 16) : 0.0f;
      while (middle[below] < low) ++below;
      start[0][cell] = uint8_t(below);
    }
    below = 0;
    for (int cell = kCells - 1; cell >= 0; --cell) {  // negative ones, from -1 upwards
      const float low = -bits_float(uint32_t(kFirst + cell + 1) << 16);
      while (middle[below] < low) ++below;
      start[1][cell] = uint8_t(below);
    }
  }

  uint8_t nearest(float ratio) const {
    const uint32_t bits = float_bits(ratio);
    int cell = int((bits >> 16) & 0x7FFFu) - kFirst;
    cell = cell < 0 ? 0 : cell >= kCells ? kCells - 1 : cell;
    const uint8_t code = start[bits >> 31][cell];
    return uint8_t(code + (ratio > middle[code]));
  }
};

static void dequantize(const uint8_t* codes, float scale, const Codebook& book, float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] = book.value[codes[i]] * scale;
}

// Nearest value of the book times the block's largest magnitude; a code is the number of midpoints below the ratio.
static void quantize(const float* values, const Codebook& book, uint8_t* codes, float* scale, int64_t count) {
  float largest = 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    const float magnitude = std::fabs(values[i]);
    largest = magnitude > largest || magnitude != magnitude ? magnitude : largest;  // a NaN stays, as in the reference
  }
  const float inverse = largest > 0.0f ? 1.0f / largest : 0.0f;
  for (int64_t i = 0; i < count; ++i) codes[i] = uint8_t(nonzero_code(book.nearest(values[i] * inverse), values[i]));
  *scale = largest;
}

void slice_adamw_8bit(const Slice* slices, const Moments8* moments, int64_t count, const float* codebook, const AdamWOptions& options,
                      int threads) {
  const Codebook signed_book(codebook), unsigned_book(codebook + 256);
  const auto blocks_of = [](const Slice& slice) { return (slice.R * slice.K + kQuantum - 1) / kQuantum; };
  int64_t blocks = 0;
  for (int64_t i = 0; i < count; ++i) blocks += blocks_of(slices[i]);

  parallel_for(blocks, threads, 1 << 7, [&](int64_t begin, int64_t end) {
    int64_t first = 0;
    for (int64_t i = 0; i < count; first += blocks_of(slices[i]), ++i) {
      const Slice& slice = slices[i];
      const int64_t from = std::max<int64_t>(begin - first, 0), to = std::min(end - first, blocks_of(slice));
      if (from >= to) continue;
      const AdamWScalars<float> s = adamw_scalars<float>(options.lr, options.beta1, options.beta2, options.eps, options.weight_decay,
                                                         options.maximize, moments[i].step);
      const bool neighbors = are_neighbors(slice, 0, slice.K);
      for (int64_t block = from; block < to; ++block) {
        const int64_t e = block * kQuantum, size = std::min<int64_t>(kQuantum, slice.R * slice.K - e);
        float m[kQuantum], v[kQuantum];
        dequantize(moments[i].exp_avg + e, moments[i].exp_avg_scale[block], signed_book, m, size);
        dequantize(moments[i].exp_avg_sq + e, moments[i].exp_avg_sq_scale[block], unsigned_book, v, size);
        adamw_run(moments[i].master + e, moments[i].grad + e, m, v, size, s);
        quantize(m, signed_book, moments[i].exp_avg + e, moments[i].exp_avg_scale + block, size);
        quantize(v, unsigned_book, moments[i].exp_avg_sq + e, moments[i].exp_avg_sq_scale + block, size);
        for (int64_t at = e; at < e + size;) {  // row by row, as far as the block reaches
          const int64_t row = at / slice.K, col = at % slice.K, run = std::min(slice.K - col, e + size - at);
          write_row(slice, row, col, run, neighbors, options, uint32_t(i), moments[i].master + at);
          at += run;
        }
      }
    }
  });
}

}  // namespace SLICEFINE_ISA
}  // namespace slicefine
