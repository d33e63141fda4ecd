// The vector types of CUDA, with its alignments, and dim3.
#pragma once
#include <cstdint>

#define KDK_VECTORS(T, name, a1, a2, a3, a4)                         \
  struct alignas(a1) name##1 { T x; };                               \
  struct alignas(a2) name##2 { T x, y; };                            \
  struct alignas(a3) name##3 { T x, y, z; };                         \
  struct alignas(a4) name##4 { T x, y, z, w; };                      \
  inline name##1 make_##name##1(T x) { return {x}; }                 \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }         \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

KDK_VECTORS(signed char, char, 1, 2, 1, 4)
KDK_VECTORS(unsigned char, uchar, 1, 2, 1, 4)
KDK_VECTORS(short, short, 2, 4, 2, 8)
KDK_VECTORS(unsigned short, ushort, 2, 4, 2, 8)
KDK_VECTORS(int, int, 4, 8, 4, 16)
KDK_VECTORS(unsigned, uint, 4, 8, 4, 16)
KDK_VECTORS(long long, longlong, 8, 16, 8, 16)
KDK_VECTORS(unsigned long long, ulonglong, 8, 16, 8, 16)
KDK_VECTORS(float, float, 4, 8, 4, 16)
KDK_VECTORS(double, double, 8, 16, 8, 16)
#undef KDK_VECTORS

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};
