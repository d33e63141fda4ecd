// Multiplies a stored gradient by its upstream gradient. Mathematics: none.
#include "common/convert.h"
#include "common/parallel.h"
#include "common/registry.h"

namespace KDK_NAMESPACE {
namespace {

constexpr int64_t kTile = 1024;

void scale_in_place(Tensor x, Tensor factor, int64_t threads) {
  const float by = *factor.as<float>();
  if (by == 1.f) return;
  const int64_t n = x.numel(), tiles = (n + kTile - 1) / kTile;
  parallel_for(tiles, n, threads, [&](int64_t begin, int64_t end) {
    alignas(64) float buffer[kTile], out[kTile];
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t start = tile * kTile, size = n - start < kTile ? n - start : kTile;
      void* place = advance(x.data, x.dtype, start);
      const float* in = load_tile(place, x.dtype, size, buffer);
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) out[i] = in[i] * by;
      store_tile(place, x.dtype, size, out);
    }
  });
}

KDK_EXPORT(scale_in_place)

}  // namespace
}  // namespace KDK_NAMESPACE
