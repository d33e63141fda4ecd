// Reading and writing float32, float16 and bfloat16 as float32 tiles.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "common/tensor.h"

namespace KDK_NAMESPACE {

constexpr int64_t kLanes = 16;  // the widest vector in floats: tiles are padded to whole vectors

inline int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

inline float bf16_to_float(uint16_t h) {
  const uint32_t u = static_cast<uint32_t>(h) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

inline uint16_t float_to_bf16(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;  // to nearest even
  return static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

inline float half_to_float(uint16_t h) {
  // The exponent is moved by a multiplication, which also makes subnormals normal.
  const uint32_t shifted = static_cast<uint32_t>(h & 0x7fffu) << 13;
  float f;
  memcpy(&f, &shifted, 4);
  f *= 0x1p112f;
  uint32_t u;
  memcpy(&u, &f, 4);
  u = (h & 0x7c00u) == 0x7c00u ? (shifted | 0x7f800000u) : u;
  u |= static_cast<uint32_t>(h & 0x8000u) << 16;
  memcpy(&f, &u, 4);
  return f;
}

inline uint16_t float_to_half(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  const uint32_t sign = (u >> 16) & 0x8000u;
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (u >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds beyond 65504
  if (u < 0x38800000u) {  // subnormal: let the adder round at 2^-24
    float g;
    memcpy(&g, &u, 4);
    g += 0.5f;
    memcpy(&u, &g, 4);
    return static_cast<uint16_t>(sign | (u - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((u + 0xfffu + ((u >> 13) & 1u) - 0x38000000u) >> 13));
}

inline float load_one(const void* p, DType t, int64_t i) {
  switch (t) {
    case DType::f16: return half_to_float(static_cast<const uint16_t*>(p)[i]);
    case DType::bf16: return bf16_to_float(static_cast<const uint16_t*>(p)[i]);
    default: return static_cast<const float*>(p)[i];
  }
}

inline void store_one(void* p, DType t, int64_t i, float x) {
  switch (t) {
    case DType::f16: static_cast<uint16_t*>(p)[i] = float_to_half(x); break;
    case DType::bf16: static_cast<uint16_t*>(p)[i] = float_to_bf16(x); break;
    default: static_cast<float*>(p)[i] = x;
  }
}

inline const void* advance(const void* p, DType t, int64_t elements) {
  return static_cast<const char*>(p) + elements * size_of(t);
}
inline void* advance(void* p, DType t, int64_t elements) {
  return static_cast<char*>(p) + elements * size_of(t);
}

// n consecutive elements as floats, padded with -inf (no mass) to whole vectors. Float32 is used
// where it lies if it fills whole vectors, else it goes through `buffer`.
inline const float* load_tile(const void* p, DType t, int64_t n, float* buffer) {
  const int64_t full = padded(n);
  if (t == DType::f32) {
    if (n == full) return static_cast<const float*>(p);
    memcpy(buffer, p, static_cast<size_t>(n) * 4);
  } else if (t == DType::bf16) {
    const uint16_t* h = static_cast<const uint16_t*>(p);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) buffer[i] = bf16_to_float(h[i]);
  } else {
    const uint16_t* h = static_cast<const uint16_t*>(p);
    int64_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8)
      _mm256_storeu_ps(buffer + i,
                       _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(h + i))));
#endif
    for (; i < n; ++i) buffer[i] = half_to_float(h[i]);
  }
  for (int64_t i = n; i < full; ++i) buffer[i] = -INFINITY;
  return buffer;
}

// Where to build a tile that store_tile will write: the destination itself if it can be written as
// it is.
inline float* tile_target(void* p, DType t, int64_t n, float* buffer) {
  return t == DType::f32 && n == padded(n) ? static_cast<float*>(p) : buffer;
}

inline void store_tile(void* p, DType t, int64_t n, const float* tile) {
  if (tile == p) return;
  if (t == DType::f32) {
    memcpy(p, tile, static_cast<size_t>(n) * 4);
  } else if (t == DType::bf16) {
    uint16_t* h = static_cast<uint16_t*>(p);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) h[i] = float_to_bf16(tile[i]);
  } else {
    uint16_t* h = static_cast<uint16_t*>(p);
    int64_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(h + i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(tile + i), _MM_FROUND_TO_NEAREST_INT));
#endif
    for (; i < n; ++i) h[i] = float_to_half(tile[i]);
  }
}

}  // namespace KDK_NAMESPACE
