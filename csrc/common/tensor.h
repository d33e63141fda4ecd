// What a kernel sees of a torch tensor: an address, a type, sizes and strides. No torch header is
// needed, so one binary serves every torch version.
#pragma once
#include <cstdint>

namespace kdk {

enum class DType : int32_t { f32 = 0, f16 = 1, bf16 = 2, i64 = 3, i32 = 4, u8 = 5, f64 = 6 };

inline int64_t size_of(DType t) {
  switch (t) {
    case DType::f16:
    case DType::bf16: return 2;
    case DType::i64:
    case DType::f64: return 8;
    case DType::u8: return 1;
    default: return 4;
  }
}

struct Tensor {
  static constexpr int kMaxDims = 5;

  void* data = nullptr;  // null when an optional argument was not given
  DType dtype = DType::f32;
  int32_t ndim = 0;
  int64_t shape[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};  // in elements; 0 where the tensor is expanded

  explicit operator bool() const { return data != nullptr; }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
  int64_t numel() const {
    int64_t n = 1;
    for (int d = 0; d < ndim; ++d) n *= shape[d];
    return n;
  }
};

}  // namespace kdk
