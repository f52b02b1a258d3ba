#pragma once

#include <stdexcept>

namespace dove {

// A CUDA call that failed; what() is one sentence for the user.
class CudaError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace dove
