// The product of two tiles in shared memory by one warp, for each kind of arithmetic:
//   c [wide, thin] += a^T [wide, token] b [token, thin]
// Each kind says which element of the warp's tile accumulator `i` of a lane is: wide_of(lane, i), thin_of(lane, i).
#pragma once
#include "gradient_plan.h"

namespace slicefine::cuda {

// Rows of a tile are tokens. 8 elements more than the features keep rows 16-byte aligned and the reads below free of
// bank conflicts.
constexpr int kPad = 8;

// Where mma.sync leaves the elements of a 16 x 8 product in a warp, `Wide / 16` by `Thin / 8` of them.
template <int Wide, int Thin>
struct MmaLayout {
  static_assert(Wide % 16 == 0 && Thin % 16 == 0, "mma.sync takes 16 x 8, and thin fragments are loaded in pairs");
  static constexpr int kColumns = Thin / 8;
  static __device__ __forceinline__ int wide_of(int lane, int i) {
    return i / 4 / kColumns * 16 + lane / 4 + i % 4 / 2 * 8;
  }
  static __device__ __forceinline__ int thin_of(int lane, int i) { return i / 4 % kColumns * 8 + lane % 4 * 2 + i % 2; }
};

// bfloat16 and float16: m16n8k16, fragments by ldmatrix.trans because the tokens, not the features, are the rows in memory
template <typename T>
struct HalfMma {
  static_assert(sizeof(T) == 2, "16-bit operands");
  using Element = T;
  template <int Wide, int Thin>
  struct Warp : MmaLayout<Wide, Thin> {
    template <int PitchA, int PitchB, int Tokens>
    static __device__ __forceinline__ void multiply(float* c, const T* a, const T* b, int lane) {
      static_assert(Tokens % 16 == 0, "m16n8k16 takes 16 tokens");
      const int matrix = lane / 8, row = lane % 8;
#pragma unroll
      for (int t = 0; t < Tokens; t += 16) {
        uint32_t fa[Wide / 16][4], fb[Thin / 16][4];
        // matrices of a: (token, feature) + (0, 0), (0, 8), (8, 0), (8, 8); of b: (0, 0), (8, 0), (0, 8), (8, 8)
#pragma unroll
        for (int i = 0; i < Wide / 16; ++i)
          ldmatrix_x4_trans(fa[i], a + (t + matrix / 2 * 8 + row) * PitchA + i * 16 + matrix % 2 * 8);
#pragma unroll
        for (int j = 0; j < Thin / 16; ++j)
          ldmatrix_x4_trans(fb[j], b + (t + matrix % 2 * 8 + row) * PitchB + j * 16 + matrix / 2 * 8);
#pragma unroll
        for (int i = 0; i < Wide / 16; ++i)
#pragma unroll
          for (int j = 0; j < Thin / 8; ++j)
            mma_m16n8k16(c + (i * (Thin / 8) + j) * 4, fa[i], fb[j / 2] + j % 2 * 2, T{});
      }
    }
  };
};

// float32 rounded to TF32: m16n8k8
struct Tf32Mma {
  using Element = float;
  template <int Wide, int Thin>
  struct Warp : MmaLayout<Wide, Thin> {
    template <int PitchA, int PitchB, int Tokens>
    static __device__ __forceinline__ void multiply(float* c, const float* a, const float* b, int lane) {
      static_assert(Tokens % 8 == 0, "m16n8k8 takes 8 tokens");
      const int group = lane / 4, member = lane % 4;
#pragma unroll
      for (int t = 0; t < Tokens; t += 8) {
        uint32_t fb[Thin / 8][2];
#pragma unroll
        for (int j = 0; j < Thin / 8; ++j)
#pragma unroll
          for (int k = 0; k < 2; ++k) fb[j][k] = to_tf32(b[(t + member + k * 4) * PitchB + j * 8 + group]);
#pragma unroll
        for (int i = 0; i < Wide / 16; ++i) {
          uint32_t fa[4];  // (feature, token) + (0, 0), (8, 0), (0, 4), (8, 4)
#pragma unroll
          for (int k = 0; k < 4; ++k)
            fa[k] = to_tf32(a[(t + member + k / 2 * 4) * PitchA + i * 16 + group + k % 2 * 8]);
#pragma unroll
          for (int j = 0; j < Thin / 8; ++j) mma_m16n8k8_tf32(c + (i * (Thin / 8) + j) * 4, fa, fb[j]);
        }
      }
    }
  };
};

// float32 as IEEE 754 has it: fused multiply-adds, a lane holds (Wide / 8) x (Thin / 4) elements in groups of 4 x 4
struct Fp32Fma {
  using Element = float;
  template <int Wide, int Thin>
  struct Warp {
    static_assert(Wide % 32 == 0 && Thin % 16 == 0, "8 x 4 lanes of 4 x 4 elements");
    static constexpr int kColumns = Thin / 4;
    static __device__ __forceinline__ int wide_of(int lane, int i) {
      return i / kColumns / 4 * 32 + lane / 4 * 4 + i / kColumns % 4;
    }
    static __device__ __forceinline__ int thin_of(int lane, int i) {
      return i % kColumns / 4 * 16 + lane % 4 * 4 + i % 4;
    }

    template <int PitchA, int PitchB, int Tokens>
    static __device__ __forceinline__ void multiply(float* c, const float* a, const float* b, int lane) {
#pragma unroll 4
      for (int t = 0; t < Tokens; ++t) {
        float fa[Wide / 8], fb[kColumns];
#pragma unroll
        for (int i = 0; i < Wide / 8; i += 4) load_four(fa + i, a + t * PitchA + wide_of(lane, i * kColumns));
#pragma unroll
        for (int j = 0; j < kColumns; j += 4) load_four(fb + j, b + t * PitchB + thin_of(lane, j));
#pragma unroll
        for (int i = 0; i < Wide / 8; ++i)
#pragma unroll
          for (int j = 0; j < kColumns; ++j) c[i * kColumns + j] += fa[i] * fb[j];
      }
    }

    static __device__ __forceinline__ void load_four(float* to, const float* shared) {
      const float4 f = *reinterpret_cast<const float4*>(shared);
      to[0] = f.x, to[1] = f.y, to[2] = f.z, to[3] = f.w;
    }
  };
};

}  // namespace slicefine::cuda
