// The arguments of the ops, and their declaration in each instruction set's namespace.
#pragma once
#include "numeric.h"

namespace slicefine {

// One slice of a weight matrix W (out, in): rows x cols, R x K elements. A null index means every row or column, in order.
struct Slice {
  void* weight;                     // W, element type `dtype`
  int64_t stride_row, stride_col;   // of W, in elements
  const int64_t *rows, *cols;       // [R], [K] or null
  int64_t R, K;
  DType dtype;
  int64_t first_row;                // rows of the slices before this one in the same call
};

// AdamW's tensors for one slice: contiguous [R, K], double where W is double, else float. `grad` is unused by the fused op.
struct Moments {
  void *master, *exp_avg, *exp_avg_sq;
  const void* grad;
  double step;
};

// AdamW's tensors for one slice with moments in 8 bits: codes contiguous [R, K], a scale per kQuantum of them.
struct Moments8 {
  float* master;
  uint8_t *exp_avg, *exp_avg_sq;
  float *exp_avg_scale, *exp_avg_sq_scale;
  const float* grad;
  double step;
};

struct AdamWOptions {
  double lr, beta1, beta2, eps, weight_decay;
  bool maximize, stochastic;        // stochastic: round to bfloat16 at random, from `seed`
  uint64_t seed;
};

// dY (n, out) and X (n, k), last dimension contiguous, both of type `dtype`.
struct GradInputs {
  const void *grad_output, *input;
  int64_t stride_grad_output, stride_input;  // of the rows, in elements
  int64_t n;
  const int64_t* rows;                       // which columns of dY, or null for all
  int64_t R, K;
  DType dtype;
};

// x (n, d) of a norm with a frozen weight [d] of the same type; sums in `internal`, f32, or f64 where x is f64 too.
struct NormInputs {
  const void *x, *weight;
  int64_t stride_x, n, d;
  DType dtype, internal;
  double eps, offset;                        // y = (offset + weight) x rstd
  bool late_cast;                            // round once, after the weight, instead of before it and after it
};

// gate and up (n, m) of a gated MLP, and the gradient of their product in backward.
enum class Gate { silu = 0, gelu_tanh = 1 };
struct GateInputs {
  const void *gate, *up, *grad;
  int64_t stride_gate, stride_up, stride_grad, n, m;
  DType dtype;
  Gate kind;
};

// X (n, in) with rows `stride` elements apart, columns next to each other; cols [K], each below `in`; out (n, K) contiguous.
void take_columns(const void* x, int64_t stride, const int64_t* cols, int64_t n, int64_t K, DType dtype, void* out, int threads);

#define SLICEFINE_DECLARE_OPS(isa)                                                                                   \
  namespace isa {                                                                                                    \
  void slice_grad(const GradInputs& in, void* out, int threads);                                                     \
  void slice_adamw(const Slice* slices, const Moments* moments, int64_t count, const AdamWOptions& options, int threads); \
  void slice_adamw_8bit(const Slice* slices, const Moments8* moments, int64_t count, const float* codebook,            \
                        const AdamWOptions& options, int threads);                                                   \
  void slice_grad_adamw(const GradInputs& in, const Slice& slice, const Moments& moments, const AdamWOptions& options, \
                        int threads);                                                                                \
  void write_slices(const Slice* slices, const void* const* masters, int64_t count, int threads);                     \
  void rms_norm(const NormInputs& in, void* out, void* rstd, int threads);                                             \
  void rms_norm_backward(const NormInputs& in, const void* grad, int64_t stride_grad, const void* rstd, void* out, int threads); \
  void gated_activation(const GateInputs& in, void* out, int threads);                                                 \
  void gated_activation_backward(const GateInputs& in, void* grad_gate, void* grad_up, int threads);                   \
  }

SLICEFINE_DECLARE_OPS(generic)
#ifdef SLICEFINE_X86
SLICEFINE_DECLARE_OPS(avx2)
SLICEFINE_DECLARE_OPS(avx512)
SLICEFINE_DECLARE_OPS(avx512bf16)
#endif

}  // namespace slicefine
