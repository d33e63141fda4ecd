// x *= factor, where the factor lives on the device: a backward whose upstream gradient is 1 costs
// a launch that returns at once, and never asks the host.
#include <algorithm>

#include "common/cuda.cuh"
#include "common/registry.h"

namespace KDK_NAMESPACE {
namespace {

constexpr int kScaleThreads = 256;

// Whole vectors between the `head` elements before the first 16-byte boundary and the tail.
template <typename T>
__global__ void __launch_bounds__(kScaleThreads)
    scale_kernel(T* x, int64_t size, int head, const float* factor) {
  const float f = __ldg(factor);
  if (f == 1.f) return;
  constexpr int kSize = Vec<T>::kSize;
  const int64_t vectors = (size - head) / kSize;
  const int64_t stride = int64_t{gridDim.x} * kScaleThreads;
  const int64_t thread = int64_t{blockIdx.x} * kScaleThreads + threadIdx.x;
  T* const body = x + head;
  constexpr int kUnroll = 4;  // loads in flight
  for (int64_t i = thread; i < vectors; i += stride * kUnroll) {
    Vec<T> v[kUnroll];
#pragma unroll
    for (int j = 0; j < kUnroll; ++j)
      if (i + j * stride < vectors) v[j] = load_vec_streaming(body + (i + j * stride) * kSize);
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      if (i + j * stride >= vectors) continue;
      float y[kSize];
      v[j].to(y);
#pragma unroll
      for (int k = 0; k < kSize; ++k) y[k] *= f;
      store_vec_streaming(body + (i + j * stride) * kSize, Vec<T>::from(y));
    }
  }
  const int64_t rest = size - vectors * kSize;  // head and tail
  if (thread < rest) {
    T* const at = thread < head ? x + thread : body + vectors * kSize + (thread - head);
    *at = from_float<T>(to_float(*at) * f);
  }
}

template <typename T>
void run(T* x, int64_t size, const float* factor, int64_t device, int64_t stream) {
  constexpr int64_t kSize = Vec<T>::kSize;
  const int64_t off = static_cast<int64_t>(reinterpret_cast<uintptr_t>(x) % 16 / sizeof(T));
  const int64_t head = std::min<int64_t>(size, (kSize - off) % kSize);
  const int64_t wanted = (size / kSize + kScaleThreads * 4 - 1) / (kScaleThreads * 4);
  const int64_t blocks = std::max<int64_t>(1, std::min<int64_t>(wanted, 8 * sm_count(device)));
  launch(
      {"scale_in_place", dim3(static_cast<unsigned>(blocks)), dim3(kScaleThreads), device, stream},
      scale_kernel<T>, x, size, static_cast<int>(head), factor);
}

}  // namespace

void scale_in_place(Tensor x, Tensor factor, int64_t device, int64_t stream) {
  const auto require = [](bool ok, const char* message) {
    if (!ok) throw std::invalid_argument(std::string("scale_in_place: ") + message);
  };
  require(factor && factor.dtype == DType::f32 && factor.numel() >= 1, "factor must be f32[1]");
  require(x.ndim == 1 && (x.shape[0] <= 1 || x.stride[0] == 1), "x must be contiguous, 1-D");
  const int64_t size = x.shape[0];
  if (size == 0) return;
  const float* const f = factor.as<const float>();
  switch (x.dtype) {
    case DType::f32: return run(x.as<float>(), size, f, device, stream);
    case DType::f16: return run(x.as<__half>(), size, f, device, stream);
    case DType::bf16: return run(x.as<__nv_bfloat16>(), size, f, device, stream);
    default: require(false, "x must be f32, f16 or bf16");
  }
}
KDK_EXPORT(scale_in_place)

}  // namespace KDK_NAMESPACE
