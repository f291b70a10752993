// SPDX-License-Identifier: Apache-2.0
// The torch ops of this library's namespace: checks of the arguments, then a kernel.
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "rows.h"

namespace prereg {
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

c10::ScalarType compute_dtype(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

void check_dtype(const char* name, const Tensor& x, c10::ScalarType dtype) {
  TORCH_CHECK_TYPE(x.scalar_type() == dtype, name, ": expected ", dtype, ", got ", x.scalar_type());
}

void check_floating(const char* name, const Tensor& x) {
  const auto dtype = x.scalar_type();
  TORCH_CHECK_TYPE(
      dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
      name, ": expected float16, bfloat16, float32 or float64, got ", dtype);
  TORCH_CHECK_VALUE(
      x.device().is_cpu() && x.layout() == at::kStrided, name,
      ": expected a dense tensor on the CPU, got ", x.layout(), " on ", x.device());
}

void check_matrix(const char* name, const Tensor& x) {
  check_floating(name, x);
  TORCH_CHECK_VALUE(x.dim() == 2, name, ": expected 2 dimensions, got shape ", x.sizes());
}

void check_shape(const char* name, const Tensor& x, int64_t rows, int64_t columns) {
  TORCH_CHECK_VALUE(
      x.size(0) == rows && x.size(1) == columns, name, ": expected shape [", rows, ", ", columns,
      "], got ", x.sizes());
}

int64_t column_stride(const Tensor& x) {
  return x.size(1) <= 1 ? 1 : x.stride(1);
}

void check_unit_columns(const char* name, const Tensor& x) {
  TORCH_CHECK_VALUE(
      column_stride(x) == 1, name, ": expected unit column stride, got strides ", x.strides());
}

Input input(const Tensor& x) {
  return {
      static_cast<const char*>(x.const_data_ptr()), x.scalar_type(), x.size(0), x.size(1),
      x.stride(0), column_stride(x)};
}

// A matrix with rows of unit stride.
Input checked_input(const char* name, const Tensor& x) {
  check_matrix(name, x);
  check_unit_columns(name, x);
  return input(x);
}

// A matrix with rows of unit stride that do not overlap.
Output checked_output(const char* name, const Tensor& x) {
  check_matrix(name, x);
  check_unit_columns(name, x);
  TORCH_CHECK_VALUE(
      x.size(0) <= 1 || x.stride(0) >= x.size(1), name, ": its rows overlap: shape ", x.sizes(),
      ", strides ", x.strides());
  return {
      static_cast<char*>(x.mutable_data_ptr()), x.scalar_type(), x.size(0), x.size(1), x.stride(0),
      1};
}

// The index of `count` rows, contiguous; `rows` is how many there are to choose from.
Optional checked_index(
    const Optional& index, const char* name, int64_t rows, int64_t count) {
  if (!index.has_value()) {
    TORCH_CHECK_VALUE(
        rows == count, name, ": expected ", count, " rows, as there is no index, got ", rows);
    return std::nullopt;
  }
  check_dtype("index", *index, at::kLong);
  TORCH_CHECK_VALUE(
      index->dim() == 1 && index->size(0) == count, "index: expected shape [", count, "], got ",
      index->sizes());
  const Tensor contiguous = index->contiguous();
  const auto* values = contiguous.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < count; ++i) {
    TORCH_CHECK_INDEX(
        0 <= values[i] && values[i] < rows, "index: expected values in [0, ", rows, "), got ",
        values[i]);
  }
  return contiguous;
}

const int64_t* data_of(const Optional& index) {
  return index.has_value() ? index->const_data_ptr<int64_t>() : nullptr;
}

// A vector to read, contiguous and of this dtype.
Optional checked_vector(
    const char* name, const Optional& x, c10::ScalarType dtype, int64_t size) {
  if (!x.has_value()) {
    return std::nullopt;
  }
  check_floating(name, *x);
  TORCH_CHECK_VALUE(
      x->dim() == 1 && x->size(0) == size, name, ": expected shape [", size, "], got ",
      x->sizes());
  return x->to(dtype).contiguous();
}

const void* read_only(const Optional& x) {
  return x.has_value() ? x->const_data_ptr() : nullptr;
}

// A vector to write.
void* checked_result(const char* name, const Tensor& x, c10::ScalarType dtype, int64_t size) {
  check_floating(name, x);
  check_dtype(name, x, dtype);
  TORCH_CHECK_VALUE(
      x.dim() == 1 && x.size(0) == size && x.is_contiguous(), name,
      ": expected a contiguous vector of ", size, ", got shape ", x.sizes(), ", strides ",
      x.strides());
  return x.mutable_data_ptr();
}

void* checked_sums(const Optional& sums, c10::ScalarType dtype, int64_t size) {
  return sums.has_value() ? checked_result("sums", *sums, dtype, size) : nullptr;
}

template <typename Value>
struct Named {
  const char* name;
  Value value;
};

template <typename Value, size_t count>
std::vector<std::string> names_of(const Named<Value> (&known)[count]) {
  std::vector<std::string> names;
  for (const auto& one : known) {
    names.emplace_back(one.name);
  }
  return names;
}

template <typename Value, size_t count>
Value by_name(const char* argument, const std::string& name, const Named<Value> (&known)[count]) {
  std::string names;
  for (const auto& one : known) {
    if (name == one.name) {
      return one.value;
    }
    names += (names.empty() ? "" : ", ") + std::string(one.name);
  }
  TORCH_CHECK_VALUE(false, argument, ": expected one of ", names, "; got '", name, "'");
}

constexpr Named<Activation> activations[] = {
    {"gelu", Activation::gelu},
    {"gelu_tanh", Activation::gelu_tanh},
    {"silu", Activation::silu},
    {"relu", Activation::relu}};
constexpr Named<Loss> losses_by_name[] = {
    {"cosine", Loss::cosine},
    {"mse", Loss::mse},
    {"smooth_l1", Loss::smooth_l1},
    {"l1", Loss::l1}};
constexpr Named<Normalize> normalizations[] = {
    {"none", Normalize::none}, {"l2", Normalize::l2}, {"layer", Normalize::layer}};

void gather_rows_op(const Tensor& source, const Optional& index, const Tensor& out) {
  check_matrix("source", source);
  const Output to = checked_output("out", out);
  TORCH_CHECK_VALUE(
      source.size(1) == to.columns, "source: expected ", to.columns, " columns, got shape ",
      source.sizes());
  const Optional rows = checked_index(index, "source", source.size(0), to.rows);
  gather_rows(input(source), data_of(rows), to);
}

void activate_op(
    const Tensor& u, const Optional& bias, const std::string& activation, const Tensor& g) {
  const Input from = checked_input("u", u);
  const Output to = checked_output("g", g);
  check_shape("g", g, from.rows, from.columns);
  check_dtype("g", g, from.dtype);
  const Optional b = checked_vector("bias", bias, compute_dtype(u), from.columns);
  activate(from, read_only(b), by_name("activation", activation, activations), to);
}

void activation_backward_op(
    const Tensor& dg, const Tensor& u, const Optional& bias, const std::string& activation,
    const Optional& sums) {
  const Output d = checked_output("dg", dg);
  const Input from = checked_input("u", u);
  check_shape("u", u, d.rows, d.columns);
  check_dtype("u", u, d.dtype);
  const Optional b = checked_vector("bias", bias, compute_dtype(u), d.columns);
  void* const totals = checked_sums(sums, compute_dtype(u), d.columns);
  activation_backward(
      d, from, read_only(b), by_name("activation", activation, activations), totals);
}

// The anchor's rows for the kernel: those of the chunk are copied unless they have unit stride.
struct AnchorRows {
  Tensor anchor;
  Optional index;

