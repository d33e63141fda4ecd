// Squared distances of all pairs of samples, and the gradient that comes back through them. See
// kdkernels/ops/pairwise_distance/README.md.
#pragma once
#include "common/convert.h"
#include "common/lanes.h"
#include "common/parallel.h"

namespace KDK_NAMESPACE {

constexpr int64_t kTile = 16;  // samples on a side of a tile of pairs
constexpr int kRows = 4;       // samples on a side of a register block
constexpr int kColumns = kRegisters == 32 ? 4 : 2;
constexpr int kBlock = kRows * kColumns;
// Samples of up to so many elements are packed by every thread for itself: half of them from
// another core's cache would take longer.
constexpr int64_t kFewElements = 1 << 17;
constexpr int64_t kChunk = 1024;  // features summed in registers before they go to a double

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t up_to(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// ---- samples as panels: some features of all samples, those of a sample side by side ----

template <typename Real, typename Stored, typename Convert>
KDK_INLINE void convert_some(const Stored* x, int64_t n, int64_t full, Real* out,
                             const Convert& convert) {
  if (n == full) {  // its size is known then
#pragma omp simd
    for (int64_t i = 0; i < full; ++i) out[i] = static_cast<Real>(convert(x[i]));
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<Real>(convert(x[i]));
    for (int64_t i = n; i < full; ++i) out[i] = 0;
  }
}

// Rows and features beyond the last are zeros. Neighbours in a panel are neighbours in memory, and
// the same rows of several panels lie in different sets of a cache, which long rows would not.
template <typename Real>
class Samples {
 public:
  static constexpr int64_t kWidth = 128 / sizeof(Real);  // features of a panel

  Samples(const Tensor& x, int64_t threads)
      : x_(x),
        rows_(up_to(x.shape[0], kTile) + 4),
        pitch_(rows_ * kWidth),
        panels_((x.shape[1] + kWidth - 1) / kWidth) {
    data_ = reinterpret_cast<Real*>(
        memory_.floats(panels_ * pitch_ * static_cast<int64_t>(sizeof(Real) / 4)));
    parallel_for(rows_, rows_ * panels_ * kWidth, threads, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) pack(r);
    });
  }

  const Real* row(int64_t panel, int64_t r) const { return data_ + panel * pitch_ + r * kWidth; }
  int64_t pitch() const { return pitch_; }
  int64_t panels() const { return panels_; }

 private:
  KDK_ONE_COPY void pack(int64_t r) {
    const int64_t features = r < x_.shape[0] ? x_.shape[1] : 0;
    const void* from = features ? advance(x_.data, x_.dtype, r * x_.stride[0]) : nullptr;
    for (int64_t p = 0; p < panels_; ++p) {
      const int64_t first = p * kWidth, left = features - first,
                    used = left < 0 ? 0 : least(kWidth, left);
      Real* out = data_ + p * pitch_ + r * kWidth;
      if (x_.dtype == DType::f32) {
        convert_some(static_cast<const float*>(from) + first, used, kWidth, out,
                     [](float v) { return v; });
      } else if (x_.dtype == DType::bf16) {
        convert_some(static_cast<const uint16_t*>(from) + first, used, kWidth, out, bf16_to_float);
      } else {
        convert_some(static_cast<const uint16_t*>(from) + first, used, kWidth, out, half_to_float);
      }
    }
  }

  const Tensor& x_;
  Scratch memory_;
  int64_t rows_, pitch_, panels_;
  Real* data_ = nullptr;
};

// ---- squared distances ----

// out[r * kColumns + c] += sum over the features of some panels of (a_r - b_c)^2.
template <typename Real>
KDK_INLINE void distance_block(const Real* a, const Real* b, int64_t pitch, int64_t panels,
                               double* out) {
  constexpr int kStep = kLanesOf<Real>, kWidth = Samples<Real>::kWidth;
  Vector<Real> sums[kBlock] = {};
  for (int64_t p = 0; p < panels; ++p, a += pitch, b += pitch) {
    for (int c = 0; c < kColumns; ++c) {  // a line each, two of a sample
      __builtin_prefetch(b + pitch + c * kWidth);
      __builtin_prefetch(b + pitch + c * kWidth + kWidth / 2);
    }
    for (int i = 0; i < kWidth; i += kStep) {
      Vector<Real> y[kColumns];
      for (int c = 0; c < kColumns; ++c) y[c] = in_register(load(b + c * kWidth + i));
      for (int r = 0; r < kRows; ++r) {
        const Vector<Real> x = in_register(load(a + r * kWidth + i));
        for (int c = 0; c < kColumns; ++c) {
          const Vector<Real> d = x - y[c];
          sums[r * kColumns + c] += d * d;
        }
      }
    }
  }
  for (int i = 0; i < kBlock; i += kStep) {
    const Vector<Real> some = sums_of<Real>(sums + i);
    for (int l = 0; l < kStep; ++l) out[i + l] += static_cast<double>(some[l]);
  }
}

