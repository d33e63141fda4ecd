// Products of small and skinny matrices on a CPU: panels of 32 rows packed with their rows side by
// side, blocks of them in vector registers. What is added up in which order depends on the shapes
// alone, so the number of threads changes no bit, and no setting of torch's reaches it.
#pragma once
#include "common/convert.h"
#include "common/elementary.h"
#include "common/lanes.h"
#include "common/parallel.h"
#include "common/stream.h"

namespace KDK_NAMESPACE {

constexpr int64_t kPanel = 32;
constexpr int64_t kBlockRows = kRegisters == 32 ? 8 : 4;  // of a block in registers
constexpr int64_t kBlockColumns = 2 * kFloats;            // and its columns
constexpr int64_t kStrip = 8;                             // rows of a unit of work
constexpr int64_t kPacked = 32;                           // columns that are packed at a time
constexpr int64_t kDepth = 32;   // products summed in registers before they go to memory
constexpr int64_t kGroup = 512;  // and there before they go to the whole sum

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline float greatest(float a, float b) { return a > b ? a : b; }
inline int64_t up_to(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

#if defined(__AVX512F__) && (defined(__clang__) || __GNUC__ >= 11)  // that know avx512bf16
#define KDK_PAIRS
#endif

// Whether this processor multiplies pairs of bfloat16 and adds both products to a float.
inline bool multiplies_pairs() {
#ifdef KDK_PAIRS
  static const bool has = __builtin_cpu_supports("avx512bf16");
  return has;
#else
  return false;
#endif
}
// sum += x * factor, of both halves of every lane. (As asm, since no level of the build has it.)
KDK_INLINE void add_pairs(Floats& sum, Floats x, const float* factor) {
#ifdef KDK_PAIRS
  Floats own = sum;
  asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(own) : "v"(x), "m"(*factor));
  sum = own;
#else
  (void)sum, (void)x, (void)factor;
#endif
}
// The first or the second of a pair.
KDK_INLINE float unpaired(float pair, bool second) {
  const uint32_t bits = static_cast<uint32_t>(float_to_bits(pair));
  return bits_to_float(static_cast<int32_t>(second ? bits & 0xffff0000u : bits << 16));
}

// A matrix of any dtype and strides.
struct Matrix {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t rows = 0, columns = 0;
  int64_t row = 0, column = 0;  // strides

  explicit operator bool() const { return data != nullptr; }
  void* at(int64_t r, int64_t c) const { return advance(data, dtype, r * row + c * column); }
  Matrix transposed() const { return {data, dtype, columns, rows, column, row}; }

  // Whether neighbours of a row can be multiplied two at a time, as the four bytes that they are;
  // nothing but add_pairs and unpaired may compute with those. An odd row's last has a zero beside.
  bool has_pairs() const { return multiplies_pairs() && dtype == DType::bf16 && column == 1; }
  int64_t pairs() const { return (columns + 1) / 2; }
};

// A square block of as many rows as a vector has lanes.
KDK_INLINE void transpose_block(const float* in, int64_t in_row, float* out, int64_t out_row) {
  Floats v[kFloats];
  for (int i = 0; i < kFloats; ++i) v[i] = load(in + i * in_row);
  transpose(v);
  for (int i = 0; i < kFloats; ++i) store(out + i * out_row, v[i]);
}

// n consecutive elements as floats.
inline void to_floats(const void* p, DType t, int64_t n, float* out) {
  if (t == DType::f32) {
    memcpy(out, p, static_cast<size_t>(n) * 4);
    return;
  }
  const uint16_t* h = static_cast<const uint16_t*>(p);
  if (t == DType::bf16) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = bf16_to_float(h[i]);
    return;
  }
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(out + i,
                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(h + i))));
#endif
  for (; i < n; ++i) out[i] = half_to_float(h[i]);
}

