// SPDX-License-Identifier: Apache-2.0
// gather_rows, copy_others and scatter_rows.
#include <cstring>
#include <vector>

#include "blocks.h"
#include "dispatch.h"

namespace prereg {
namespace {

// The dtype in which a value passes from one dtype to the other.
template <typename From, typename To>
using between_t = std::common_type_t<compute_t<From>, compute_t<To>>;

template <typename From, typename To>
PREREG_ROW void gather_row(const From* from, int64_t stride, int64_t columns, To* to) {
  using C = between_t<From, To>;
  if (stride != 1) {
    for (int64_t i = 0; i < columns; ++i) {
      to[i] = static_cast<To>(static_cast<C>(from[i * stride]));
    }
  } else if constexpr (std::is_same_v<From, To>) {
    std::memcpy(to, from, columns * sizeof(To));
  } else {
    for_lanes<C>(columns, [&](int64_t i, auto part) {
      store<C>(to + i, load<C>(from + i, part), part);
    });
  }
}

// residual may be `to`, or null.
template <typename From, typename To>
PREREG_ROW void scatter_row(
    const From* from, between_t<From, To> scale, const To* residual, int64_t columns, To* to) {
  using C = between_t<From, To>;
  const Lanes<C> factor(scale);
  for_lanes<C>(columns, [&](int64_t i, auto part) {
    const Lanes<C> value = load<C>(from + i, part);
    const Lanes<C> result =
        residual != nullptr ? fmadd(value, factor, load<C>(residual + i, part)) : value * factor;
    store<C>(to + i, result, part);
  });
}

}  // namespace

void gather_rows(const Input& source, const int64_t* index, const Output& out) {
  with_type(source.dtype, [&](auto from) {
    with_type(out.dtype, [&](auto to) {
      using From = decltype(from);
      using To = decltype(to);
      const Blocks blocks(out.rows, out.columns);
      blocks.parallel([&](int64_t block) {
        blocks.rows_of(block, [&](int64_t row) {
          const From* const chosen = row_of<From>(source, index == nullptr ? row : index[row]);
          gather_row(chosen, source.column_stride, out.columns, row_of<To>(out, row));
        });
      });
    });
  });
}

void copy_others(const Output& into, const int64_t* index, int64_t count, const Input* source) {
  std::vector<char> is_other(into.rows, 1);
  for (int64_t i = 0; i < count; ++i) {
    is_other[index[i]] = 0;
  }
  with_type(into.dtype, [&](auto to) {
    using To = decltype(to);
    const Blocks blocks(into.rows, into.columns);
    blocks.parallel([&](int64_t block) {
      blocks.rows_of(block, [&](int64_t row) {
        if (!is_other[row]) {
          return;
        }
        To* const written = row_of<To>(into, row);
        if (source == nullptr) {
          std::memset(static_cast<void*>(written), 0, into.columns * sizeof(To));
        } else {
          gather_row(row_of<To>(*source, row), source->column_stride, into.columns, written);
        }
      });
    });
  });
}

void scatter_rows(
    const Input& values, const Output& into, const int64_t* index, double scale,
    const Input* residual) {
  with_type(values.dtype, [&](auto from) {
    with_type(into.dtype, [&](auto to) {
      using From = decltype(from);
      using To = decltype(to);
      const Blocks blocks(values.rows, values.columns);
      blocks.parallel([&](int64_t block) {
        blocks.rows_of(block, [&](int64_t row) {
          const int64_t place = index == nullptr ? row : index[row];
          const To* const add = residual == nullptr ? nullptr : row_of<To>(*residual, place);
          scatter_row(
              row_of<From>(values, row), scale, add, values.columns, row_of<To>(into, place));
        });
      });
    });
  });
}

}  // namespace prereg
