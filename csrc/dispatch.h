// SPDX-License-Identifier: Apache-2.0
// From a dtype known at run time to a template argument.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <c10/util/Half.h>

namespace prereg {

// Calls function(T{}) for the C++ type T of this dtype.
template <typename Function>
inline void with_type(c10::ScalarType dtype, const Function& function) {
  switch (dtype) {
    case c10::ScalarType::Double:
      return function(double{});
    case c10::ScalarType::Float:
      return function(float{});
    case c10::ScalarType::BFloat16:
      return function(c10::BFloat16{});
    case c10::ScalarType::Half:
      return function(c10::Half{});
    default:
      TORCH_CHECK(false, "expected a floating dtype, got ", dtype);
  }
}

}  // namespace prereg