// out[k * kPanel + r] = x[first + r][begin + k], zero where there is no such row; kPairs: the same
// of pairs. `out` has room for a whole number of vectors' columns; `buffer` for kPanel * kPacked
// floats.
template <bool kPairs = false>
KDK_ONE_COPY void pack(const Matrix& x, int64_t first, int64_t begin, int64_t count, float* out,
                       float* buffer) {
  const int64_t rows = least(kPanel, x.rows - first);
  if (!kPairs && (x.row == 1 || rows == 1)) {
    for (int64_t k = 0; k < count; ++k) {
      if (x.dtype == DType::f32 && rows == kPanel) {
        memcpy(out + k * kPanel, x.at(first, begin + k), kPanel * 4);  // no call: the size is known
        continue;
      }
      to_floats(x.at(first, begin + k), x.dtype, rows, out + k * kPanel);
      for (int64_t r = rows; r < kPanel; ++r) out[k * kPanel + r] = 0.f;
    }
    return;
  }
  constexpr int64_t kEach = kPairs ? 2 : 1;  // elements of x in a float
  const bool floats = kPairs ? x.row % 2 == 0 && reinterpret_cast<uintptr_t>(x.data) % 4 == 0
                             : x.dtype == DType::f32 && x.column == 1;
  for (int64_t k0 = 0; k0 < count; k0 += kPacked) {
    const int64_t n = least(kPacked, count - k0), full = up_to(n, kFloats);
    const int64_t column = (begin + k0) * kEach, there = least(n * kEach, x.columns - column);
    const bool in_place = floats && there == full * kEach && rows == kPanel;
    if (!in_place) {
      for (int64_t r = 0; r < kPanel; ++r) {
        float* row = buffer + r * kPacked;
        const int64_t used = r < rows ? n : 0;
        const void* from = x.at(first + (used ? r : 0), column);
        if (kPairs) {
          if (used) row[n - 1] = 0.f, memcpy(row, from, static_cast<size_t>(2 * there));
        } else if (used && x.column == 1) {
          to_floats(from, x.dtype, used, row);
        } else {
          for (int64_t k = 0; k < used; ++k) row[k] = load_one(from, x.dtype, k * x.column);
        }
        for (int64_t k = used; k < full; ++k) row[k] = 0.f;
      }
    }
    const float* from = in_place ? static_cast<const float*>(x.at(first, column)) : buffer;
    const int64_t row = in_place ? x.row / kEach : kPacked;
    for (int64_t k = 0; k < full; k += kFloats)
      for (int64_t r = 0; r < kPanel; r += kFloats) {
        // The hardware does not see that short pieces of many rows are followed by the next ones.
        if (in_place && column + (k + kPacked) * kEach < x.columns)
          for (int64_t i = 0; i < kFloats; ++i)
            __builtin_prefetch(from + (r + i) * row + k + kPacked);
        transpose_block(from + r * row + k, row, out + (k0 + k) * kPanel + r, kPanel);
      }
  }
}

// x[first + r][c] = panel[r * kPanel + c] for the panel's columns from `column`; past the caches
// where these are whole lines of a large result.
KDK_ONE_COPY inline void unpack(const float* panel, int64_t rows, const Matrix& x, int64_t first,
                                int64_t column, bool past_caches) {
  const int64_t columns = least(kPanel, x.columns - column);
  const bool lines = columns == kPanel && x.row * size_of(x.dtype) % 64 == 0 &&
                     reinterpret_cast<uintptr_t>(x.at(first, column)) % 64 == 0;
  if (past_caches && lines && x.column == 1) {
    for (int64_t r = 0; r < rows; ++r)
      stream_tile<kPanel>(x.at(first + r, column), x.dtype, kPanel, panel + r * kPanel);
    return;
  }
  if (x.column == 1) {
    for (int64_t r = 0; r < rows; ++r)
      store_tile(x.at(first + r, column), x.dtype, columns, panel + r * kPanel);
    return;
  }
  float line[kPanel];
  for (int64_t r0 = 0; r0 < rows; r0 += kPanel) {
    const int64_t n = least(kPanel, rows - r0);
    for (int64_t c = 0; c < columns; ++c) {
      for (int64_t r = 0; r < n; ++r) line[r] = panel[(r0 + r) * kPanel + c];
      if (x.row == 1) {
        store_tile(x.at(first + r0, column + c), x.dtype, n, line);
      } else {
        void* to = x.at(first + r0, column + c);
        for (int64_t r = 0; r < n; ++r) store_one(to, x.dtype, r * x.row, line[r]);
      }
    }
  }
}

