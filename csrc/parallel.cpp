#include "parallel.h"

#include <algorithm>
#include <exception>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace slicefine {
namespace {

// One part of the range: what its body threw is kept, because an exception that leaves a thread ends the process.
struct Part {
  void (*body)(void*, int64_t, int64_t);
  void* context;
  int64_t begin, end;
  std::exception_ptr error;

  void run() noexcept {
    try {
      body(context, begin, end);
    } catch (...) {
      error = std::current_exception();
    }
  }
};

// Starts a thread, or says that there is none to be had: containers limit processes, threads and address space.
bool start(std::vector<std::thread>& workers, Part& part) {
  try {
    workers.emplace_back(&Part::run, &part);
    return true;
  } catch (const std::system_error&) {
    return false;
  } catch (const std::bad_alloc&) {
    return false;
  }
}

}  // namespace

void parallel_for(int64_t n, int threads, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
  if (n <= 0) return;
  const int64_t count = std::max<int64_t>(1, std::min<int64_t>(threads, n / std::max<int64_t>(grain, 1)));
  if (count == 1) return body(context, 0, n);
  const int64_t chunk = (n + count - 1) / count;
  std::vector<Part> parts;
  for (int64_t begin = 0; begin < n; begin += chunk) parts.push_back({body, context, begin, std::min(n, begin + chunk), nullptr});
  std::vector<std::thread> workers;
  workers.reserve(parts.size());
  size_t started = 1;  // the first part is the calling thread's
  while (started < parts.size() && start(workers, parts[started])) ++started;
  parts[0].run();
  for (size_t i = started; i < parts.size(); ++i) parts[i].run();
  for (auto& worker : workers) worker.join();
  for (const Part& part : parts)
    if (part.error) std::rethrow_exception(part.error);
}

}  // namespace slicefine
