// A stand-in for CUDA's header of this name: __half as a rounding of float.
#pragma once
#include "cuda_runtime.h"

namespace cuda_on_cpu {

inline unsigned short half_from_float(float x) {  // to nearest, ties to even
  const unsigned bits = __float_as_uint(x), sign = bits >> 16 & 0x8000u, mag = bits & 0x7fffffffu;
  if (mag > 0x7f800000u) return 0x7fff;  // NaN, as CUDA makes it
  if (mag >= 0x477ff000u) return static_cast<unsigned short>(sign | 0x7c00u);  // >= 65520
  if (mag < 0x38800000u) {  // subnormal: the sum's rounding is the one wanted
    const float sum = __uint_as_float(mag) + 0.5f;  // spacing 2^-24 in [.5, 1)
    return static_cast<unsigned short>(sign | (__float_as_uint(sum) - 0x3f000000u));
  }
  const unsigned rounded = mag + 0xfffu + (mag >> 13 & 1u);
  return static_cast<unsigned short>(sign | ((rounded - 0x38000000u) >> 13));
}
inline float float_from_half(unsigned short h) {
  const unsigned sign = (h & 0x8000u) << 16, exp = h >> 10 & 31u, man = h & 0x3ffu;
  if (exp == 31) return __uint_as_float(sign | 0x7f800000u | man << 13);
  if (exp == 0) {
    const float v = static_cast<float>(man) * 0x1p-24f;
    return sign ? -v : v;
  }
  return __uint_as_float(sign | (exp + 112u) << 23 | man << 13);
}

}  // namespace cuda_on_cpu

#define KDK_SMALL_FLOAT(type, pair, to_bits, to_float)                        \
  struct alignas(2) type {                                                    \
    unsigned short __x;                                                       \
    type() = default;                                                         \
    type(float v) : __x(to_bits(v)) {}                                        \
    type(double v) : __x(to_bits(static_cast<float>(v))) {}                   \
    type(int v) : __x(to_bits(static_cast<float>(v))) {}                      \
    operator float() const { return to_float(__x); }                          \
  };                                                                          \
  struct alignas(4) pair {                                                    \
    type x, y;                                                                \
  };                                                                          \
  inline type operator+(type a, type b) { return type(float(a) + float(b)); } \
  inline type operator-(type a, type b) { return type(float(a) - float(b)); } \
  inline type operator*(type a, type b) { return type(float(a) * float(b)); } \
  inline type operator/(type a, type b) { return type(float(a) / float(b)); } \
  inline type operator-(type a) { return type(-float(a)); }                   \
  inline bool operator<(type a, type b) { return float(a) < float(b); }       \
  inline bool operator>(type a, type b) { return float(a) > float(b); }       \
  inline bool operator==(type a, type b) { return float(a) == float(b); }

KDK_SMALL_FLOAT(__half, __half2, ::cuda_on_cpu::half_from_float, ::cuda_on_cpu::float_from_half)
using half = __half;
using half2 = __half2;

inline __half __float2half(float x) { return __half(x); }
inline __half __float2half_rn(float x) { return __half(x); }
inline float __half2float(__half x) { return x; }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline __half2 __float22half2_rn(float2 v) { return {__half(v.x), __half(v.y)}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
inline float __low2float(__half2 v) { return v.x; }
inline float __high2float(__half2 v) { return v.y; }
inline unsigned short __half_as_ushort(__half x) { return x.__x; }
inline __half __ushort_as_half(unsigned short x) { return kdk_bits<__half>(x); }
