// Python bindings: addresses as integers, no torch header. slicefine/backends/cpu.py checks every argument before it comes
// here, but for the values of indices, which only this module reads.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "ops.h"
#include "table.h"

namespace py = pybind11;
using namespace slicefine;

namespace {

struct Isa {
  const char* name;
  decltype(&generic::slice_grad) slice_grad;
  decltype(&generic::slice_adamw) slice_adamw;
  decltype(&generic::slice_adamw_8bit) slice_adamw_8bit;
  decltype(&generic::slice_grad_adamw) slice_grad_adamw;
  decltype(&generic::write_slices) write_slices;
  decltype(&generic::rms_norm) rms_norm;
  decltype(&generic::rms_norm_backward) rms_norm_backward;
  decltype(&generic::gated_activation) gated_activation;
  decltype(&generic::gated_activation_backward) gated_activation_backward;
};

#define SLICEFINE_ISA_ENTRY(isa) \
  Isa{#isa, &isa::slice_grad, &isa::slice_adamw, &isa::slice_adamw_8bit, &isa::slice_grad_adamw, &isa::write_slices, \
      &isa::rms_norm, &isa::rms_norm_backward, &isa::gated_activation, &isa::gated_activation_backward}

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

// An index that is out of range would read or write outside of a tensor; a slice has few of them.
void check_index(const char* name, const int64_t* index, int64_t count, int64_t features) {
  if (!index) return;
  for (int64_t i = 0; i < count; ++i)
    if (index[i] < 0 || index[i] >= features)
      throw py::index_error(std::string(name) + " holds " + std::to_string(index[i]) + "; there are features 0 to " +
                            std::to_string(features - 1));
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
  const int64_t* rows = address(row.rows);
  check_index("rows", rows, row.R, row.out_features);
  return {address<void>(row.grad_output), address<void>(row.input), row.stride_grad_output, row.stride_input, row.n, rows,
          row.R, row.K, DType(row.dtype)};
}

Slice slice(const SliceRow& row, int64_t first_row = 0) {
  const int64_t *rows = address(row.rows), *cols = address(row.cols);
  check_index("rows", rows, row.R, row.out_features);
  check_index("cols", cols, row.K, row.in_features);
  return {address<void>(row.weight), row.stride_row, row.stride_col, rows, cols, row.R, row.K, DType(row.dtype), first_row};
}

std::vector<Slice> slices(const Table<SliceRow>& table) {
  std::vector<Slice> found;
  found.reserve(table.size());
  int64_t first_row = 0;
  for (const SliceRow& row : table) {
    found.push_back(slice(row, first_row));
    first_row += row.R;
  }
  return found;
}

double step(const SliceRow& row) { return *address<const float>(row.step); }

Moments moments(const SliceRow& row) {
  return {address<void>(row.master), address<void>(row.exp_avg), address<void>(row.exp_avg_sq), address<void>(row.grad), step(row)};
}

Moments8 moments8(const SliceRow& row) {
  return {address<float>(row.master), address<uint8_t>(row.exp_avg), address<uint8_t>(row.exp_avg_sq),
          address<float>(row.exp_avg_scale), address<float>(row.exp_avg_sq_scale), address<const float>(row.grad), step(row)};
}

AdamWOptions options(const OptionValues& o) {
  return {o.lr, o.beta1, o.beta2, o.eps, o.weight_decay, o.maximize, o.stochastic, o.seed};
}

// (x, stride, weight, n, d, dtype, internal) and the numbers of a norm.
using NormNumbers = std::array<int64_t, 7>;

NormInputs norm(const NormNumbers& v, double eps, double offset, bool late_cast) {
  return {address<void>(v[0]), address<void>(v[2]), v[1], v[3], v[4], DType(v[5]), DType(v[6]), eps, offset, late_cast};
}

// (gate, stride, up, stride, grad, stride, n, m, dtype, kind) of a gated product.
using GateNumbers = std::array<int64_t, 10>;

GateInputs gate(const GateNumbers& v) {
  return {address<void>(v[0]), address<void>(v[2]), address<void>(v[4]), v[1], v[3], v[5], v[6], v[7], DType(v[8]), Gate(v[9])};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("version") = SLICEFINE_VERSION;
  m.attr("layout") = layout();
  m.def("isas", [] { std::vector<std::string> names; for (const Isa& isa : supported_isas()) names.push_back(isa.name); return names; });
  m.def("current_isa", [] { return std::string(current.name); });
  m.def("select_isa", &select_isa);
  m.def("take_columns", [](int64_t x, int64_t stride, int64_t width, int64_t cols, int64_t n, int64_t K, int dtype, int64_t out, int threads) {
    check_index("cols", address(cols), K, width);
    py::gil_scoped_release release;
    take_columns(address<void>(x), stride, address(cols), n, K, DType(dtype), address<void>(out), threads);
  });
  m.def("slice_grad", [](const Numbers<GradientRow>& row, int64_t out, int threads) {
    const GradInputs in = grad_inputs(row);
    py::gil_scoped_release release;
    current.slice_grad(in, address<void>(out), threads);
  });
  m.def("slice_adamw", [](const py::buffer& buffer, const py::handle& given, int threads) {
    const Table<SliceRow> table(buffer);
    const AdamWOptions o = options(OptionValues(given));
    const std::vector<Slice> s = slices(table);
    std::vector<Moments> m;
    m.reserve(table.size());
    for (const SliceRow& row : table) m.push_back(moments(row));
    py::gil_scoped_release release;
    current.slice_adamw(s.data(), m.data(), table.size(), o, threads);
  });
  m.def("slice_adamw_8bit", [](const py::buffer& buffer, int64_t codebook, const py::handle& given, int threads) {
    const Table<SliceRow> table(buffer);
    const AdamWOptions o = options(OptionValues(given));
    const std::vector<Slice> s = slices(table);
    std::vector<Moments8> m;
    m.reserve(table.size());
    for (const SliceRow& row : table) m.push_back(moments8(row));
    py::gil_scoped_release release;
    current.slice_adamw_8bit(s.data(), m.data(), table.size(), address<const float>(codebook), o, threads);
  });
  m.def("slice_grad_adamw", [](const Numbers<GradientRow>& gradient, const Numbers<SliceRow>& numbers, const py::handle& given, int threads) {
    const GradInputs in = grad_inputs(gradient);
    const auto row = row_of<SliceRow>(numbers);
    const Slice s = slice(row);
    const Moments m = moments(row);
    const AdamWOptions o = options(OptionValues(given));
    py::gil_scoped_release release;
    current.slice_grad_adamw(in, s, m, o, threads);
  });
  m.def("rms_norm", [](const NormNumbers& numbers, double eps, double offset, bool late_cast, int64_t out, int64_t rstd, int threads) {
    const NormInputs in = norm(numbers, eps, offset, late_cast);
    py::gil_scoped_release release;
    current.rms_norm(in, address<void>(out), address<void>(rstd), threads);
  });
  m.def("rms_norm_backward", [](const NormNumbers& numbers, double offset, int64_t grad, int64_t stride, int64_t rstd, int64_t out, int threads) {
    const NormInputs in = norm(numbers, 0, offset, true);
    py::gil_scoped_release release;
    current.rms_norm_backward(in, address<void>(grad), stride, address<void>(rstd), address<void>(out), threads);
  });
  m.def("gated_activation", [](const GateNumbers& numbers, int64_t out, int threads) {
    const GateInputs in = gate(numbers);
    py::gil_scoped_release release;
    current.gated_activation(in, address<void>(out), threads);
  });
  m.def("gated_activation_backward", [](const GateNumbers& numbers, int64_t grad_gate, int64_t grad_up, int threads) {
    const GateInputs in = gate(numbers);
    py::gil_scoped_release release;
    current.gated_activation_backward(in, address<void>(grad_gate), address<void>(grad_up), threads);
  });
  m.def("write_slices", [](const py::buffer& buffer, int threads) {
    const Table<SliceRow> table(buffer);
    const std::vector<Slice> s = slices(table);
    std::vector<const void*> masters;
    masters.reserve(table.size());
    for (const SliceRow& row : table) masters.push_back(address<void>(row.master));
    py::gil_scoped_release release;
    current.write_slices(s.data(), masters.data(), table.size(), threads);
  });
}
