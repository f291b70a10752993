// SPDX-License-Identifier: Apache-2.0
// The kernels' interface: plain pointers, checked by library.cpp. The semantics are in
// prereg_kernels/ops/backends/base.py.
#pragma once

#include <cstdint>

#include <c10/core/ScalarType.h>

namespace prereg {

// A matrix of any floating dtype; strides count elements.
template <typename Data>
struct Matrix {
  Data* data;
  c10::ScalarType dtype;
  int64_t rows, columns;
  int64_t row_stride, column_stride;
};
using Input = Matrix<const char>;
using Output = Matrix<char>;

enum class Activation { gelu, gelu_tanh, silu, relu };
enum class Loss { cosine, mse, smooth_l1, l1 };
enum class Normalize { none, l2, layer };

struct LossSpec {
  Loss loss;
  Normalize normalize;
  double eps;
};

// A vector of the statistics' dtype: float, or double for double matrices. Null: absent.
struct Coefficient {
  const void* data;
  int64_t stride;
};

void gather_rows(const Input& source, const int64_t* index, const Output& out);

// into = source, or 0, in the rows that are not among the `count` of the index.
void copy_others(const Output& into, const int64_t* index, int64_t count, const Input* source);

void scatter_rows(
    const Input& values, const Output& into, const int64_t* index, double scale,
    const Input* residual);

void activate(const Input& u, const void* bias, Activation activation, const Output& g);

void activation_backward(
    const Output& dg, const Input& u, const void* bias, Activation activation, void* sums);

// The anchor has unit column stride. Without dz there are no coefficients and no sums.
void token_losses(
    const Input& z, const void* bias, const Input& anchor, const int64_t* index,
    const LossSpec& spec, void* losses, Coefficient coefficient, const Output* dz, void* sums);

// total (M, K), float, contiguous, = d^T x, or += where `accumulate`, for d (n, M) and x (n, K) of
// bfloat16 whose sizes and strides are ints; null where torch comes without such a product.
bool has_wide_product();
void wide_product(const Input& d, const Input& x, bool accumulate, float* total);

}  // namespace prereg
