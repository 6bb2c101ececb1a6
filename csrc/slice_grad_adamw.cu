// Gradient, AdamW and write-through of one slice in one kernel: of the gradient only the partial sums of split tiles
// reach memory.
#include "gradient_tile.cuh"

namespace slicefine::cuda {

struct UpdateSlice {
  Slice slice;
  Moments moments;
  AdamWStep step;

  struct State {
    float p, m, v;
    int64_t offset;  // in W
  };
  __device__ __forceinline__ AdamWScalars<float> prepare() const { return adamw_scalars(step.constants, *slice.step); }
  __device__ __forceinline__ State load(int64_t element, int64_t row, int64_t col) const {
    return {slice.master[element], moments.exp_avg[element], moments.exp_avg_sq[element],
            weight_offset(slice, row, col)};
  }
  __device__ __forceinline__ void store(const AdamWScalars<float>& scalars, int64_t element, float g, State s) const {
    s.p = adamw_update(s.p, g, s.m, s.v, scalars);
    slice.master[element] = s.p;
    moments.exp_avg[element] = s.m;
    moments.exp_avg_sq[element] = s.v;
    write_through(slice, step, element, s.offset, s.p);
  }
};

void slice_grad_adamw(const GradInputs& in, const Slice& slice, const Moments& moments, const AdamWStep& step,
                      const Launch& launch) {
  launch_gradient("slice_grad_adamw", in, UpdateSlice{slice, moments, step}, launch);
}

}  // namespace slicefine::cuda
