// Python bindings of the CUDA ops: addresses as integers, no torch header.
// slicefine/backends/cuda.py checks every argument before it comes here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <vector>

#include "ops_cuda.h"
#include "table.h"

namespace py = pybind11;
using namespace slicefine;
using namespace slicefine::cuda;

namespace {

// Where a launch runs; Python gives the device, the stream, the processors, and the two parts of the workspace.
using LaunchNumbers = std::array<int64_t, 5>;

Launch launch(const LaunchNumbers& n) {
  return {int(n[0]), address<void>(n[1]), int(n[2]), address<float>(n[3]), address<int32_t>(n[4])};
}

// A row of Python's as a struct; the caster checks that it has as many numbers as the struct has columns.
template <typename Row>
using Numbers = std::array<int64_t, sizeof(Row) / sizeof(int64_t)>;

template <typename Row>
Row row_of(const Numbers<Row>& numbers) {
  Row row;
  std::memcpy(&row, numbers.data(), sizeof(Row));
  return row;
}

GradInputs grad_inputs(const Numbers<GradientRow>& numbers) {
  const auto row = row_of<GradientRow>(numbers);
  return {address<void>(row.grad_output), address<void>(row.input), row.stride_grad_output, row.stride_input, row.n,
          address(row.rows), row.R, row.K, DType(row.dtype), row.allow_tf32 != 0};
}

Slice slice(const SliceRow& row, uint32_t id) {
  return {address<float>(row.master), address<const float>(row.grad), address<void>(row.weight), address(row.rows),
          address(row.cols), address<const float>(row.step), row.stride_row, row.stride_col, int32_t(row.R),
          int32_t(row.K), id, 0, DType(row.dtype)};
}

std::vector<Slice> slices(const Table<SliceRow>& table) {
  std::vector<Slice> found;
  for (const SliceRow& row : table) found.push_back(slice(row, uint32_t(found.size())));
  return found;
}

Moments moments(const SliceRow& row) { return {address<float>(row.exp_avg), address<float>(row.exp_avg_sq)}; }

Moments8 moments8(const SliceRow& row) {
  return {address<uint8_t>(row.exp_avg), address<uint8_t>(row.exp_avg_sq), address<float>(row.exp_avg_scale),
          address<float>(row.exp_avg_sq_scale)};
}

AdamWStep step(const OptionValues& o) {
  return {adamw_constants<float>(o.lr, o.beta1, o.beta2, o.eps, o.weight_decay, o.maximize), o.seed, o.stochastic};
}

}  // namespace

PYBIND11_MODULE(_CUDA, m) {
  m.attr("version") = SLICEFINE_VERSION;
  m.attr("layout") = layout();
  m.attr("architectures") = SLICEFINE_CUDA_ARCHS;
  m.def("workspace_values", &workspace_values);
  m.def("workspace_counters", &workspace_counters);
  m.def("slice_grad", [](const Numbers<GradientRow>& in, int64_t out, const LaunchNumbers& where) {
    py::gil_scoped_release release;
    slice_grad(grad_inputs(in), address<float>(out), launch(where));
  });
  m.def("slice_adamw", [](const py::buffer& buffer, const py::handle& options, const LaunchNumbers& where) {
    const Table<SliceRow> table(buffer);
    const AdamWStep now = step(OptionValues(options));
    std::vector<Slice> s = slices(table);
    std::vector<Moments> m;
    for (const SliceRow& row : table) m.push_back(moments(row));
    py::gil_scoped_release release;
    slice_adamw(s.data(), m.data(), table.size(), now, launch(where));
  });
  m.def("slice_adamw_8bit", [](const py::buffer& buffer, int64_t codebook, const py::handle& options,
                               const LaunchNumbers& where) {
    const Table<SliceRow> table(buffer);
    const AdamWStep now = step(OptionValues(options));
    std::vector<Slice> s = slices(table);
    std::vector<Moments8> m;
    for (const SliceRow& row : table) m.push_back(moments8(row));
    py::gil_scoped_release release;
    slice_adamw_8bit(s.data(), m.data(), table.size(), address<const float>(codebook), now, launch(where));
  });
  m.def("slice_grad_adamw", [](const Numbers<GradientRow>& in, const Numbers<SliceRow>& numbers,
                               const py::handle& options, const LaunchNumbers& where) {
    const auto row = row_of<SliceRow>(numbers);
    const AdamWStep now = step(OptionValues(options));
    py::gil_scoped_release release;
    slice_grad_adamw(grad_inputs(in), slice(row, 0), moments(row), now, launch(where));
  });
}
