// SPDX-License-Identifier: Apache-2.0
// Rows are walked two SIMD vectors at a time: as many elements of a 16-bit dtype fill one vector,
// and are computed with as two vectors of float.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

// For functions that loop over a row: everything in them is inlined, so that constants and sums
// stay in registers. By itself GCC would call a step's larger parts.
#define PREREG_ROW __attribute__((flatten))
#define PREREG_RARE __attribute__((noinline))

namespace prereg {

using at::vec::Vectorized;

// Not at::vec::VectorizedN: its loops over an array of vectors stay loops in what GCC makes of it.
template <typename C>
struct Lanes {
  Vectorized<C> a, b;

  static constexpr int size() {
    return 2 * Vectorized<C>::size();
  }

  Lanes(const Vectorized<C>& first, const Vectorized<C>& second) : a(first), b(second) {}
  explicit Lanes(C value) : a(value), b(value) {}

  static Lanes read(const C* from) {
    return {Vectorized<C>::loadu(from), Vectorized<C>::loadu(from + size() / 2)};
  }

  void write(C* to) const {
    a.store(to);
    b.store(to + size() / 2);
  }

  Lanes operator+(const Lanes& x) const {
    return {a + x.a, b + x.b};
  }
  Lanes operator-(const Lanes& x) const {
    return {a - x.a, b - x.b};
  }
  Lanes operator*(const Lanes& x) const {
    return {a * x.a, b * x.b};
  }
  Lanes operator/(const Lanes& x) const {
    return {a / x.a, b / x.b};
  }
  Lanes operator-() const {
    return {a.neg(), b.neg()};
  }
  Lanes operator<(const Lanes& x) const {
    return {a < x.a, b < x.b};
  }
  Lanes operator<=(const Lanes& x) const {
    return {a <= x.a, b <= x.b};
  }

  template <typename Function>
  Lanes map(const Function& function) const {
    return {function(a), function(b)};
  }
};

// x y + z
template <typename C>
inline Lanes<C> fmadd(const Lanes<C>& x, const Lanes<C>& y, const Lanes<C>& z) {
  return {at::vec::fmadd(x.a, y.a, z.a), at::vec::fmadd(x.b, y.b, z.b)};
}

// The polynomial in x with these coefficients, the highest power's first.
template <typename Vector, typename... Rest>
inline Vector polynomial(const Vector& x, float first, Rest... rest) {
  using at::vec::fmadd;
  Vector sum(first);
  ((sum = fmadd(sum, x, Vector(rest))), ...);
  return sum;
}

// The mask is what a comparison returns.
template <typename C>
inline Lanes<C> select(const Lanes<C>& mask, const Lanes<C>& yes, const Lanes<C>& no) {
  return {
      Vectorized<C>::blendv(no.a, yes.a, mask.a), Vectorized<C>::blendv(no.b, yes.b, mask.b)};
}

// The dtype that elements of dtype T are computed with.
template <typename T>
using compute_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// How many elements a step of `for_lanes` covers: all lanes, or the row's last `count`.
struct Whole {};
struct Part {
  int64_t count;
};

template <typename C, typename Step>
inline void for_lanes(int64_t count, const Step& step) {
  constexpr int64_t size = Lanes<C>::size();
  int64_t i = 0;
  for (; i + size <= count; i += size) {
    step(i, Whole{});
  }
  if (i < count) {
    step(i, Part{count - i});
  }
}

template <typename C, typename T>
inline Lanes<C> load(const T* from, Whole = {}) {
  if constexpr (std::is_same_v<C, T>) {
    return Lanes<C>::read(from);
  } else if constexpr (std::is_same_v<C, float> && sizeof(T) == 2) {
    const auto [a, b] = at::vec::convert_to_float<T>(Vectorized<T>::loadu(from));
    return {a, b};
  } else {
    alignas(64) C converted[Lanes<C>::size()];
    for (int i = 0; i < Lanes<C>::size(); ++i) {
      converted[i] = static_cast<C>(from[i]);
    }
    return Lanes<C>::read(converted);
  }
}

// Lanes beyond the row get `fill`.
template <typename C, typename T>
PREREG_RARE Lanes<C> load(const T* from, Part part, C fill = 0) {
  alignas(64) C converted[Lanes<C>::size()];
  std::fill_n(converted, Lanes<C>::size(), fill);
  for (int64_t i = 0; i < part.count; ++i) {
    converted[i] = static_cast<C>(from[i]);
  }
  return Lanes<C>::read(converted);
}

template <typename C, typename T>
inline Lanes<C> load(const T* from, Whole whole, C /*fill*/) {
  return load<C>(from, whole);
}

template <typename C, typename T>
inline void store(T* to, const Lanes<C>& value, Whole = {}) {
  if constexpr (std::is_same_v<C, T>) {
    value.write(to);
#ifdef __AVX512BF16__
  } else if constexpr (std::is_same_v<C, float> && std::is_same_v<T, c10::BFloat16>) {
    // One instruction in place of some twenty
    const __m512bh packed = _mm512_cvtne2ps_pbh(value.b, value.a);
    std::memcpy(to, &packed, sizeof(packed));
#endif
  } else if constexpr (std::is_same_v<C, float> && sizeof(T) == 2) {
    at::vec::convert_from_float<T>(value.a, value.b).store(to);
  } else {
    alignas(64) C buffer[Lanes<C>::size()];
    value.write(buffer);
    for (int i = 0; i < Lanes<C>::size(); ++i) {
      to[i] = static_cast<T>(buffer[i]);
    }
  }
}

template <typename C, typename T>
PREREG_RARE void store(T* to, const Lanes<C>& value, Part part) {
  alignas(64) C buffer[Lanes<C>::size()];
  value.write(buffer);
  for (int64_t i = 0; i < part.count; ++i) {
    to[i] = static_cast<T>(buffer[i]);
  }
}

// x plus the bias, if there is one. Not a choice between two Lanes: GCC would copy the chosen one
// through memory, in halves of vectors, and wait for them.
template <typename C, typename T, typename P>
inline Lanes<C> load_biased(const T* from, const C* bias, int64_t i, P part) {
  Lanes<C> x = load<C>(from + i, part);
  if (bias != nullptr) {
    const Lanes<C> more = load<C>(bias + i, part);
    x.a = x.a + more.a;
    x.b = x.b + more.b;
  }
  return x;
}

template <typename C>
inline C sum_of(const Lanes<C>& lanes) {
  constexpr int size = Vectorized<C>::size();
  alignas(64) C sums[size];
  (lanes.a + lanes.b).store(sums);
#pragma GCC unroll 4
  for (int half = size / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) {
      sums[i] += sums[i + half];
    }
  }
  return sums[0];
}

}  // namespace prereg
