// Enough of CUDA to run the real csrc/*.cu on a CPU: g++ -x c++ -include tests/ops/cuda_on_host.h csrc/slice_grad.cu
//
// The threads of a block are fibers that run one at a time: a warp as far as it gets without the others, its lanes from one warp
// instruction to the next. Blocks run one after the other. SLICEFINE_EMULATOR_SEED shuffles blocks, warps and lanes. Asynchronous
// copies land only when they are waited for, shared memory is full of NaN when a block starts, and an access that a GPU would refuse
// (misaligned, barrier not reached by all) is an error. Fragments are laid out as "Matrix Fragments" in the PTX ISA describes them.
#pragma once
#define SLICEFINE_ON_HOST
#define __global__
#define __device__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define SLICEFINE_SHARED(type, name) type& name = *static_cast<type*>(slicefine::cuda::shared_memory(__LINE__, sizeof(type)))

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "numeric.h"

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return std::getenv("SLICEFINE_EMULATOR_FAIL") ? cudaErrorInvalidConfiguration : cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }

struct alignas(16) float4 { float x, y, z, w; };
struct Index { unsigned x; };
inline Index threadIdx, blockIdx;

namespace slicefine::cuda {

constexpr int kStack = 128 * 1024;

struct Copy { char* to; const char* from; int bytes; };

struct Fiber {
  enum { kReady, kAtWarp, kAtBlock, kDone } state;
  jmp_buf here;
  std::vector<char> stack = std::vector<char>(kStack);
  std::vector<Copy> uncommitted;
  std::vector<std::vector<Copy>> groups;
  int exchanges;               // warp instructions so far: even and odd ones have their own registers below
  uint32_t registers[2][6];    // what this lane hands to the others
  int votes, vote[2];
};

struct Emulator {
  std::vector<Fiber> fibers;
  int threads = 0;
  Fiber* current = nullptr;
  jmp_buf scheduler;
  const std::function<void()>* body = nullptr;
  std::vector<std::pair<int, size_t>> named;  // shared variables: line, offset
  std::vector<char> shared;
  size_t shared_used = 0;
  std::string error;
};
inline Emulator emulator;

inline void fail(const std::string& what) {
  if (emulator.error.empty()) emulator.error = what + " (block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(threadIdx.x) + ")";
}

inline void* shared_memory(int line, size_t size) {
  for (const auto& [name, offset] : emulator.named)
    if (name == line) return emulator.shared.data() + offset;
  emulator.named.emplace_back(line, emulator.shared_used);
  emulator.shared_used += (size + 15) / 16 * 16;
  if (emulator.shared_used > emulator.shared.size()) fail("more than 48 KB of shared memory");
  return emulator.shared.data() + emulator.named.back().second;
}

__attribute__((noinline)) inline void leave(decltype(Fiber::state) state) {
  Fiber* fiber = emulator.current;
  fiber->state = state;
  if (_setjmp(fiber->here) == 0) _longjmp(emulator.scheduler, 1);
}

__attribute__((noinline)) inline void resume(Fiber& fiber, unsigned thread) {
  emulator.current = &fiber;
  threadIdx.x = thread;
  if (_setjmp(emulator.scheduler) == 0) _longjmp(fiber.here, 1);
}

inline void fiber_main() {
  leave(Fiber::kReady);
  (*emulator.body)();
  if (!emulator.current->groups.empty() || !emulator.current->uncommitted.empty()) fail("a thread ended with copies on their way");
  leave(Fiber::kDone);
}

__attribute__((noinline)) inline void start(Fiber& fiber) {
  static ucontext_t context, back;
  fiber.exchanges = fiber.votes = 0;
  fiber.groups.clear();
  fiber.uncommitted.clear();
  emulator.current = &fiber;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.data();
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
  if (_setjmp(emulator.scheduler) == 0) swapcontext(&back, &context);
}

