// Python bindings of the CUDA ops: addresses as integers, no torch header.
// slicefine/backends/cuda.py checks every argument before it comes here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "ops_cuda.h"

namespace py = pybind11;
using namespace slicefine;
using namespace slicefine::cuda;

namespace {

template <typename T = void>
T* address(uintptr_t value) { return reinterpret_cast<T*>(value); }

using LaunchTuple = std::tuple<int, uintptr_t, int, uintptr_t, uintptr_t>;
using GradTuple = std::tuple<uintptr_t, int64_t, uintptr_t, int64_t, int64_t, uintptr_t, int64_t, int64_t, int, bool>;
using SliceTuple = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, int32_t,
                              int32_t, int>;
using MomentsTuple = std::tuple<uintptr_t, uintptr_t>;
using Moments8Tuple = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t>;
using OptionsTuple = std::tuple<double, double, double, double, double, bool, bool, uint64_t>;

Launch launch(const LaunchTuple& t) {
  return {std::get<0>(t), address(std::get<1>(t)), std::get<2>(t), address<float>(std::get<3>(t)),
          address<int32_t>(std::get<4>(t))};
}

GradInputs grad_inputs(const GradTuple& t) {
  return {address(std::get<0>(t)), address(std::get<2>(t)), std::get<1>(t), std::get<3>(t), std::get<4>(t),
          address<const int64_t>(std::get<5>(t)), std::get<6>(t), std::get<7>(t), DType(std::get<8>(t)), std::get<9>(t)};
}

Slice slice(const SliceTuple& t, uint32_t id) {
  return {address<float>(std::get<0>(t)), address<const float>(std::get<1>(t)), address(std::get<2>(t)),
          address<const int64_t>(std::get<3>(t)), address<const int64_t>(std::get<4>(t)),
          address<const float>(std::get<5>(t)), std::get<6>(t), std::get<7>(t), std::get<8>(t), std::get<9>(t), id, 0,
          DType(std::get<10>(t))};
}

std::vector<Slice> slices(const std::vector<SliceTuple>& tuples) {
  std::vector<Slice> s;
  for (const auto& t : tuples) s.push_back(slice(t, uint32_t(s.size())));
  return s;
}

Moments moments(const MomentsTuple& t) { return {address<float>(std::get<0>(t)), address<float>(std::get<1>(t))}; }

Moments8 moments8(const Moments8Tuple& t) {
  return {address<uint8_t>(std::get<0>(t)), address<uint8_t>(std::get<1>(t)), address<float>(std::get<2>(t)),
          address<float>(std::get<3>(t))};
}

AdamWStep step(const OptionsTuple& t) {
  const auto& [lr, beta1, beta2, eps, weight_decay, maximize, stochastic, seed] = t;
  return {adamw_constants<float>(lr, beta1, beta2, eps, weight_decay, maximize), seed, stochastic};
}

}  // namespace

PYBIND11_MODULE(_CUDA, m) {
  m.attr("version") = SLICEFINE_VERSION;
  m.attr("architectures") = SLICEFINE_CUDA_ARCHS;
  m.def("workspace_values", &workspace_values);
  m.def("workspace_counters", &workspace_counters);
  m.def("slice_grad", [](const GradTuple& in, uintptr_t out, const LaunchTuple& where) {
    py::gil_scoped_release release;
    slice_grad(grad_inputs(in), address<float>(out), launch(where));
  });
  m.def("slice_adamw", [](const std::vector<SliceTuple>& tuples, const std::vector<MomentsTuple>& states,
                          const OptionsTuple& options, const LaunchTuple& where) {
    py::gil_scoped_release release;
    std::vector<Slice> s = slices(tuples);
    std::vector<Moments> m;
    for (const auto& t : states) m.push_back(moments(t));
    slice_adamw(s.data(), m.data(), int64_t(s.size()), step(options), launch(where));
  });
  m.def("slice_adamw_8bit", [](const std::vector<SliceTuple>& tuples, const std::vector<Moments8Tuple>& states,
                               uintptr_t codebook, const OptionsTuple& options, const LaunchTuple& where) {
    py::gil_scoped_release release;
    std::vector<Slice> s = slices(tuples);
    std::vector<Moments8> m;
    for (const auto& t : states) m.push_back(moments8(t));
    slice_adamw_8bit(s.data(), m.data(), int64_t(s.size()), address<const float>(codebook), step(options),
                     launch(where));
  });
  m.def("slice_grad_adamw", [](const GradTuple& in, const SliceTuple& s, const MomentsTuple& state,
                               const OptionsTuple& options, const LaunchTuple& where) {
    py::gil_scoped_release release;
    slice_grad_adamw(grad_inputs(in), slice(s, 0), moments(state), step(options), launch(where));
  });
}
