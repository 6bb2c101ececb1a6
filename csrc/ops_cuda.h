// The arguments of the ops on a GPU: addresses in device memory. No CUDA header, so that the bindings need none.
#pragma once
#include "numeric.h"

namespace slicefine::cuda {

// One slice of a weight W (out, in), R x K elements, with its master; slice_adamw passes many of them by value.
struct Slice {
  float* master;                         // contiguous [R, K]
  const float* grad;                     // contiguous [R, K]; unused by the fused op
  void* weight;                          // element type `dtype`
  const int64_t *rows, *cols;            // [R], [K]; null: every row or column, in order
  const float* step;                     // (): the number of this update, counted from 1; never read by the host
  int64_t stride_row, stride_col;        // of W, in elements
  int32_t R, K;
  uint32_t id;                           // its place in the call, which tells apart the random bits of its elements
  int32_t first_block;                   // of the launch; set by for_each_table
  DType dtype;
};

// contiguous [R, K]
struct Moments {
  float *exp_avg, *exp_avg_sq;
};

// Moments in 8 bits: codes contiguous [R, K], a scale per kQuantum of them.
struct Moments8 {
  uint8_t *exp_avg, *exp_avg_sq;
  float *exp_avg_scale, *exp_avg_sq_scale;
};

struct AdamWStep {
  AdamWConstants<float> constants;
  uint64_t seed;
  bool stochastic;                       // round to bfloat16 at random, from `seed`
};

// dY (n, out) and X (n, K), last dimension contiguous, both of type `dtype`.
struct GradInputs {
  const void *grad_output, *input;
  int64_t stride_grad_output, stride_input;  // of the rows, in elements
  int64_t n;
  const int64_t* rows;                       // [R]: which columns of dY, or null for all
  int64_t R, K;
  DType dtype;
  bool allow_tf32;                           // multiply float32 on tensor cores, 10 bits of mantissa
};

// Where a kernel runs. The workspace belongs to the stream: kernels that run at the same time must not share one.
struct Launch {
  int device;
  void* stream;
  int processors;                            // streaming multiprocessors of the device
  float* workspace;                          // workspace_values(processors)
  int32_t* counters;                         // workspace_counters(processors), all zero before and after every call
};

int64_t workspace_values(int processors);
int64_t workspace_counters(int processors);
void slice_grad(const GradInputs& in, float* out, const Launch& launch);
void slice_adamw(Slice* slices, const Moments* moments, int64_t count, const AdamWStep& step, const Launch& launch);
// codebook: [2, 256] ascending, signed and unsigned
void slice_adamw_8bit(Slice* slices, const Moments8* moments, int64_t count, const float* codebook,
                      const AdamWStep& step, const Launch& launch);
void slice_grad_adamw(const GradInputs& in, const Slice& slice, const Moments& moments, const AdamWStep& step,
                      const Launch& launch);

}  // namespace slicefine::cuda
