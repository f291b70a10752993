// SPDX-License-Identifier: Apache-2.0
// activate and activation_backward.
#include "blocks.h"
#include "dispatch.h"
#include "exp.h"

namespace prereg {
namespace {

// Every activation: its value at x, and its derivative at x times d, for results of dtype T.

template <typename T, typename C>
Lanes<C> sigmoid(const Lanes<C>& x) {
  return Lanes<C>(C(1)) / (Lanes<C>(C(1)) + exp_for<T>(-x));
}

struct Relu {
  template <typename T, typename C>
  static Lanes<C> value(const Lanes<C>& x) {
    return x.map([](const Vectorized<C>& v) {
      return at::vec::clamp_min(v, Vectorized<C>(C(0)));
    });
  }

  template <typename T, typename C>
  static Lanes<C> backward(const Lanes<C>& x, const Lanes<C>& d) {
    const Lanes<C> zero(C(0));
    return select(x <= zero, zero, d);
  }
};

struct Silu {
  template <typename T, typename C>
  static Lanes<C> value(const Lanes<C>& x) {
    return x / (Lanes<C>(C(1)) + exp_for<T>(-x));
  }

  template <typename T, typename C>
  static Lanes<C> backward(const Lanes<C>& x, const Lanes<C>& d) {
    const Lanes<C> one(C(1)), s = sigmoid<T>(x);
    return d * s * fmadd(x, one - s, one);
  }
};

// x / 2 (1 + tanh(y)) = x sigmoid(2 y), with y = sqrt(2 / pi) (x + 0.044715 x^3).
struct GeluTanh {
  static constexpr double twice = 1.5957691216057308, cubic = 0.044715;

  template <typename T, typename C>
  static Lanes<C> value(const Lanes<C>& x) {
    const Lanes<C> one(C(1));
    return x / (one + exp_for<T>(-inner(x) * x));
  }

  template <typename T, typename C>
  static Lanes<C> backward(const Lanes<C>& x, const Lanes<C>& d) {
    const Lanes<C> one(C(1)), s = sigmoid<T>(inner(x) * x);
    const auto steep = fmadd(x * x, Lanes<C>(C(3 * cubic * twice)), Lanes<C>(C(twice)));
    return d * fmadd(x * s * (one - s), steep, s);  // 0 * steep, not x * steep, where s is 0
  }

 private:
  template <typename C>
  static Lanes<C> inner(const Lanes<C>& x) {
    return fmadd(x * x, Lanes<C>(C(cubic * twice)), Lanes<C>(C(twice)));
  }
};

// x times the normal distribution's Phi(x); the derivative adds x times its density.
struct Gelu {
  static constexpr double density_at_0 = 0.3989422804014327;

  template <typename T, typename C>
  static Lanes<C> value(const Lanes<C>& x) {
    return x * distribution<T>(x, bell<T>(x));
  }

  template <typename T, typename C>
  static Lanes<C> backward(const Lanes<C>& x, const Lanes<C>& d) {
    const Lanes<C> e = bell<T>(x);
    return d * fmadd(x * Lanes<C>(C(density_at_0)), e, distribution<T>(x, e));
  }

 private:
  template <typename T, typename C>
  static Lanes<C> bell(const Lanes<C>& x) {
    return exp_for<T>(x * x * Lanes<C>(C(-0.5)));
  }

  template <typename T>
  static Lanes<double> distribution(const Lanes<double>& x, const Lanes<double>&) {
    const Lanes<double> scaled = x * Lanes<double>(-0.7071067811865476);
    return scaled.map([](const Vectorized<double>& v) { return v.erfc(); }) * Lanes<double>(0.5);
  }

  // Phi(-|x|) = exp(-x^2/2) tail(|x|): shares the exponential with the density, and is exact where
  // erf, added to 1, would cancel.
  template <typename T>
  static Lanes<float> distribution(const Lanes<float>& x, const Lanes<float>& e) {
    const Lanes<float> absolute = x.map([](const Vectorized<float>& v) { return v.abs(); });
    const Lanes<float> below = e * tail<T>(absolute);
    return select(x < Lanes<float>(0.0f), below, Lanes<float>(1.0f) - below);
  }