// out[r][c] = (kFirst ? 0 : out[r][c]) + sum over k of a[k * a_row + r] * b[k * kPanel + c], for
// kStrip rows and kPanel columns; kPairs: of what these are pairs of.
template <bool kPairs, bool kFirst>
KDK_INLINE void multiply(const float* a, int64_t a_row, const float* b, int64_t depth, float* out,
                         int64_t out_row) {
  for (int64_t r0 = 0; r0 < kStrip; r0 += kBlockRows) {
    for (int64_t c0 = 0; c0 < kPanel; c0 += kBlockColumns) {
      Floats sums[kBlockRows][2] = {};
      const float* x = a + r0;
      const float* y = b + c0;
      for (int64_t k = 0; k < depth; ++k, x += a_row, y += kPanel) {
        const Floats y0 = load(y), y1 = load(y + kFloats);
#pragma GCC unroll 8
        for (int64_t r = 0; r < kBlockRows; ++r) {
          if constexpr (kPairs) {
            add_pairs(sums[r][0], y0, x + r);
            add_pairs(sums[r][1], y1, x + r);
          } else {
            const Floats own = broadcast(x[r]);
            sums[r][0] += own * y0;
            sums[r][1] += own * y1;
          }
        }
      }
      for (int64_t r = 0; r < kBlockRows; ++r) {
        float* o = out + (r0 + r) * out_row + c0;
        store(o, kFirst ? sums[r][0] : load(o) + sums[r][0]);
        store(o + kFloats, kFirst ? sums[r][1] : load(o + kFloats) + sums[r][1]);
      }
    }
  }
}
// The same, with at most kDepth products a sum in registers.
template <bool kPairs>
KDK_INLINE void multiply_some(const float* a, int64_t a_row, const float* b, int64_t depth,
                              float* out, int64_t out_row, bool first) {
  constexpr int64_t kSome = kPairs ? kDepth / 2 : kDepth;
  for (int64_t k = 0; k < depth || (first && k == 0); k += kSome) {
    const int64_t n = least(kSome, depth - k);
    if (first && k == 0)
      multiply<kPairs, true>(a, a_row, b, n, out, out_row);
    else
      multiply<kPairs, false>(a + k * a_row, a_row, b + k * kPanel, n, out, out_row);
  }
}
// And with at most kGroup a sum in memory before it goes to the whole one: a long sum that grows by
// kDepth products at a time is rounded hundreds of times at its full size.
template <bool kPairs = false>
KDK_ONE_COPY void multiply_deep(const float* a, int64_t a_row, const float* b, int64_t depth,
                                float* out, int64_t out_row, bool first) {
  constexpr int64_t kMany = kPairs ? kGroup / 2 : kGroup;
  if (depth <= kMany && first) return multiply_some<kPairs>(a, a_row, b, depth, out, out_row, true);
  for (int64_t k = 0; k < depth; k += kMany) {
    float part[kStrip * kPanel];
    multiply_some<kPairs>(a + k * a_row, a_row, b + k * kPanel, least(kMany, depth - k), part,
                          kPanel, true);
    for (int64_t r = 0; r < kStrip; ++r)
#pragma omp simd
      for (int64_t c = 0; c < kPanel; ++c) {
        float* const to = out + r * out_row + c;
        *to = (first && k == 0 ? 0.f : *to) + part[r * kPanel + c];
      }
  }
}

}  // namespace KDK_NAMESPACE