  AnchorRows(const Tensor& given, const Optional& given_index, int64_t rows, int64_t columns) {
    check_matrix("anchor", given);
    TORCH_CHECK_VALUE(
        given.size(1) == columns, "anchor: expected ", columns, " columns, got shape ",
        given.sizes());
    anchor = given;
    index = checked_index(given_index, "anchor", given.size(0), rows);
    if (column_stride(given) != 1) {
      anchor = given.new_empty({rows, columns});
      gather_rows(input(given), data_of(index), checked_output("anchor", anchor));
      index = std::nullopt;
    }
  }
};

LossSpec spec_of(const std::string& loss, const std::string& normalize, double eps) {
  const LossSpec spec = {
      by_name("loss", loss, losses_by_name), by_name("normalize", normalize, normalizations), eps};
  TORCH_CHECK_VALUE(
      spec.loss != Loss::cosine || spec.normalize == Normalize::none,
      "normalize: expected 'none' with loss='cosine', got '", normalize, "'");
  return spec;
}

void token_losses_op(
    const Tensor& z, const Optional& bias, const Tensor& anchor, const Optional& index,
    const std::string& loss, const std::string& normalize, double eps, const Tensor& losses) {
  const Input from = checked_input("z", z);
  const Optional b = checked_vector("bias", bias, compute_dtype(z), from.columns);
  const AnchorRows t(anchor, index, from.rows, from.columns);
  void* const values = checked_result("losses", losses, compute_dtype(z), from.rows);
  token_losses(
      from, read_only(b), input(t.anchor), data_of(t.index), spec_of(loss, normalize, eps), values,
      {nullptr, 0}, nullptr, nullptr);
}

void token_losses_and_grad_op(
    const Tensor& z, const Optional& bias, const Tensor& anchor, const Optional& index,
    const Tensor& coefficient, const std::string& loss, const std::string& normalize, double eps,
    const Tensor& losses, const Tensor& dz, const Optional& sums) {
  const Input from = checked_input("z", z);
  const Output to = checked_output("dz", dz);
  check_shape("dz", dz, from.rows, from.columns);
  check_dtype("dz", dz, from.dtype);
  const Optional b = checked_vector("bias", bias, compute_dtype(z), from.columns);
  const AnchorRows t(anchor, index, from.rows, from.columns);
  check_floating("coefficient", coefficient);
  TORCH_CHECK_VALUE(
      coefficient.dim() == 1 && coefficient.size(0) == from.rows, "coefficient: expected shape [",
      from.rows, "], got ", coefficient.sizes());
  const Tensor scale = coefficient.to(compute_dtype(z));
  void* const values = checked_result("losses", losses, compute_dtype(z), from.rows);
  void* const totals = checked_sums(sums, compute_dtype(z), from.columns);
  token_losses(
      from, read_only(b), input(t.anchor), data_of(t.index), spec_of(loss, normalize, eps), values,
      {scale.const_data_ptr(), scale.stride(0)}, &to, totals);
}

// What is added to `into`: of its shape and dtype.
void check_residual(const Optional& residual, const Tensor& into) {
  if (residual.has_value()) {
    check_matrix("residual", *residual);
    check_shape("residual", *residual, into.size(0), into.size(1));
    check_dtype("residual", *residual, into.scalar_type());
  }
}

void copy_others_op(const Tensor& into, const Tensor& index, const Optional& residual) {
  const Output to = checked_output("into", into);
  const Optional rows = checked_index(index, "into", to.rows, index.numel());
  check_residual(residual, into);
  const Input from = input(residual.value_or(into));
  copy_others(to, data_of(rows), index.numel(), residual.has_value() ? &from : nullptr);
}

void scatter_rows_op(
    const Tensor& values, const Tensor& into, const Optional& index, const Optional& scale,
    const Optional& given_residual) {
  const Input from = checked_input("values", values);
  const Output to = checked_output("into", into);
  TORCH_CHECK_VALUE(
      to.columns == from.columns, "into: expected ", from.columns, " columns, got shape ",
      into.sizes());
  const Optional rows = checked_index(index, "into", to.rows, from.rows);
  double factor = 1;
  if (scale.has_value()) {
    check_floating("scale", *scale);
    TORCH_CHECK_VALUE(
        scale->dim() == 0, "scale: expected 0 dimensions, got shape ", scale->sizes());
    factor = scale->item<double>();
  }
  check_residual(given_residual, into);
  Tensor residual = given_residual.value_or(into);
  if (column_stride(residual) != 1) {
    residual = residual.contiguous();
  }
  const Input add = input(residual);
  scatter_rows(from, to, data_of(rows), factor, given_residual.has_value() ? &add : nullptr);
}

// A matrix as BLAS takes it: rows of unit stride that do not overlap. Others are copied.
Tensor blas_matrix(const char* name, const Tensor& x) {
  checked_input(name, x);
  const bool apart = x.size(0) > 1 && x.stride(0) >= x.size(1);
  return apart || x.is_contiguous() ? x : x.contiguous();
}

void wide_product_op(
    const Tensor& given_d, const Tensor& given_x, const Tensor& total, bool accumulate) {
  const Tensor d = blas_matrix("d", given_d), x = blas_matrix("x", given_x);
  const Input from = input(d), with = input(x);
  check_dtype("d", d, at::kBFloat16);
  check_dtype("x", x, at::kBFloat16);
  check_shape("x", x, from.rows, with.columns);
  checked_output("total", total);
  check_dtype("total", total, at::kFloat);
  check_shape("total", total, from.columns, with.columns);
  TORCH_CHECK_VALUE(
      total.is_contiguous(), "total: expected a contiguous matrix, got strides ", total.strides());
  for (const int64_t value :
       {from.rows, from.columns, with.columns, from.row_stride, with.row_stride}) {
    TORCH_CHECK_VALUE(
        value <= std::numeric_limits<int>::max(), "d, x: expected sizes and strides below 2^31, got ",
        d.sizes(), " and ", x.sizes(), " with strides ", d.strides(), " and ", x.strides());
  }
  TORCH_CHECK_NOT_IMPLEMENTED(
      has_wide_product(), "wide_product: this torch comes without MKL's gemm_bf16bf16f32");
  wide_product(from, with, accumulate, total.mutable_data_ptr<float>());
}

}  // namespace
}  // namespace prereg

