// SPDX-License-Identifier: Apache-2.0
// e^x of lanes. For float it is spelled out, so that it is inlined: the calls of a vector library
// save and restore every register around them, and take twice as long.
#pragma once

#include <cstdint>
#include <limits>

#include "lanes.h"

namespace prereg {

inline Lanes<double> exp(const Lanes<double>& x) {
  return x.map([](const Vectorized<double>& v) { return v.exp(); });
}

// 2^n e^f with f = x - n ln 2 within +-ln 2 / 2; relative error below 1e-7. 0 where e^x would not
// be a normal number, infinity above 2^127.5, NaN for NaN.
inline Vectorized<float> exp(const Vectorized<float>& x) {
  using F = Vectorized<float>;
  using I = Vectorized<int32_t>;
  const F lowest(-87.3365f), highest(88.3762f);
  const F bounded = at::vec::clamp(x, lowest, highest);
  // Adding 1.5 2^23 rounds to a whole number, which is then in the sum's low bits
  const F magic(12582912.0f);
  const F shifted = at::vec::fmadd(bounded, F(1.44269504f), magic);
  const F n = shifted - magic;
  F f = at::vec::fmadd(n, F(-0.693145752f), bounded);
  f = at::vec::fmadd(n, F(-1.42860677e-6f), f);
  const F p = polynomial(
      f, 0.0013814540579915047f, 0.00836874544620514f, 0.04166838899254799f, 0.1666652113199234f,
      0.4999999403953552f, 1.0f, 1.0f);
  const I power = (at::vec::cast<int32_t>(shifted) + I(127)) << I(23);
  const F value = p * at::vec::cast<float>(power);
  const F not_small = F::blendv(value, F(0.0f), x < lowest);
  return F::blendv(not_small, F(std::numeric_limits<float>::infinity()), x > highest);
}

inline Lanes<float> exp(const Lanes<float>& x) {
  return {exp(x.a), exp(x.b)};
}

// For results of 16 bits: relative error below 1e-6, and e^-80 or e^88 beyond these. That is 0 and
// infinity to them, but not subnormal, which would be slow.
inline Vectorized<float> short_exp(const Vectorized<float>& x) {
  using F = Vectorized<float>;
  using I = Vectorized<int32_t>;
  const F bounded = at::vec::clamp(x, F(-80.0f), F(88.0f));
  const F magic(12582912.0f + 127.0f);  // as above, with the bias of the exponent
  const F shifted = at::vec::fmadd(bounded, F(1.44269504f), magic);
  const F f = at::vec::fmadd(shifted - magic, F(-0.693147181f), bounded);
  const F p = polynomial(
      f, 0.008297652006149292f, 0.04191539064049721f, 0.16667574644088745f, 0.49998894333839417f,
      0.9999997019767761f, 1.0000001192092896f);
  return p * at::vec::cast<float>(at::vec::cast<int32_t>(shifted) << I(23));
}

// e^x, as exact as results of dtype T show.
template <typename T, typename C>
inline Lanes<C> exp_for(const Lanes<C>& x) {
  if constexpr (sizeof(T) == 2) {
    return {short_exp(x.a), short_exp(x.b)};
  } else {
    return exp(x);
  }
}

}  // namespace prereg
