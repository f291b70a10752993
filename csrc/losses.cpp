// SPDX-License-Identifier: Apache-2.0
// token_losses: row statistics, distances and gradients, one row at a time.
//
// With p = (z - mean) * inverse and q likewise of t, every loss is a sum over the row of a function
// of p and q. Its gradient is (dp - a - p b) * factor: a and b are how the mean and the norm of z
// move, and dp is p - q, clamped for smooth_l1, its sign for l1. The cosine is in there: |p - q|^2 / 2 = 1 - c for
// unit vectors, and b = sum p (p - q) = 1 - c, with nothing that cancels near c = 1.
#include <cmath>
#include <vector>

#include "blocks.h"
#include "dispatch.h"

namespace prereg {
namespace {

// p = (x - mean) * inverse
template <typename C>
struct Scaling {
  C mean = 0, inverse = 1;
  bool clamped = false;  // the norm is below eps, and counts as a constant

  template <typename T, typename P>
  Lanes<C> apply(const T* x, P part) const {
    return centre(x, part) * Lanes<C>(inverse);
  }

  // Beyond the row the difference is 0.
  template <typename T, typename P>
  Lanes<C> centre(const T* x, P part) const {
    return load<C>(x, part, mean) - Lanes<C>(mean);
  }

  void divide_by_norm(C squares, C eps) {
    const C norm = std::sqrt(squares);
    clamped = norm < eps;  // not so for NaN, which stays
    inverse = 1 / (clamped ? eps : norm);
  }
};

// The scalings of z and of t.
template <typename C>
struct Scalings {
  Scaling<C> z, t;

