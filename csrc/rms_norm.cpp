// y = (offset + w) x rstd, rstd = 1 / sqrt(mean(x^2) + eps), and its gradient for x; the weight is frozen and has none.
#include <cmath>

#include "ops.h"
#include "parallel.h"

namespace slicefine {
namespace SLICEFINE_ISA {
namespace {

constexpr int64_t kSums = 64;  // partial sums of a reduction: whole vectors of every instruction set

// Rounded to T as memory would hold it.
template <typename T, typename A>
A rounded(A value) {
  T held;
  store(&held, static_cast<accumulate_t<T>>(value));
  return A(load(&held));
}

// The sum of term(i) over [0, count), kSums of them at a time; strict float order would leave it scalar.
template <typename A, typename Term>
A sum_of(int64_t count, const Term& term) {
  A sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums)
    for (int64_t l = 0; l < kSums; ++l) sums[l] += term(i + l);
  for (int64_t l = 0; i + l < count; ++l) sums[l] += term(i + l);
  for (int64_t half = kSums / 2; half; half /= 2)
    for (int64_t l = 0; l < half; ++l) sums[l] += sums[l + half];
  return sums[0];
}

template <typename T, typename A>
void forward(const NormInputs& in, void* out, void* rstd_out, int threads) {
  const T* weight = static_cast<const T*>(in.weight);
  const A offset = A(in.offset);
  parallel_for(in.n, threads, 1 + (1 << 14) / (in.d + 1), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const T* x = static_cast<const T*>(in.x) + t * in.stride_x;
      T* __restrict__ y = static_cast<T*>(out) + t * in.d;
      const A squares = sum_of<A>(in.d, [&](int64_t i) { const A v = A(load(x + i)); return v * v; });
      const A rstd = A(1) / std::sqrt(squares / A(in.d) + A(in.eps));
      static_cast<A*>(rstd_out)[t] = rstd;
      if (in.late_cast) {
        for (int64_t i = 0; i < in.d; ++i)
          store(y + i, static_cast<accumulate_t<T>>(A(load(x + i)) * rstd * (offset + A(load(weight + i)))));
      } else if (in.offset != 0) {
        for (int64_t i = 0; i < in.d; ++i)
          store(y + i, static_cast<accumulate_t<T>>(rounded<T>(offset + A(load(weight + i))) * rounded<T>(A(load(x + i)) * rstd)));
      } else {
        for (int64_t i = 0; i < in.d; ++i)
          store(y + i, static_cast<accumulate_t<T>>(load(weight + i) * accumulate_t<T>(rounded<T>(A(load(x + i)) * rstd))));
      }
    }
  });
}

template <typename T, typename A>
void backward(const NormInputs& in, const void* grads, int64_t stride_grad, const void* rstds, void* out, int threads) {
  const T* weight = static_cast<const T*>(in.weight);
  const A offset = A(in.offset);
  parallel_for(in.n, threads, 1 + (1 << 14) / (in.d + 1), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const T* x = static_cast<const T*>(in.x) + t * in.stride_x;
      const T* grad = static_cast<const T*>(grads) + t * stride_grad;
      T* __restrict__ dx = static_cast<T*>(out) + t * in.d;
      const A rstd = static_cast<const A*>(rstds)[t];
      const auto scaled = [&](int64_t i) { return A(load(grad + i)) * (offset + A(load(weight + i))); };
      // dx = rstd (s - x mean(s x) rstd^2)
      const A along = sum_of<A>(in.d, [&](int64_t i) { return scaled(i) * A(load(x + i)); }) / A(in.d) * rstd * rstd;
      for (int64_t i = 0; i < in.d; ++i)
        store(dx + i, static_cast<accumulate_t<T>>((scaled(i) - A(load(x + i)) * along) * rstd));
    }
  });
}

}  // namespace

void rms_norm(const NormInputs& in, void* out, void* rstd, int threads) {
  switch (in.dtype) {
    case DType::f64: return in.internal == DType::f64 ? forward<double, double>(in, out, rstd, threads)
                                                      : forward<double, float>(in, out, rstd, threads);
    case DType::f32: return forward<float, float>(in, out, rstd, threads);
    case DType::bf16: return forward<bf16, float>(in, out, rstd, threads);
    case DType::fp16: return forward<fp16, float>(in, out, rstd, threads);
  }
}

void rms_norm_backward(const NormInputs& in, const void* grad, int64_t stride_grad, const void* rstd, void* out, int threads) {
  switch (in.dtype) {
    case DType::f64: return in.internal == DType::f64 ? backward<double, double>(in, grad, stride_grad, rstd, out, threads)
                                                      : backward<double, float>(in, grad, stride_grad, rstd, out, threads);
    case DType::f32: return backward<float, float>(in, grad, stride_grad, rstd, out, threads);
    case DType::bf16: return backward<bf16, float>(in, grad, stride_grad, rstd, out, threads);
    case DType::fp16: return backward<fp16, float>(in, grad, stride_grad, rstd, out, threads);
  }
}

}  // namespace SLICEFINE_ISA
}  // namespace slicefine
