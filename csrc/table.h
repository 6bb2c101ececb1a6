// The rows of numbers that Python fills, each column named once. slicefine/backends/table.py names the same columns and
// compares them with these when it loads a module, so that no reader counts positions.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "numeric.h"

namespace slicefine {

// One slice of a weight: addresses, strides of W in elements, sizes. An address of 0: not there, or every row or column.
#define SLICEFINE_SLICE_ROW(column)                                                                              \
  column(weight) column(out_features) column(in_features) column(stride_row) column(stride_col) column(dtype)    \
  column(rows) column(cols) column(R) column(K)                                                                  \
  column(master) column(grad) column(exp_avg) column(exp_avg_sq) column(exp_avg_scale) column(exp_avg_sq_scale)  \
  column(step)

// dY [n, out] and X [n, K] of a gradient, last dimension contiguous; strides of their rows in elements.
#define SLICEFINE_GRADIENT_ROW(column)                                                                           \
  column(grad_output) column(stride_grad_output) column(out_features) column(input) column(stride_input)         \
  column(n) column(rows) column(R) column(K) column(dtype) column(allow_tf32)

#define SLICEFINE_FIELD(name) int64_t name;
#define SLICEFINE_NAME(name) names.emplace_back(#name);
struct SliceRow { SLICEFINE_SLICE_ROW(SLICEFINE_FIELD) };
struct GradientRow { SLICEFINE_GRADIENT_ROW(SLICEFINE_FIELD) };

template <typename Row>
std::vector<std::string> column_names() {
  std::vector<std::string> names;
  if constexpr (std::is_same_v<Row, SliceRow>) { SLICEFINE_SLICE_ROW(SLICEFINE_NAME) }
  else { SLICEFINE_GRADIENT_ROW(SLICEFINE_NAME) }
  static_assert(sizeof(Row) % sizeof(int64_t) == 0, "a row is read as so many numbers");
  return names;
}

template <typename T = const int64_t>
T* address(int64_t value) { return reinterpret_cast<T*>(value); }

// What Python holds its own description against.
inline pybind11::dict layout() {
  pybind11::dict dtypes, all;
  dtypes["float32"] = int(DType::f32), dtypes["float64"] = int(DType::f64);
  dtypes["bfloat16"] = int(DType::bf16), dtypes["float16"] = int(DType::fp16);
  const auto tuple = [](const std::vector<std::string>& names) {
    pybind11::tuple found(names.size());
    for (size_t i = 0; i < names.size(); ++i) found[i] = names[i];
    return found;
  };
  all["SliceRow"] = tuple(column_names<SliceRow>());
  all["GradientRow"] = tuple(column_names<GradientRow>());
  all["dtypes"] = dtypes;
  all["BLOCK_8BIT"] = kQuantum;
  return all;
}

// A table of rows in memory that Python owns: any buffer of int64, as long as so many whole rows.
template <typename Row>
class Table {
 public:
  explicit Table(const pybind11::buffer& buffer) : info_(buffer.request()) {
    constexpr int64_t kColumns = sizeof(Row) / sizeof(int64_t);
    if (info_.ndim != 1 || info_.itemsize != sizeof(int64_t) || info_.strides[0] != sizeof(int64_t) || info_.size % kColumns)
      throw std::invalid_argument("a table of " + std::to_string(info_.size) + " numbers of " + std::to_string(info_.itemsize) +
                                  " bytes; expected rows of " + std::to_string(kColumns) + " int64, one after the other");
    count_ = info_.size / kColumns;
  }
  const Row* begin() const { return static_cast<const Row*>(info_.ptr); }
  const Row* end() const { return begin() + count_; }
  int64_t size() const { return count_; }

 private:
  pybind11::buffer_info info_;
  int64_t count_ = 0;
};

// The options of a step, by name: slicefine.backends.operands.AdamWOptions.
struct OptionValues {
  double lr, beta1, beta2, eps, weight_decay;
  bool maximize, stochastic;
  uint64_t seed;

  explicit OptionValues(const pybind11::handle& o)
      : lr(number(o, "lr")), beta1(number(o, "beta1")), beta2(number(o, "beta2")), eps(number(o, "eps")),
        weight_decay(number(o, "weight_decay")), maximize(o.attr("maximize").cast<bool>()),
        stochastic(!o.attr("seed").is_none()), seed(stochastic ? o.attr("seed").cast<uint64_t>() : 0) {}

 private:
  static double number(const pybind11::handle& o, const char* name) { return o.attr(name).cast<double>(); }
};

}  // namespace slicefine