// Threads [begin, end) that are not done all wait at this kind of barrier: let them go. True if any was let go.
inline bool release(decltype(Fiber::state) barrier, int begin, int end) {
  auto& fibers = emulator.fibers;
  bool any = false;
  for (int i = begin; i < end; ++i)
    if (fibers[size_t(i)].state != barrier && fibers[size_t(i)].state != Fiber::kDone) return false;
  for (int i = begin; i < end; ++i)
    if (fibers[size_t(i)].state == barrier) fibers[size_t(i)].state = Fiber::kReady, any = true;
  return any;
}

// warps and lanes: the order in which they run.
inline void run_block(const std::vector<int>& warps, const std::vector<int>& lanes) {
  std::fill(emulator.shared.begin(), emulator.shared.end(), char(0xFF));
  emulator.shared_used = 0;
  emulator.named.clear();
  for (int i = 0; i < emulator.threads; ++i) start(emulator.fibers[size_t(i)]);
  do {
    for (int warp : warps) {
      do {
        for (int lane : lanes) {
          Fiber& fiber = emulator.fibers[size_t(warp * 32 + lane)];
          if (fiber.state == Fiber::kReady) resume(fiber, unsigned(warp * 32 + lane));
        }
      } while (release(Fiber::kAtWarp, warp * 32, warp * 32 + 32));
    }
  } while (release(Fiber::kAtBlock, 0, emulator.threads));
  for (int i = 0; i < emulator.threads; ++i)
    if (emulator.fibers[size_t(i)].state != Fiber::kDone) fail("a barrier that not all threads reach");
}

inline void run_on_host(int blocks, int threads, const std::function<void()>& body) {
  const char* seed = std::getenv("SLICEFINE_EMULATOR_SEED");
  std::mt19937 random(seed ? unsigned(std::atoi(seed)) : 0);
  std::vector<int> block_order(static_cast<size_t>(blocks)), warps(static_cast<size_t>(threads / 32)), lanes(32);
  for (auto* order : {&block_order, &warps, &lanes}) std::iota(order->begin(), order->end(), 0);
  if (seed) std::shuffle(block_order.begin(), block_order.end(), random);
  emulator.body = &body;
  emulator.threads = threads;
  emulator.error.clear();
  emulator.shared.resize(48 * 1024);
  if (int(emulator.fibers.size()) < threads) emulator.fibers.resize(threads);
  for (int block : block_order) {
    if (seed) std::shuffle(warps.begin(), warps.end(), random), std::shuffle(lanes.begin(), lanes.end(), random);
    blockIdx.x = unsigned(block);
    run_block(warps, lanes);
    if (!emulator.error.empty()) throw std::runtime_error("emulated GPU: " + emulator.error);
  }
}

// -- CUDA C++ --

inline void syncthreads() { leave(Fiber::kAtBlock); }

inline bool syncthreads_and(bool mine) {
  Fiber& f = *emulator.current;
  const int parity = f.votes++ % 2;
  f.vote[parity] = mine;
  syncthreads();
  bool all = true;
  for (int i = 0; i < emulator.threads; ++i) all = all && emulator.fibers[size_t(i)].vote[parity];
  return all;
}

inline int atomic_add(int32_t* p, int32_t value) { return std::exchange(*p, *p + value); }

// -- PTX: the twins of csrc/ptx.cuh --

inline float load_from_l2(const float* p) { return *p; }

inline uint32_t to_tf32(float x) { return (float_bits(x) + 0x1000u) & 0xFFFFE000u; }

inline void cp_async_16(void* shared, const void* global, int bytes) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16) fail("cp.async of 16 bytes at a misaligned address");
  if (bytes < 0 || bytes > 16) fail("cp.async of " + std::to_string(bytes) + " bytes");
  emulator.current->uncommitted.push_back({static_cast<char*>(shared), static_cast<const char*>(global), bytes});
}

inline void cp_async_commit() {
  emulator.current->groups.push_back(std::move(emulator.current->uncommitted));
  emulator.current->uncommitted.clear();
}

