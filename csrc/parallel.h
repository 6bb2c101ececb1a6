// Splits [0, n) over threads. No OpenMP: a second OpenMP runtime beside torch's oversubscribes or deadlocks.
#pragma once
#include <cstdint>

namespace slicefine {

// At most `threads` parts of at least `grain` each; parts start at multiples of a common size.
// Compiled once, in parallel.cpp: were std::thread's templates instantiated in the files that are built for AVX-512, the
// linker could keep that copy for every CPU.
void parallel_for(int64_t n, int threads, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context);

template <typename Body>
void parallel_for(int64_t n, int threads, int64_t grain, const Body& body) {
  parallel_for(
      n, threads, grain, [](void* context, int64_t begin, int64_t end) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace slicefine
