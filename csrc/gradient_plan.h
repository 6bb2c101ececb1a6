// How a slice's gradient is cut into tiles and its tokens into splits; which block does what. For host and device.
//
// Of the two operands the one with more features is called wide, the other thin: dY and X of a column slice, X and dY
// of a row slice.
#pragma once
#include "slice_update.h"

namespace slicefine::cuda {

constexpr int kGradThreads = 128;
constexpr int kBlockWide = 128;     // features of a tile
constexpr int kThinNarrow = 16;     // where the thin operand has no more than this
constexpr int kThinBroad = 64;
constexpr int kBlocksPerProcessor = 2;
constexpr int kMaxSplits = 64;      // the last block of a tile adds this many partial tiles by itself
constexpr int kMinStages = 4;       // blocks of tokens in a split, so that its pipeline fills

// Tokens that one stage of the pipeline holds.
SLICEFINE_HD constexpr int tokens_per_stage(int element_size) { return 64 / element_size; }

struct GradPlan {
  int64_t tokens, tokens_per_split;
  int32_t wide_tiles, thin_tiles, splits;
};

inline GradPlan plan_gradient(int64_t tokens, int64_t wide, int64_t thin, int element_size, int processors) {
  const int64_t stage = tokens_per_stage(element_size);
  const int64_t wide_tiles = ceil_div(wide, kBlockWide);
  const int64_t thin_tiles = ceil_div(thin, thin <= kThinNarrow ? kThinNarrow : kThinBroad);
  int64_t splits = kBlocksPerProcessor * int64_t(processors) / (wide_tiles * thin_tiles);
  if (splits > kMaxSplits) splits = kMaxSplits;
  if (splits > tokens / (kMinStages * stage)) splits = tokens / (kMinStages * stage);
  if (splits < 1) splits = 1;
  const int64_t tokens_per_split = ceil_div(ceil_div(tokens, splits), stage) * stage;
  if (tokens_per_split) splits = ceil_div(tokens, tokens_per_split);
  return {tokens, tokens_per_split, int32_t(wide_tiles), int32_t(thin_tiles), int32_t(splits)};
}

// Tiles are split only while tiles * splits <= 2 * processors: a bound on the partial tiles and, with splits >= 2, on the
// tiles that need a counter.
inline int64_t partial_values(int processors) {
  return int64_t(kBlocksPerProcessor) * processors * kBlockWide * kThinBroad;
}
inline int64_t tile_counters(int processors) { return processors; }

// What one block does: tokens [begin, end) of the tile that starts at features (wide, thin).
struct BlockWork {
  int64_t begin, end;
  int64_t wide, thin;
  int32_t tile, split;
};

// Blocks that read the same part of the wide operand are neighbors, so that they meet in the cache.
SLICEFINE_HD BlockWork work_of_block(const GradPlan& plan, int32_t block, int32_t block_thin) {
  const int32_t thin_tile = block % plan.thin_tiles, wide_tile = block / plan.thin_tiles % plan.wide_tiles;
  const int32_t split = block / plan.thin_tiles / plan.wide_tiles;
  const int64_t begin = split * plan.tokens_per_split, end = begin + plan.tokens_per_split;
  return {begin, end < plan.tokens ? end : plan.tokens, int64_t(wide_tile) * kBlockWide,
          int64_t(thin_tile) * block_thin, wide_tile * plan.thin_tiles + thin_tile, split};
}

}  // namespace slicefine::cuda
