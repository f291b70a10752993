// SPDX-License-Identifier: Apache-2.0
// The product of the weight gradients, bfloat16 operands with a float32 sum, which torch's own
// `mm` and `addmm` do not have on CPUs. It is MKL's, where torch comes with it.
#include <algorithm>
#include <cstdint>

#include "rows.h"

extern "C" __attribute__((weak)) void cblas_gemm_bf16bf16f32(
    int layout, int transpose_a, int transpose_b, int m, int n, int k, float alpha, const void* a,
    int lda, const void* b, int ldb, float beta, float* c, int ldc);

namespace prereg {

bool has_wide_product() {
  return cblas_gemm_bf16bf16f32 != nullptr;
}

void wide_product(const Input& d, const Input& x, bool accumulate, float* total) {
  constexpr int row_major = 101, plain = 111, transposed = 112;
  const auto size = [](int64_t value) { return static_cast<int>(value); };  // checked by library.cpp
  const auto stride = [](const Input& of) {  // that of a single row can be anything
    return static_cast<int>(std::max(of.row_stride, of.columns));
  };
  cblas_gemm_bf16bf16f32(
      row_major, transposed, plain, size(d.columns), size(x.columns), size(d.rows), 1.0f, d.data,
      stride(d), x.data, stride(x), accumulate ? 1.0f : 0.0f, total, size(x.columns));
}

}  // namespace prereg
