#include "parallel.h"

#include <algorithm>
#include <thread>
#include <vector>

namespace slicefine {

void parallel_for(int64_t n, int threads, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
  if (n <= 0) return;
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, n / std::max<int64_t>(grain, 1)));
  const int64_t chunk = (n + parts - 1) / parts;
  std::vector<std::thread> workers;
  for (int64_t begin = chunk; begin < n; begin += chunk)
    workers.emplace_back(body, context, begin, std::min(n, begin + chunk));
  body(context, 0, std::min(n, chunk));
  for (auto& worker : workers) worker.join();
}

}  // namespace slicefine