#define PREREG_LIBRARY(name, module) TORCH_LIBRARY(name, module)
#define PREREG_IMPL(name, key, module) TORCH_LIBRARY_IMPL(name, key, module)

PREREG_LIBRARY(PREREG_NAMESPACE, m) {
  m.def("gather_rows(Tensor source, Tensor? index, Tensor(a!) out) -> ()");
  m.def("activate(Tensor u, Tensor? bias, str activation, Tensor(a!) g) -> ()");
  m.def(
      "activation_backward(Tensor(a!) dg, Tensor u, Tensor? bias, str activation, "
      "Tensor(b!)? sums) -> ()");
  m.def(
      "token_losses(Tensor z, Tensor? bias, Tensor anchor, Tensor? index, str loss, "
      "str normalize, float eps, Tensor(a!) losses) -> ()");
  m.def(
      "token_losses_and_grad(Tensor z, Tensor? bias, Tensor anchor, Tensor? index, "
      "Tensor coefficient, str loss, str normalize, float eps, Tensor(a!) losses, Tensor(b!) dz, "
      "Tensor(c!)? sums) -> ()");
  m.def(
      "scatter_rows(Tensor values, Tensor(a!) into, Tensor? index, Tensor? scale, "
      "Tensor? residual) -> ()");
  m.def("copy_others(Tensor(a!) into, Tensor index, Tensor? residual) -> ()");
  m.def("wide_product(Tensor d, Tensor x, Tensor(a!) total, bool accumulate) -> ()");
  m.def("has_wide_product() -> bool", &prereg::has_wide_product);
  m.def("losses() -> str[]", [] { return prereg::names_of(prereg::losses_by_name); });
  m.def("activations() -> str[]", [] { return prereg::names_of(prereg::activations); });
}

PREREG_IMPL(PREREG_NAMESPACE, CPU, m) {
  m.impl("gather_rows", TORCH_FN(prereg::gather_rows_op));
  m.impl("activate", TORCH_FN(prereg::activate_op));
  m.impl("activation_backward", TORCH_FN(prereg::activation_backward_op));
  m.impl("token_losses", TORCH_FN(prereg::token_losses_op));
  m.impl("token_losses_and_grad", TORCH_FN(prereg::token_losses_and_grad_op));
  m.impl("copy_others", TORCH_FN(prereg::copy_others_op));
  m.impl("scatter_rows", TORCH_FN(prereg::scatter_rows_op));
  m.impl("wide_product", TORCH_FN(prereg::wide_product_op));
}
