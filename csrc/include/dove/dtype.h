#pragma once

#include <cstdint>

namespace dove {

// The floating dtypes of the CPU kernels' tensors; the numbers are those of dove_fast.native.DTYPE_CODES.
enum class Dtype : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// 16-bit floats as they lie in memory.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Calls body(T{}) with T the element type of `dtype`.
template <typename Body>
void with_element_type(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::kFloat32:
      return body(float{});
    case Dtype::kBFloat16:
      return body(BFloat16{});
    case Dtype::kFloat16:
      return body(Float16{});
  }
}

}  // namespace dove