// All pairs of a tile, each unordered pair once on the diagonal ones.
template <typename Real>
KDK_ONE_COPY void distance_tile(const Samples<Real>& x, int64_t i0, int64_t j0,
                                double (*out)[kTile]) {
  constexpr int64_t kPanels = kChunk / Samples<Real>::kWidth;
  for (int64_t i = 0; i < kTile; i += kRows) {
    for (int64_t j = 0; j < kTile; j += kColumns) {
      if (i0 == j0 && j + kColumns <= i) continue;
      double block[kBlock] = {};
      for (int64_t p = 0; p < x.panels(); p += kPanels)
        distance_block<Real>(x.row(p, i0 + i), x.row(p, j0 + j), x.pitch(),
                             least(kPanels, x.panels() - p), block);
      for (int r = 0; r < kRows; ++r)
        for (int c = 0; c < kColumns; ++c) out[i + r][j + c] = block[r * kColumns + c];
    }
  }
  if (i0 == j0)
    for (int64_t i = 0; i < kTile; ++i)
      for (int64_t j = 0; j < i; ++j) out[i][j] = out[j][i];
}

// A tile of a matrix of n x n floats, and its mirror image.
inline void put(float* matrix, int64_t n, int64_t i0, int64_t j0, const float (*tile)[kTile]) {
  const int64_t rows = least(kTile, n - i0), columns = least(kTile, n - j0);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < kTile; c += kFloats)
      store_first(matrix + (i0 + r) * n + j0 + c, columns - c, load(tile[r] + c));
  if (i0 == j0) return;
  for (int64_t r = 0; r < kTile; r += kFloats)
    for (int64_t c = 0; c < columns; c += kFloats) {
      Floats v[kFloats];
      for (int i = 0; i < kFloats; ++i) v[i] = load(tile[r + i] + c);
      transpose(v);
      for (int64_t i = 0; i < least(kFloats, columns - c); ++i)
        store_first(matrix + (j0 + c + i) * n + i0 + r, rows - r, v[i]);
    }
}

KDK_ONE_COPY inline void put(float* hi, float* lo, int64_t n, int64_t i0, int64_t j0,
                             const double (*tile)[kTile]) {
  float part[kTile][kTile];
  for (int64_t r = 0; r < kTile; ++r)
#pragma omp simd
    for (int64_t c = 0; c < kTile; ++c) part[r][c] = static_cast<float>(tile[r][c]);
  put(hi, n, i0, j0, part);
  if (!lo) return;
  for (int64_t r = 0; r < kTile; ++r)
#pragma omp simd
    for (int64_t c = 0; c < kTile; ++c)
      part[r][c] = static_cast<float>(tile[r][c] - static_cast<double>(part[r][c]));
  put(lo, n, i0, j0, part);
}

template <typename Real>
void squared_distances(const Tensor& x, float* hi, float* lo, int64_t threads) {
  const int64_t n = x.shape[0], tiles = (n + kTile - 1) / kTile;
  // The upper triangle of tiles, row by row.
  const auto some = [&](const Samples<Real>& samples, int64_t begin, int64_t end) {
    int64_t row = 0, first = 0;
    while (first + tiles - row <= begin && begin < end) first += tiles - row++;
    for (int64_t unit = begin; unit < end; ++unit) {
      if (unit - first == tiles - row) first = unit, ++row;
      const int64_t i0 = row * kTile, j0 = (row + unit - first) * kTile;
      double tile[kTile][kTile];
      distance_tile(samples, i0, j0, tile);
      put(hi, lo, n, i0, j0, tile);
    }
  };
  const int64_t units = tiles * (tiles + 1) / 2, work = n * n * x.shape[1] / 2;
  if (n * x.shape[1] <= kFewElements) {
    parallel_for(units, work, threads,
                 [&](int64_t begin, int64_t end) { some(Samples<Real>(x, 1), begin, end); });
  } else {
    const Samples<Real> samples(x, threads);
    parallel_for(units, work, threads,
                 [&](int64_t begin, int64_t end) { some(samples, begin, end); });
  }
}

