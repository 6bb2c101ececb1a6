// G = dY[:, rows]^T X  ->  contiguous [R, K], float32.
#include "gradient_tile.cuh"

namespace slicefine::cuda {

struct StoreGradient {
  float* out;

  struct Prepared {};
  struct State {};
  __device__ __forceinline__ Prepared prepare() const { return {}; }
  __device__ __forceinline__ State load(int64_t, int64_t, int64_t) const { return {}; }
  __device__ __forceinline__ void store(const Prepared&, int64_t element, float g, const State&) const {
    out[element] = g;
  }
};

int64_t workspace_values(int processors) { return partial_values(processors); }
int64_t workspace_counters(int processors) { return tile_counters(processors); }

void slice_grad(const GradInputs& in, float* out, const Launch& launch) {
  launch_gradient("slice_grad", in, StoreGradient{out}, launch);
}

}  // namespace slicefine::cuda
