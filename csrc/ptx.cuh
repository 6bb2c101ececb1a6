// The PTX instructions that C++ has no word for, one function each; tests/ops/cuda_on_host.h holds twins for the host.
#pragma once
#include "numeric.h"

namespace slicefine::cuda {

// 16 bytes from global to shared memory, both 16-byte aligned, without waiting; what is beyond `bytes` becomes zero.
static __device__ __forceinline__ void cp_async_16(void* shared, const void* global, int bytes) {
  const uint32_t address = uint32_t(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes) : "memory");
}

static __device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most `Pending` of this thread's groups are on their way.
template <int Pending>
static __device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// Four 8 x 8 matrices of 16-bit values, transposed. Lanes 8i to 8i + 7 point at the rows of matrix i;
// register i of a lane receives its elements (2 (lane % 4), lane / 4) and (2 (lane % 4) + 1, lane / 4).
static __device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared) {
  const uint32_t address = uint32_t(__cvta_generic_to_shared(shared));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// c [16, 8] += a [16, 16] b [16, 8], float32 sums
static __device__ __forceinline__ void mma_m16n8k16(float* c, const uint32_t (&a)[4], const uint32_t* b, bf16) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

static __device__ __forceinline__ void mma_m16n8k16(float* c, const uint32_t (&a)[4], const uint32_t* b, fp16) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c [16, 8] += a [16, 8] b [8, 8]; operands by to_tf32
static __device__ __forceinline__ void mma_m16n8k8_tf32(float* c, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// To nearest, ties away from zero; the instruction above would truncate.
static __device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// From the second-level cache: another block wrote it while this kernel ran.
static __device__ __forceinline__ float load_from_l2(const float* p) { return __ldcg(p); }

}  // namespace slicefine::cuda