  template <typename T>
  static Lanes<float> tail(const Lanes<float>& absolute) {
    const Lanes<float> one(1.0f);
    if constexpr (sizeof(T) == 2) {
      // A polynomial in 2/5 |x| - 1: no division. Relative error below 4e-7 up to 5, where Phi(-5)
      // is 3e-7; constant from there on.
      const Lanes<float> bounded = absolute.map([](const Vectorized<float>& v) {
        return at::vec::clamp_max(v, Vectorized<float>(5.0f));
      });
      return polynomial(
          fmadd(bounded, Lanes<float>(0.4f), -one), -0.0003502322651911527f,
          0.0008233984117396176f, -0.0005164797184988856f, 0.000710163963958621f,
          -0.0027885132003575563f, 0.0054722195491194725f, -0.008857483975589275f,
          0.015044216066598892f, -0.025129465386271477f, 0.039778564125299454f,
          -0.05986335128545761f, 0.08529970794916153f, -0.11403479427099228f,
          0.14133134484291077f);
    } else {
      // P(t) t with t = 1 / (1 + 0.35 |x|). Relative error below 4e-8.
      const Lanes<float> t = one / fmadd(absolute, Lanes<float>(0.35f), one);
      return t * polynomial(
          t, -0.029163578525185585f, 0.14405924081802368f, -0.2558988630771637f,
          0.15938977897167206f, -0.023261869326233864f, 0.10557404905557632f,
          0.11981566995382309f, 0.13986431062221527f, 0.13962125778198242f);
    }
  }
};

template <typename Function>
void with_activation(Activation activation, const Function& function) {
  switch (activation) {
    case Activation::gelu:
      return function(Gelu{});
    case Activation::gelu_tanh:
      return function(GeluTanh{});
    case Activation::silu:
      return function(Silu{});
    case Activation::relu:
      return function(Relu{});
  }
}

template <typename A, typename T>
PREREG_ROW void forward_row(const T* u, const compute_t<T>* bias, int64_t columns, T* g) {
  using C = compute_t<T>;
  for_lanes<C>(columns, [&](int64_t i, auto part) {
    store<C>(g + i, A::template value<T>(load_biased<C>(u, bias, i, part)), part);
  });
}

template <typename A, typename T>
PREREG_ROW void backward_row(
    T* dg, const T* u, const compute_t<T>* bias, int64_t columns, compute_t<T>* sums) {
  using C = compute_t<T>;
  for_lanes<C>(columns, [&](int64_t i, auto part) {
    const Lanes<C> x = load_biased<C>(u, bias, i, part);
    const Lanes<C> du = A::template backward<T>(x, load<C>(dg + i, part));
    store<C>(dg + i, du, part);
    if (sums != nullptr) {
      store<C>(sums + i, load<C>(sums + i, part) + du, part);
    }
  });
}

template <typename A, typename T>
void forward(const Input& u, const compute_t<T>* bias, const Output& g) {
  const Blocks blocks(u.rows, u.columns);
  blocks.parallel([&](int64_t block) {
    blocks.rows_of(block, [&](int64_t row) {
      forward_row<A>(row_of<T>(u, row), bias, u.columns, row_of<T>(g, row));
    });
  });
}

template <typename A, typename T>
void backward(const Output& dg, const Input& u, const compute_t<T>* bias, void* sums) {
  const Blocks blocks(u.rows, u.columns);
  const ColumnSums<compute_t<T>> column_sums(sums, blocks, u.columns);
  blocks.parallel([&](int64_t block) {
    auto* const partial = column_sums.start(block);
    blocks.rows_of(block, [&](int64_t row) {
      backward_row<A>(row_of<T>(dg, row), row_of<T>(u, row), bias, u.columns, partial);
    });
  });
  column_sums.finish();
}

}  // namespace

void activate(const Input& u, const void* bias, Activation activation, const Output& g) {
  with_type(u.dtype, [&](auto element) {
    using T = decltype(element);
    with_activation(activation, [&](auto a) {
      forward<decltype(a), T>(u, static_cast<const compute_t<T>*>(bias), g);
    });
  });
}

void activation_backward(
    const Output& dg, const Input& u, const void* bias, Activation activation, void* sums) {
  with_type(u.dtype, [&](auto element) {
    using T = decltype(element);
    with_activation(activation, [&](auto a) {
      backward<decltype(a), T>(dg, u, static_cast<const compute_t<T>*>(bias), sums);
    });
  });
}

}  // namespace prereg
