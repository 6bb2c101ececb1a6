// Python bindings: addresses as integers, no torch header. slicefine/backends/cpu.py checks every argument before it comes here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "ops.h"

namespace py = pybind11;
using namespace slicefine;

namespace {

struct Isa {
  const char* name;
  decltype(&generic::slice_grad) slice_grad;
  decltype(&generic::slice_adamw) slice_adamw;
  decltype(&generic::slice_adamw_8bit) slice_adamw_8bit;
  decltype(&generic::slice_grad_adamw) slice_grad_adamw;
};

#define SLICEFINE_ISA_ENTRY(isa) Isa{#isa, &isa::slice_grad, &isa::slice_adamw, &isa::slice_adamw_8bit, &isa::slice_grad_adamw}

std::vector<Isa> supported_isas() {
  std::vector<Isa> list;
#ifdef SLICEFINE_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    if (__builtin_cpu_supports("avx512bf16")) list.push_back(SLICEFINE_ISA_ENTRY(avx512bf16));
    list.push_back(SLICEFINE_ISA_ENTRY(avx512));
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) list.push_back(SLICEFINE_ISA_ENTRY(avx2));
#endif
  list.push_back(SLICEFINE_ISA_ENTRY(generic));
  return list;  // best first
}

Isa current = supported_isas().front();

void select_isa(const std::string& name) {
  std::string names;
  for (const Isa& isa : supported_isas()) {
    if (name == isa.name) { current = isa; return; }
    names += std::string(names.empty() ? "" : ", ") + isa.name;
  }
  throw std::invalid_argument("instruction set '" + name + "' is not one of: " + names);
}

template <typename T = void>
T* address(uintptr_t value) { return reinterpret_cast<T*>(value); }

using GradTuple = std::tuple<uintptr_t, int64_t, uintptr_t, int64_t, int64_t, uintptr_t, int64_t, int64_t, int>;
using SliceTuple = std::tuple<uintptr_t, int64_t, int64_t, uintptr_t, uintptr_t, int64_t, int64_t, int>;
using MomentsTuple = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, double>;
using Moments8Tuple = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, double>;
using OptionsTuple = std::tuple<double, double, double, double, double, bool, bool, uint64_t>;

GradInputs grad_inputs(const GradTuple& t) {
  return {address(std::get<0>(t)), address(std::get<2>(t)), std::get<1>(t), std::get<3>(t), std::get<4>(t),
          address<const int64_t>(std::get<5>(t)), std::get<6>(t), std::get<7>(t), DType(std::get<8>(t))};
}

Slice slice(const SliceTuple& t) {
  return {address(std::get<0>(t)), std::get<1>(t), std::get<2>(t), address<const int64_t>(std::get<3>(t)),
          address<const int64_t>(std::get<4>(t)), std::get<5>(t), std::get<6>(t), DType(std::get<7>(t)), 0};
}

Moments moments(const MomentsTuple& t) {
  return {address(std::get<0>(t)), address(std::get<1>(t)), address(std::get<2>(t)), address(std::get<3>(t)), std::get<4>(t)};
}

Moments8 moments8(const Moments8Tuple& t) {
  return {address<float>(std::get<0>(t)), address<uint8_t>(std::get<1>(t)), address<uint8_t>(std::get<2>(t)),
          address<float>(std::get<3>(t)), address<float>(std::get<4>(t)), address<const float>(std::get<5>(t)), std::get<6>(t)};
}

AdamWOptions options(const OptionsTuple& t) {
  return {std::get<0>(t), std::get<1>(t), std::get<2>(t), std::get<3>(t), std::get<4>(t), std::get<5>(t), std::get<6>(t), std::get<7>(t)};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("version") = SLICEFINE_VERSION;
  m.def("isas", [] { std::vector<std::string> names; for (const Isa& isa : supported_isas()) names.push_back(isa.name); return names; });
  m.def("current_isa", [] { return std::string(current.name); });
  m.def("select_isa", &select_isa);
  m.def("take_columns", [](uintptr_t x, int64_t stride, uintptr_t cols, int64_t n, int64_t K, int dtype, uintptr_t out, int threads) {
    py::gil_scoped_release release;
    take_columns(address(x), stride, address<const int64_t>(cols), n, K, DType(dtype), address(out), threads);
  });
  m.def("slice_grad", [](const GradTuple& in, uintptr_t out, int threads) {
    py::gil_scoped_release release;
    current.slice_grad(grad_inputs(in), address(out), threads);
  });
  // table: 13 numbers a slice: W, its strides, rows, cols, R, K, dtype, master, exp_avg, exp_avg_sq, grad, step
  m.def("slice_adamw", [](uintptr_t table, int64_t count, const OptionsTuple& opts, int threads) {
    py::gil_scoped_release release;
    std::vector<Slice> s;
    std::vector<Moments> m;
    s.reserve(count), m.reserve(count);
    for (const int64_t* e = address<const int64_t>(table); int64_t(s.size()) < count; e += 13) {
      s.push_back({address(e[0]), e[1], e[2], address<const int64_t>(e[3]), address<const int64_t>(e[4]), e[5], e[6], DType(e[7]),
                   s.empty() ? 0 : s.back().first_row + s.back().R});
      m.push_back({address(e[8]), address(e[9]), address(e[10]), address(e[11]), double(*address<const float>(e[12]))});
    }
    current.slice_adamw(s.data(), m.data(), count, options(opts), threads);
  });
  m.def("slice_adamw_8bit", [](const std::vector<SliceTuple>& slices, const std::vector<Moments8Tuple>& states, uintptr_t codebook,
                               const OptionsTuple& opts, int threads) {
    py::gil_scoped_release release;
    std::vector<Slice> s;
    std::vector<Moments8> m;
    for (const auto& t : slices) s.push_back(slice(t));
    for (const auto& t : states) m.push_back(moments8(t));
    current.slice_adamw_8bit(s.data(), m.data(), int64_t(s.size()), address<const float>(codebook), options(opts), threads);
  });
  m.def("slice_grad_adamw", [](const GradTuple& in, const SliceTuple& s, const MomentsTuple& state, const OptionsTuple& opts, int threads) {
    py::gil_scoped_release release;
    current.slice_grad_adamw(grad_inputs(in), slice(s), moments(state), options(opts), threads);
  });
}