  template <typename Z, typename T>
  Scalings(const Z* z_row, const T* t_row, int64_t columns, const LossSpec& spec) {
    const C eps = static_cast<C>(spec.eps);
    const C count = static_cast<C>(columns);
    Lanes<C> z_sum(C(0)), t_sum(C(0));
    if (spec.normalize == Normalize::layer) {
      for_lanes<C>(columns, [&](int64_t i, auto part) {
        z_sum = z_sum + load<C>(z_row + i, part);
        t_sum = t_sum + load<C>(t_row + i, part);
      });
      z.mean = sum_of(z_sum) / count;
      t.mean = sum_of(t_sum) / count;
    } else if (spec.loss != Loss::cosine && spec.normalize == Normalize::none) {
      return;
    }
    Lanes<C> z_squares(C(0)), t_squares(C(0));
    for_lanes<C>(columns, [&](int64_t i, auto part) {
      const Lanes<C> z_gap = z.centre(z_row + i, part), t_gap = t.centre(t_row + i, part);
      z_squares = fmadd(z_gap, z_gap, z_squares);
      t_squares = fmadd(t_gap, t_gap, t_squares);
    });
    if (spec.normalize == Normalize::layer) {
      z.inverse = 1 / std::sqrt(sum_of(z_squares) / count + eps);
      t.inverse = 1 / std::sqrt(sum_of(t_squares) / count + eps);
    } else {
      z.divide_by_norm(sum_of(z_squares), eps);
      t.divide_by_norm(sum_of(t_squares), eps);
    }
  }
};

// Half the derivative of the squared difference, or all of smooth_l1's and l1's.
template <Loss loss, typename C>
Lanes<C> derivative(const Lanes<C>& p, const Lanes<C>& q) {
  const Lanes<C> gap = p - q;
  if (loss == Loss::l1) {  // 0 where they are equal, and of a NaN
    const Lanes<C> zero(C(0)), one(C(1));
    return select(zero < gap, one, select(gap < zero, -one, zero));
  }
  if (loss != Loss::smooth_l1) {
    return gap;
  }
  return gap.map([](const Vectorized<C>& v) {
    return at::vec::clamp(v, Vectorized<C>(C(-1)), Vectorized<C>(C(1)));
  });
}

template <Loss loss, typename C>
Lanes<C> add_distance(
    const Lanes<C>& sum, const Lanes<C>& p, const Lanes<C>& q, const Lanes<C>& dp) {
  if (loss == Loss::cosine) {
    return fmadd(p, q, sum);
  }
  if (loss == Loss::mse) {
    return fmadd(dp, dp, sum);
  }
  if (loss == Loss::l1) {
    return fmadd(dp, p - q, sum);
  }
  return fmadd(dp, (p - q) - dp * Lanes<C>(C(0.5)), sum);
}

// The row's loss; writes coefficient * dloss/dz to dz and adds it to sums, unless they are null.
// dz may be z.
template <Loss loss, typename C, typename Read, typename T>
PREREG_ROW C row_loss(
    const Read* z, const Read* t, int64_t columns, const LossSpec& spec, C coefficient, T* dz,
    C* sums) {
  const Scalings<C> of(z, t, columns, spec);
  Lanes<C> distances(C(0)), dps(C(0)), along(C(0));
  for_lanes<C>(columns, [&](int64_t i, auto part) {
    const Lanes<C> p = of.z.apply(z + i, part), q = of.t.apply(t + i, part);
    const Lanes<C> dp = derivative<loss>(p, q);
    distances = add_distance<loss>(distances, p, q, dp);
    if (dz != nullptr) {
      dps = dps + dp;
      along = fmadd(p, dp, along);
    }
  });
  const C mean_of = loss == Loss::cosine ? C(-1) : C(1) / static_cast<C>(columns);
  const C value = sum_of(distances) * mean_of;
  if (dz == nullptr) {
    return value;
  }

  C a = 0, b = 0;
  if (spec.normalize == Normalize::layer) {
    a = sum_of(dps) / static_cast<C>(columns);
    b = sum_of(along) / static_cast<C>(columns);
  } else if (loss == Loss::cosine) {
    // -q is all that is left where the norm is constant. Where c is 0, 1 - c is exact: a zero
    // target has a zero gradient
    b = of.z.clamped || value == C(0) ? C(1) : sum_of(along);
  } else if (spec.normalize == Normalize::l2) {
    b = of.z.clamped ? C(0) : sum_of(along);
  }
  const C slope = loss == Loss::cosine ? C(1) : loss == Loss::mse ? 2 * mean_of : mean_of;
  const Lanes<C> factor(coefficient * slope * of.z.inverse), shift(a), shrink(b);
  const bool is_projected = loss == Loss::cosine || spec.normalize != Normalize::none;
  for_lanes<C>(columns, [&](int64_t i, auto part) {
    const Lanes<C> p = of.z.apply(z + i, part), q = of.t.apply(t + i, part);
    Lanes<C> d = derivative<loss>(p, q);
    if (is_projected) {  // else p * 0 would be NaN where p is not finite
      d.a = (d.a - shift.a) - p.a * shrink.a;
      d.b = (d.b - shift.b) - p.b * shrink.b;
    }
    d = d * factor;
    store<C>(dz + i, d, part);
    if (sums != nullptr) {
      store<C>(sums + i, load<C>(sums + i, part) + d, part);
    }
  });
  return value;
}

// The cosine loss of 16-bit rows in one pass less. What its gradient loses to rounding near c = 1,
// 1e-7, does not show in 16 bits.
template <typename C, typename T>
PREREG_ROW C short_cosine_row(
    const T* z, const T* t, int64_t columns, C eps, C coefficient, T* dz, C* sums) {
  Lanes<C> z_squares(C(0)), t_squares(C(0)), products(C(0));
  for_lanes<C>(columns, [&](int64_t i, auto part) {
    const Lanes<C> x = load<C>(z + i, part), y = load<C>(t + i, part);
    z_squares = fmadd(x, x, z_squares);
    t_squares = fmadd(y, y, t_squares);
    products = fmadd(x, y, products);
  });
  Scaling<C> of_z, of_t;
  of_z.divide_by_norm(sum_of(z_squares), eps);
  of_t.divide_by_norm(sum_of(t_squares), eps);
  const C cosine = sum_of(products) * of_z.inverse * of_t.inverse;
  if (dz == nullptr) {
    return -cosine;
  }
  const Lanes<C> along(of_z.clamped ? C(0) : cosine * of_z.inverse), towards(-of_t.inverse);
  const Lanes<C> factor(coefficient * of_z.inverse);
  for_lanes<C>(columns, [&](int64_t i, auto part) {
    const Lanes<C> x = load<C>(z + i, part), y = load<C>(t + i, part);
    const Lanes<C> d = fmadd(x, along, y * towards) * factor;
    store<C>(dz + i, d, part);
    if (sums != nullptr) {
      store<C>(sums + i, load<C>(sums + i, part) + d, part);
    }
  });
  return -cosine;
}

template <typename C, typename T>
PREREG_ROW void convert_row(const T* from, const C* bias, int64_t columns, C* to) {
  for_lanes<C>(columns, [&](int64_t i, auto part) {
    store<C>(to + i, load_biased<C>(from, bias, i, part), part);
  });
}

// The row as elements of type C: itself, or converted into the buffer, plus the bias.
template <typename C>
const C* read_row(const Input& matrix, int64_t row, const C* bias, std::vector<C>& buffer) {
  const C* result = buffer.data();
  with_type(matrix.dtype, [&](auto element) {
    using T = decltype(element);
    const T* const from = row_of<T>(matrix, row);
    if constexpr (std::is_same_v<C, T>) {
      if (bias == nullptr) {
        result = from;
        return;
      }
    }
    convert_row<C, T>(from, bias, matrix.columns, buffer.data());
  });
  return result;
}

template <Loss loss, typename T>
void rows_losses(
    const Input& z, const compute_t<T>* bias, const Input& anchor, const int64_t* index,
    const LossSpec& spec, compute_t<T>* losses, Coefficient coefficient, const Output* dz,
    void* sums) {
  using C = compute_t<T>;
  const auto* coefficients = static_cast<const C*>(coefficient.data);
  const bool as_they_are = bias == nullptr && anchor.dtype == z.dtype;
  const Blocks blocks(z.rows, z.columns);
  const ColumnSums<C> column_sums(sums, blocks, z.columns);
  blocks.parallel([&](int64_t block) {
    thread_local std::vector<C> z_buffer, t_buffer;
    z_buffer.resize(z.columns);
    t_buffer.resize(z.columns);
    C* const partial = column_sums.start(block);
    blocks.rows_of(block, [&](int64_t row) {
      const int64_t t_row = index == nullptr ? row : index[row];
      T* const to = dz == nullptr ? nullptr : row_of<T>(*dz, row);
      const C scale = dz == nullptr ? C(0) : coefficients[row * coefficient.stride];
      const auto loss_of = [&](const auto* z_from, const auto* t_from) {
        using Read = std::remove_const_t<std::remove_pointer_t<decltype(z_from)>>;
        if constexpr (loss == Loss::cosine && sizeof(Read) == 2) {
          const C eps = static_cast<C>(spec.eps);
          losses[row] = short_cosine_row<C>(z_from, t_from, z.columns, eps, scale, to, partial);
        } else {
          losses[row] =
              row_loss<loss, C, Read, T>(z_from, t_from, z.columns, spec, scale, to, partial);
        }
      };
      if (as_they_are) {
        loss_of(row_of<T>(z, row), row_of<T>(anchor, t_row));
      } else {
        loss_of(
            read_row<C>(z, row, bias, z_buffer), read_row<C>(anchor, t_row, nullptr, t_buffer));
      }
    });
  });
  column_sums.finish();
}

}  // namespace

void token_losses(
    const Input& z, const void* bias, const Input& anchor, const int64_t* index,
    const LossSpec& spec, void* losses, Coefficient coefficient, const Output* dz, void* sums) {
  with_type(z.dtype, [&](auto element) {
    using T = decltype(element);
    using C = compute_t<T>;
    const auto run = [&](auto rows) {
      rows(
          z, static_cast<const C*>(bias), anchor, index, spec, static_cast<C*>(losses), coefficient,
          dz, sums);
    };
    switch (spec.loss) {
      case Loss::cosine:
        return run(rows_losses<Loss::cosine, T>);
      case Loss::mse:
        return run(rows_losses<Loss::mse, T>);
      case Loss::smooth_l1:
        return run(rows_losses<Loss::smooth_l1, T>);
      case Loss::l1:
        return run(rows_losses<Loss::l1, T>);
    }
  });
}

}  // namespace prereg
