// SPDX-License-Identifier: Apache-2.0
// Work is split into blocks of rows that depend on the shape alone, so that the results do not
// depend on how many threads there are: column sums are summed in each block, then over blocks.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>

#include <ATen/Parallel.h>

#include "lanes.h"
#include "rows.h"

namespace prereg {

class Blocks {
 public:
  Blocks(int64_t rows, int64_t columns) : rows_(rows) {
    constexpr int64_t elements = 16384;  // enough to be worth a thread
    constexpr int64_t least = 16;  // rows that share the traffic of one row of column sums
    constexpr int64_t most_blocks = 512;  // of which the column sums need a row each
    const int64_t even = (rows + most_blocks - 1) / most_blocks;
    size_ = std::max({least, elements / std::max<int64_t>(columns, 1), even});
  }

  int64_t count() const {
    return (rows_ + size_ - 1) / size_;
  }

  // Calls function(block) for every block, on several threads.
  template <typename Function>
  void parallel(const Function& function) const {
    at::parallel_for(0, count(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        function(block);
      }
    });
  }

  // Calls function(row) for the block's rows, in order.
  template <typename Function>
  void rows_of(int64_t block, const Function& function) const {
    const int64_t end = std::min(rows_, (block + 1) * size_);
    for (int64_t row = block * size_; row < end; ++row) {
      function(row);
    }
  }

 private:
  int64_t rows_, size_;
};

// sums = the column sums of what the blocks add to their own rows of partial sums.
template <typename C>
class ColumnSums {
 public:
  ColumnSums(void* sums, const Blocks& blocks, int64_t columns)
      : sums_(static_cast<C*>(sums)), blocks_(blocks.count()), columns_(columns) {
    if (sums_ != nullptr) {
      partial_.reset(new C[blocks_ * columns_]);
    }
  }

  // The block's row, zero; null if nobody wants the sums.
  C* start(int64_t block) const {
    if (sums_ == nullptr) {
      return nullptr;
    }
    C* partial = partial_.get() + block * columns_;
    std::fill_n(partial, columns_, C(0));
    return partial;
  }

  void finish() const {
    if (sums_ == nullptr) {
      return;
    }
    at::parallel_for(
        0, columns_, 1024, [&](int64_t begin, int64_t end) { add_partial(begin, end - begin); });
  }

 private:
  PREREG_ROW void add_partial(int64_t begin, int64_t columns) const {
    for_lanes<C>(columns, [&](int64_t i, auto part) {
      Lanes<C> sum(C(0));
      for (int64_t block = 0; block < blocks_; ++block) {
        sum = sum + load<C>(partial_.get() + block * columns_ + begin + i, part);
      }
      store<C>(sums_ + begin + i, sum, part);
    });
  }

  C* sums_;
  int64_t blocks_, columns_;
  std::unique_ptr<C[]> partial_;
};

template <typename T, typename Data>
inline auto row_of(const Matrix<Data>& matrix, int64_t row) {
  using Element = std::conditional_t<std::is_const_v<Data>, const T, T>;
  return reinterpret_cast<Element*>(matrix.data) + row * matrix.row_stride;
}

}  // namespace prereg