template <int Pending>
inline void cp_async_wait() {
  auto& groups = emulator.current->groups;
  while (int(groups.size()) > Pending) {
    for (const Copy& copy : groups.front()) {
      std::memset(copy.to, 0, 16);
      std::memcpy(copy.to, copy.from, size_t(copy.bytes));
    }
    groups.erase(groups.begin());
  }
}

// Hands `count` registers to the other lanes of the warp; lane(i) then shows lane i's.
struct Exchange {
  int parity, warp;
  Exchange(const uint32_t* registers, int count) {
    Fiber& f = *emulator.current;
    parity = f.exchanges++ % 2;
    warp = int(threadIdx.x) / 32 * 32;
    std::copy(registers, registers + count, f.registers[parity]);
    leave(Fiber::kAtWarp);
  }
  const uint32_t* lane(int i) const { return emulator.fibers[size_t(warp + i)].registers[parity]; }
};

inline uint32_t reduce_max(uint32_t mask, uint32_t mine) {
  if (mask != 0xFFFFFFFFu) fail("a reduction over a part of a warp");
  const Exchange exchange(&mine, 1);
  for (int i = 0; i < 32; ++i) {
    if (emulator.fibers[size_t(exchange.warp + i)].exchanges < emulator.current->exchanges) fail("a reduction that not all lanes reach");
    mine = std::max(mine, *exchange.lane(i));
  }
  return mine;
}

inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared) {
  if (reinterpret_cast<uintptr_t>(shared) % 16) fail("ldmatrix at a misaligned address");
  uint32_t address[2];
  std::memcpy(address, &shared, 8);
  const Exchange exchange(address, 2);
  const int lane = int(threadIdx.x) % 32;
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t element[2];
    for (int i = 0; i < 2; ++i) {
      const uint16_t* row;
      std::memcpy(&row, exchange.lane(matrix * 8 + lane % 4 * 2 + i), 8);
      element[i] = row[lane / 4];
    }
    r[matrix] = element[0] | uint32_t(element[1]) << 16;
  }
}

// c [16, 8] += a [16, Depth] b [Depth, 8]: A(row, k) and B(k, col) find an operand in the registers of the lane that holds it.
template <int Depth, typename A, typename B>
inline void multiply_fragments(float* c, const A& a, const B& b) {
  const int lane = int(threadIdx.x) % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
    for (int k = 0; k < Depth; ++k) c[i] += a(row, k) * b(k, col);
  }
}

template <typename T>
inline float half_of(uint32_t reg, int half) {
  T value;
  value.bits = uint16_t(reg >> 16 * half);
  return load(&value);
}

template <typename T>
inline void mma_m16n8k16(float* c, const uint32_t (&a)[4], const uint32_t* b, T) {
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const Exchange exchange(mine, 6);
  multiply_fragments<16>(
      c, [&](int row, int k) { return half_of<T>(exchange.lane(row % 8 * 4 + k % 8 / 2)[row / 8 + k / 8 * 2], k % 2); },
      [&](int k, int col) { return half_of<T>(exchange.lane(col * 4 + k % 8 / 2)[4 + k / 8], k % 2); });
}

inline void mma_m16n8k8_tf32(float* c, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  for (uint32_t reg : mine)
    if (reg & 0x1FFFu) fail("an operand that is not TF32");
  const Exchange exchange(mine, 6);
  multiply_fragments<8>(
      c, [&](int row, int k) { return bits_float(exchange.lane(row % 8 * 4 + k % 4)[row / 8 + k / 4 * 2]); },
      [&](int k, int col) { return bits_float(exchange.lane(col * 4 + k % 4)[4 + k / 4]); });
}

}  // namespace slicefine::cuda

inline void __syncthreads() { slicefine::cuda::syncthreads(); }
inline bool __syncthreads_and(bool mine) { return slicefine::cuda::syncthreads_and(mine); }
inline void __threadfence() {}
inline uint32_t __reduce_max_sync(uint32_t mask, uint32_t mine) { return slicefine::cuda::reduce_max(mask, mine); }
inline int atomicAdd(int32_t* p, int32_t value) { return slicefine::cuda::atomic_add(p, value); }