// With lo the sums are in float64, and kept as two numbers. Differences of neighbours lose nothing,
// so without it float32 sums are as good as their result.
inline void squared_distances(const Tensor& x, float* hi, float* lo, int64_t threads) {
  (lo ? squared_distances<double> : squared_distances<float>)(x, hi, lo, threads);
}

// ---- gradient: dx_i = sum_j 2 (w_ij + w_ji) (x_i - x_j) ----

constexpr int64_t kPartners = 128;  // summed in registers before they go to the row's sum
constexpr int kVectors = 2;

// sums[r] += sum over `count` partners of w[j][r] (x_r - partner_j), for kRows samples and kVectors
// vectors of features.
KDK_INLINE void gradient_block(const float* x, const float* partners, int64_t count, const float* w,
                               float* out) {
  constexpr int64_t kWidth = Samples<float>::kWidth;
  Floats own[kRows][kVectors], sums[kRows][kVectors] = {};
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) own[r][v] = load(x + r * kWidth + v * kFloats);
  for (int64_t j = 0; j < count; ++j) {
    Floats y[kVectors];
    for (int v = 0; v < kVectors; ++v)
      y[v] = in_register(load(partners + j * kWidth + v * kFloats));
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v)
        add_product(sums[r][v], own[r][v] - y[v], w + j * kTile + r);
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) {
      float* const to = out + r * kWidth + v * kFloats;
      store(to, load(to) + sums[r][v]);
    }
}

// w[j * kTile + r] = 2 (w_ij + w_ji) of the samples i0 + r and kPartners others from j0; zeros
// where there is no such sample.
KDK_INLINE void pair_weights(const float* weights, int64_t n, int64_t i0, int64_t j0, float* w) {
  for (int64_t r = 0; r < kTile; r += kFloats) {
    const int64_t rows = n - i0 - r;
    for (int64_t j = 0; j < kPartners; j += kFloats) {
      Floats v[kFloats];
      for (int i = 0; i < kFloats; ++i)
        v[i] = i < rows ? load_first(weights + (i0 + r + i) * n + j0 + j, n - j0 - j) : Floats{};
      transpose(v);
      for (int i = 0; i < kFloats; ++i) {
        const bool there = j0 + j + i < n;
        const Floats other =
            there ? load_first(weights + (j0 + j + i) * n + i0 + r, rows) : Floats{};
        store(w + (j + i) * kTile + r, 2.f * (v[i] + other));
      }
    }
  }
}

// The gradient of kTile samples from i0, in `sums`: panels of kTile rows. `w` holds kPartners x
// kTile numbers.
KDK_ONE_COPY inline void gradient_strip(const Samples<float>& x, const float* weights, int64_t n,
                                        int64_t i0, float* w, float* sums) {
  constexpr int64_t kWidth = Samples<float>::kWidth;
  const int64_t rows = least(kTile, n - i0);
  memset(sums, 0, static_cast<size_t>(x.panels() * kTile * kWidth) * 4);
  for (int64_t j0 = 0; j0 < n; j0 += kPartners) {
    pair_weights(weights, n, i0, j0, w);
    for (int64_t p = 0; p < x.panels(); ++p)
      for (int64_t d = 0; d < kWidth; d += kVectors * kFloats)
        for (int64_t r = 0; r < rows; r += kRows)
          gradient_block(x.row(p, i0 + r) + d, x.row(p, j0) + d, least(kPartners, n - j0), w + r,
                         sums + (p * kTile + r) * kWidth + d);
  }
}

inline void distance_gradient(const Tensor& x, const float* weights, const Tensor& dx,
                              int64_t threads) {
  constexpr int64_t kWidth = Samples<float>::kWidth;
  const int64_t n = x.shape[0], features = x.shape[1];
  const Samples<float> samples(x, threads);
  const int64_t size = samples.panels() * kTile * kWidth;
  const auto strips = [&](int64_t begin, int64_t end) {
    Scratch memory;
    float* const w = memory.floats(kPartners * kTile + size);
    float* const sums = w + kPartners * kTile;
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t i0 = strip * kTile;
      gradient_strip(samples, weights, n, i0, w, sums);
      for (int64_t r = 0; r < least(kTile, n - i0); ++r)
        for (int64_t f = 0; f < features; f += kWidth)
          store_tile(advance(dx.data, dx.dtype, (i0 + r) * dx.stride[0] + f), dx.dtype,
                     least(kWidth, features - f), sums + (f / kWidth * kTile + r) * kWidth);
    }
  };
  parallel_for((n + kTile - 1) / kTile, n * n * features, threads, strips);
}

}  // namespace KDK_NAMESPACE
