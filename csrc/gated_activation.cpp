// y = act(gate) up and its gradients, act(x) = x / (1 + e^-u(x)): u = x is SiLU, u = 2 sqrt(2 / pi) (x + 0.044715 x^3) is
// GELU by tanh. Nothing of the forward pass is needed but gate and up.
#include "ops.h"
#include "parallel.h"
#include "vector_math.h"

namespace slicefine {
namespace SLICEFINE_ISA {
namespace {

struct Silu {
  template <typename A> static inline A u(A x) { return x; }
  template <typename A> static inline A slope(A) { return A(1); }
};

struct GeluTanh {
  template <typename A> static inline A u(A x) { return A(1.5957691216057308) * (x + A(0.044715) * x * x * x); }
  template <typename A> static inline A slope(A x) { return A(1.5957691216057308) * (A(1) + A(0.134145) * x * x); }
};

template <typename T>
struct Rows {
  const T *gate, *up, *grad;
  int64_t m;
};

template <typename T>
Rows<T> rows_of(const GateInputs& in, int64_t t) {
  const auto row = [&](const void* base, int64_t stride) { return base ? static_cast<const T*>(base) + t * stride : nullptr; };
  return {row(in.gate, in.stride_gate), row(in.up, in.stride_up), row(in.grad, in.stride_grad), in.m};
}

template <typename T, typename Act>
void forward(const GateInputs& in, void* out, int threads) {
  using A = accumulate_t<T>;
  parallel_for(in.n, threads, 1 + (1 << 13) / (in.m + 1), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const Rows<T> r = rows_of<T>(in, t);
      T* __restrict__ y = static_cast<T*>(out) + t * in.m;
      for (int64_t i = 0; i < r.m; ++i) {
        const A g = load(r.gate + i);
        store(y + i, g * logistic(Act::u(g)) * load(r.up + i));
      }
    }
  });
}

template <typename T, typename Act>
void backward(const GateInputs& in, void* grad_gate, void* grad_up, int threads) {
  using A = accumulate_t<T>;
  parallel_for(in.n, threads, 1 + (1 << 13) / (in.m + 1), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const Rows<T> r = rows_of<T>(in, t);
      T* __restrict__ dg = static_cast<T*>(grad_gate) + t * in.m;
      T* __restrict__ du = static_cast<T*>(grad_up) + t * in.m;
      for (int64_t i = 0; i < r.m; ++i) {
        const A g = load(r.gate + i), dy = load(r.grad + i), s = logistic(Act::u(g));
        store(du + i, dy * g * s);
        store(dg + i, dy * load(r.up + i) * s * (A(1) + g * (A(1) - s) * Act::slope(g)));
      }
    }
  });
}

template <typename Act>
void forward_of(const GateInputs& in, void* out, int threads) {
  switch (in.dtype) {
    case DType::f64: return forward<double, Act>(in, out, threads);
    case DType::f32: return forward<float, Act>(in, out, threads);
    case DType::bf16: return forward<bf16, Act>(in, out, threads);
    case DType::fp16: return forward<fp16, Act>(in, out, threads);
  }
}

template <typename Act>
void backward_of(const GateInputs& in, void* grad_gate, void* grad_up, int threads) {
  switch (in.dtype) {
    case DType::f64: return backward<double, Act>(in, grad_gate, grad_up, threads);
    case DType::f32: return backward<float, Act>(in, grad_gate, grad_up, threads);
    case DType::bf16: return backward<bf16, Act>(in, grad_gate, grad_up, threads);
    case DType::fp16: return backward<fp16, Act>(in, grad_gate, grad_up, threads);
  }
}

}  // namespace

void gated_activation(const GateInputs& in, void* out, int threads) {
  if (in.kind == Gate::silu) forward_of<Silu>(in, out, threads);
  else forward_of<GeluTanh>(in, out, threads);
}

void gated_activation_backward(const GateInputs& in, void* grad_gate, void* grad_up, int threads) {
  if (in.kind == Gate::silu) backward_of<Silu>(in, grad_gate, grad_up, threads);
  else backward_of<GeluTanh>(in, grad_gate, grad_up, threads);
}

}  // namespace SLICEFINE_ISA
}  // namespace slicefine
