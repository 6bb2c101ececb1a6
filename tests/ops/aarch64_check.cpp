// Runs the ops of csrc on a recorded case and prints what they computed; tests/ops/test_aarch64.py builds it for another CPU.
//
// stdin: int64 n, R, K, dtype, rows?, then dY (n, out), X (n, K), W (out, in), rows [R], cols [K], master, m, v [R, K] float;
// stdout: gradient [R, K] float, then master, m, v after slice_adamw and W, then the same after slice_grad_adamw.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../csrc/ops.h"

using namespace slicefine;

template <typename T>
static std::vector<T> read(size_t count) {
  std::vector<T> values(count);
  if (std::fread(values.data(), sizeof(T), count, stdin) != count) std::abort();
  return values;
}

template <typename T>
static void write(const std::vector<T>& values) { std::fwrite(values.data(), sizeof(T), values.size(), stdout); }

int main() {
  const auto h = read<int64_t>(7);  // n, R, K, dtype, has rows, out, in
  const int64_t n = h[0], R = h[1], K = h[2], out = h[5], in = h[6];
  const DType dtype = DType(h[3]);
  const size_t size = dtype == DType::f32 ? 4 : 2;
  const auto dy = read<char>(n * out * size), x = read<char>(n * K * size), w = read<char>(out * in * size);
  const auto rows = read<int64_t>(h[4] ? R : 0), cols = read<int64_t>(K);
  const auto master = read<float>(R * K), m = read<float>(R * K), v = read<float>(R * K);
  const AdamWOptions options{1e-2, 0.9, 0.999, 1e-8, 0.1, false, dtype == DType::bf16, 1234567};

  std::vector<float> grad(R * K);
  const GradInputs inputs{dy.data(), x.data(), out, K, n, h[4] ? rows.data() : nullptr, R, K, dtype};
  for (int threads = 1; threads <= 2; ++threads) generic::slice_grad(inputs, grad.data(), threads);
  write(grad);
  for (const bool fused : {false, true}) {
    auto p = master, a = m, b = v;
    auto weight = w;
    const Slice slice{weight.data(), in, 1, h[4] ? rows.data() : nullptr, cols.data(), R, K, dtype, 0};
    const Moments moments{p.data(), a.data(), b.data(), grad.data(), 3.0};
    if (fused) generic::slice_grad_adamw(inputs, slice, moments, options, 2);
    else generic::slice_adamw(&slice, &moments, 1, options, 2);
    write(p), write(a), write(b), write(weight);
  }
}
