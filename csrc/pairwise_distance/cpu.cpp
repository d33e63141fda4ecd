// Squared distances of all pairs, their gradient, and the match of two normalised distance
// matrices. See kdkernels/ops/pairwise_distance/README.md.
#include "common/convert.h"
#include "common/lanes.h"
#include "common/parallel.h"
#include "common/registry.h"
#include "pairwise_distance/math.h"

namespace KDK_NAMESPACE {
namespace {

constexpr int64_t kTile = 16;  // samples on a side of a tile of pairs
constexpr int64_t kRows = 4;   // samples on a side of a register block
constexpr int kColumns = kRegisters == 32 ? 4 : 2;
// Samples of up to so many elements are converted by every thread for itself: half of them from
// another core's cache would take longer.
constexpr int64_t kFewElements = 1 << 18;
constexpr int64_t kChunk = 1024;  // features summed in registers before they go to a double

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// ---- samples as contiguous rows of Real, padded with zeros to whole vectors and whole blocks ----

template <typename Real, typename Stored, typename Convert>
void convert_row(const Stored* x, int64_t n, Real* out, const Convert& convert) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<Real>(convert(x[i]));
}

template <typename Real>
class Samples {
 public:
  Samples(const Tensor& x, int64_t threads) : count_(x.shape[0]), width_(up_to(x.shape[1], 16)) {
    const int64_t features = x.shape[1], rows = up_to(count_, kTile);
    if constexpr (sizeof(Real) == 4) {
      if (x.dtype == DType::f32 && features == width_ && count_ == rows && x.stride[1] == 1) {
        data_ = x.as<float>();
        stride_ = x.stride[0];
        return;
      }
    }
    Real* own = reinterpret_cast<Real*>(
        memory_.floats(rows * width_ * static_cast<int64_t>(sizeof(Real) / 4)));
    parallel_for(rows, rows * width_, threads, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        Real* row = own + r * width_;
        const int64_t used = r < count_ ? features : 0;
        if (used) {
          const void* from = advance(x.data, x.dtype, r * x.stride[0]);
          if (x.dtype == DType::f32) {
            convert_row(static_cast<const float*>(from), used, row, [](float v) { return v; });
          } else if (x.dtype == DType::bf16) {
            convert_row(static_cast<const uint16_t*>(from), used, row, bf16_to_float);
          } else {
            convert_row(static_cast<const uint16_t*>(from), used, row, half_to_float);
          }
        }
        for (int64_t i = used; i < width_; ++i) row[i] = 0;
      }
    });
    data_ = own;
    stride_ = width_;
  }

  const Real* row(int64_t r) const { return data_ + r * stride_; }
  int64_t stride() const { return stride_; }
  int64_t width() const { return width_; }

 private:
  Scratch memory_;
  const Real* data_ = nullptr;
  int64_t count_, width_, stride_ = 0;
};

// ---- squared distances ----

// out[r][c] += sum over n features of (a_r - b_c)^2.
template <typename Real>
void distance_block(const Real* a, const Real* b, int64_t stride, int64_t n,
                    double (*out)[kColumns]) {
  constexpr int kStep = kLanesOf<Real>;
  Vector<Real> sums[kRows][kColumns] = {};
  for (int64_t i = 0; i < n; i += kStep) {
    Vector<Real> y[kColumns];
    for (int c = 0; c < kColumns; ++c) y[c] = in_register(load(b + c * stride + i));
    for (int r = 0; r < kRows; ++r) {
      const Vector<Real> x = in_register(load(a + r * stride + i));
      for (int c = 0; c < kColumns; ++c) {
        const Vector<Real> d = x - y[c];
        sums[r][c] += d * d;
      }
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kColumns; ++c) out[r][c] += static_cast<double>(sum_of<Real>(sums[r][c]));
}

// All pairs of a tile, each unordered pair once on the diagonal ones.
template <typename Real>
KDK_ONE_COPY void distance_tile(const Samples<Real>& x, int64_t i0, int64_t j0,
                                double (*out)[kTile]) {
  for (int64_t i = 0; i < kTile; i += kRows) {
    for (int64_t j = 0; j < kTile; j += kColumns) {
      if (i0 == j0 && j + kColumns <= i) continue;
      double block[kRows][kColumns] = {};
      for (int64_t d = 0; d < x.width(); d += kChunk)
        distance_block<Real>(x.row(i0 + i) + d, x.row(j0 + j) + d, x.stride(),
                             least(kChunk, x.width() - d), block);
      for (int r = 0; r < kRows; ++r)
        for (int c = 0; c < kColumns; ++c) out[i + r][j + c] = block[r][c];
    }
  }
}

void put(float* hi, float* lo, int64_t at, double d2) {
  hi[at] = static_cast<float>(d2);
  if (lo) lo[at] = static_cast<float>(d2 - static_cast<double>(hi[at]));
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
      const int64_t rows = least(kTile, n - i0), columns = least(kTile, n - j0);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = i0 == j0 ? r : 0; c < columns; ++c)
          put(hi, lo, (i0 + r) * n + j0 + c, tile[r][c]);
      for (int64_t c = 0; c < columns; ++c)
        for (int64_t r = 0; r < (i0 == j0 ? c : rows); ++r)
          put(hi, lo, (j0 + c) * n + i0 + r, tile[r][c]);
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

void pairwise_distance_forward(Tensor x, Tensor hi, Tensor lo, int64_t threads) {
  // Differences of neighbours lose nothing, so without lo float32 sums are as good as their result.
  if (lo) {
    squared_distances<double>(x, hi.as<float>(), lo.as<float>(), threads);
  } else {
    squared_distances<float>(x, hi.as<float>(), nullptr, threads);
  }
}

// ---- gradient: dx_i = sum_j 2 (w_ij + w_ji) (x_i - x_j) ----

constexpr int64_t kPartners = 64;  // summed in registers before they go to the row's sum

template <int kVectors>
void gradient_block(const float* x, const float* partners, int64_t stride, int64_t count,
                    const float* w, float* out, int64_t width) {
  Floats own[kRows][kVectors], sums[kRows][kVectors] = {};
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) own[r][v] = load(x + r * stride + v * kFloats);
  for (int64_t j = 0; j < count; ++j) {
    Floats y[kVectors];
    for (int v = 0; v < kVectors; ++v)
      y[v] = in_register(load(partners + j * stride + v * kFloats));
    for (int r = 0; r < kRows; ++r) {
      const float weight = w[j * kTile + r];
      for (int v = 0; v < kVectors; ++v) sums[r][v] += weight * (own[r][v] - y[v]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v)
      store(out + r * width + v * kFloats, load(out + r * width + v * kFloats) + sums[r][v]);
}

// The gradient of kTile samples from i0, in `sums`; `w` holds kPartners x kTile weights.
KDK_ONE_COPY void gradient_strip(const Samples<float>& x, const float* weights, int64_t n,
                                 int64_t i0, float* w, float* sums) {
  constexpr int kVectors = 2;
  const int64_t rows = least(kTile, n - i0), width = x.width();
  for (int64_t i = 0; i < kTile * width; ++i) sums[i] = 0.f;
  for (int64_t j0 = 0; j0 < n; j0 += kPartners) {
    const int64_t count = least(kPartners, n - j0);
    for (int64_t j = 0; j < count; ++j)
      for (int64_t r = 0; r < kTile; ++r)
        w[j * kTile + r] =
            r < rows ? 2.f * (weights[(j0 + j) * n + i0 + r] + weights[(i0 + r) * n + j0 + j])
                     : 0.f;
    for (int64_t d = 0; d < width;) {
      const bool wide = d + kVectors * kFloats <= width;
      for (int64_t r = 0; r < rows; r += kRows) {
        const float *own = x.row(i0 + r) + d, *partners = x.row(j0) + d;
        float* out = sums + r * width + d;
        if (wide)
          gradient_block<kVectors>(own, partners, x.stride(), count, w + r, out, width);
        else
          gradient_block<1>(own, partners, x.stride(), count, w + r, out, width);
      }
      d += (wide ? kVectors : 1) * kFloats;
    }
  }
}

void pairwise_distance_backward(Tensor x, Tensor weights, Tensor dx, int64_t threads) {
  const int64_t n = x.shape[0], features = x.shape[1];
  const Samples<float> samples(x, threads);
  const int64_t width = samples.width();
  parallel_for((n + kTile - 1) / kTile, n * n * width, threads, [&](int64_t begin, int64_t end) {
    Scratch memory;
    float* w = memory.floats(kPartners * kTile + kTile * width);
    float* sums = w + kPartners * kTile;
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t i0 = strip * kTile;
      gradient_strip(samples, weights.as<float>(), n, i0, w, sums);
      for (int64_t r = 0; r < least(kTile, n - i0); ++r)
        store_tile(advance(dx.data, dx.dtype, (i0 + r) * dx.stride[0]), dx.dtype, features,
                   sums + r * width);
    }
  });
}

// ---- the match of two distance matrices ----

struct Match {
  const float *student, *teacher, *mask;
  int64_t n;
  float beta, eps;
  int64_t threads;
};

constexpr int64_t kFields = 5;

// What a model's distances are multiplied by, and what comes back to each of them through the mean.
struct Scale {
  float inverse_mean = 1.f, rest = 0.f;  // in two parts: one rounding would be shared by all pairs
  float through_mean = 0.f;

  void set_mean(double mean) {
    const double inverse = mean > 0.0 ? 1.0 / mean : 0.0;
    inverse_mean = static_cast<float>(inverse);
    rest = static_cast<float>(inverse - static_cast<double>(inverse_mean));
  }
};

KDK_INLINE float difference(float a, Scale of_a, float b, Scale of_b) {
  return (a * of_a.inverse_mean - b * of_b.inverse_mean) + (a * of_a.rest - b * of_b.rest);
}

// Rows of the match. Sums are floats over 512 pairs at a time, then doubles.
template <bool kSquared, bool kMasked>
class Matcher {
 public:
  explicit Matcher(const Match& m) : m_(m) {}

  // Sums over the pairs of row i: weight, weighted distances, weights where a distance is positive.
  KDK_ONE_COPY void means(int64_t i, double* out) const {
    const Row x = row(i);
    for_others(i, [&](int64_t begin, int64_t end) {
      float weight = 0.f, student = 0.f, teacher = 0.f, positive_s = 0.f, positive_t = 0.f;
#pragma omp simd reduction(+ : weight, student, teacher, positive_s, positive_t)
      for (int64_t j = begin; j < end; ++j) {
        const float w = kMasked ? x.mask[j] : 1.f, s = measure(x.student[j]),
                    t = measure(x.teacher[j]);
        weight += w;
        student += w * s;
        teacher += w * t;
        positive_s += s > 0.f ? w : 0.f;
        positive_t += t > 0.f ? w : 0.f;
      }
      out[0] += weight, out[1] += student, out[2] += teacher, out[3] += positive_s,
          out[4] += positive_t;
    });
  }

  // Sums over the pairs of row i: the loss over beta, and slope times either distance.
  KDK_ONE_COPY void values(int64_t i, Scale of_s, Scale of_t, double* out) const {
    const Row r = row(i);
    const float inverse_beta = 1.f / m_.beta;
    for_others(i, [&](int64_t begin, int64_t end) {
      float value = 0.f, student = 0.f, teacher = 0.f;
#pragma omp simd reduction(+ : value, student, teacher)
      for (int64_t j = begin; j < end; ++j) {
        const float w = kMasked ? r.mask[j] : 1.f, s = measure(r.student[j]),
                    t = measure(r.teacher[j]);
        const float x = difference(s, of_s, t, of_t) * inverse_beta, c = huber_slope(x, 1.f);
        value += w * huber_value(x, c, 0.5f);
        student += w * c * s;
        teacher += w * c * t;
      }
      out[0] += value, out[1] += student, out[2] += teacher;
    });
  }

  // The gradient to one model's squared distances; the loss is symmetric in the models.
  KDK_ONE_COPY void gradient(int64_t i, Scale own, Scale other, float scale, bool of_student,
                             float* grad) const {
    const Row x = row(i);
    const float* const mine = of_student ? x.student : x.teacher;
    const float* const theirs = of_student ? x.teacher : x.student;
    const float inverse_beta = 1.f / m_.beta, eps = m_.eps;
    float* const out = grad + i * m_.n;
    for_others(i, [&](int64_t begin, int64_t end) {
#pragma omp simd
      for (int64_t j = begin; j < end; ++j) {
        const float w = kMasked ? x.mask[j] : 1.f, a = measure(mine[j]), b = measure(theirs[j]);
        const float c = huber_slope(difference(a, own, b, other) * inverse_beta, 1.f);
        const float slope = c * own.inverse_mean - own.through_mean;
        out[j] = scale * w * slope * distance_slope(mine[j], a, eps, kSquared);
      }
    });
    out[i] = 0.f;
  }

 private:
  struct Row {
    const float *student, *teacher, *mask;
  };
  Row row(int64_t i) const {
    return {m_.student + i * m_.n, m_.teacher + i * m_.n, kMasked ? m_.mask + i * m_.n : nullptr};
  }
  float measure(float d2) const { return distance(d2, m_.eps, kSquared); }

  template <typename Body>
  void for_others(int64_t i, const Body& body) const {
    constexpr int64_t kPairs = 512;
    for (int64_t j = 0; j < i; j += kPairs) body(j, least(i, j + kPairs));
    for (int64_t j = i + 1; j < m_.n; j += kPairs) body(j, least(m_.n, j + kPairs));
  }

  const Match& m_;
};

// Totals over rows, in their order whatever the number of threads.
template <typename Visit>
void sum_rows(const Match& m, double* rows, double* total, const Visit& visit) {
  parallel_for(m.n, m.n * m.n, m.threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t f = 0; f < kFields; ++f) rows[i * kFields + f] = 0.0;
      visit(i, rows + i * kFields);
    }
  });
  for (int64_t f = 0; f < kFields; ++f) total[f] = 0.0;
  for (int64_t i = 0; i < m.n; ++i)
    for (int64_t f = 0; f < kFields; ++f) total[f] += rows[i * kFields + f];
}

template <bool kSquared, bool kMasked>
void match(const Match& m, bool normalize, int64_t reduction, float* loss, float* ds, float* dt) {
  const Matcher<kSquared, kMasked> rows(m);
  Scratch memory;
  double* sums = reinterpret_cast<double*>(memory.floats(2 * kFields * m.n));
  double mean[kFields], total[kFields];
  sum_rows(m, sums, mean, [&](int64_t i, double* out) { rows.means(i, out); });
  const double kept = mean[0];
  const double mean_s = mean[3] > 0.0 ? mean[1] / mean[3] : 0.0,
               mean_t = mean[4] > 0.0 ? mean[2] / mean[4] : 0.0;
  Scale of_s, of_t;
  if (normalize) {
    of_s.set_mean(mean_s);
    of_t.set_mean(mean_t);
  }
  sum_rows(m, sums, total, [&](int64_t i, double* out) { rows.values(i, of_s, of_t, out); });
  const double pairs = static_cast<double>(m.n) * static_cast<double>(m.n);
  const double divisor = reduction == kAllPairs ? pairs : reduction == kKeptPairs ? kept : 1.0;
  const double inverse = divisor != 0.0 ? 1.0 / divisor : 0.0;
  *loss = static_cast<float>(total[0] * m.beta * inverse);
  if (!ds && !dt) return;
  if (normalize) {
    if (mean_s > 0.0)
      of_s.through_mean = static_cast<float>(total[1] / (mean[3] * mean_s * mean_s));
    if (mean_t > 0.0)
      of_t.through_mean = static_cast<float>(-total[2] / (mean[4] * mean_t * mean_t));
  }
  const float scale = static_cast<float>(inverse);
  parallel_for(m.n, m.n * m.n, m.threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (ds) rows.gradient(i, of_s, of_t, scale, true, ds);
      if (dt) rows.gradient(i, of_t, of_s, scale, false, dt);
    }
  });
}

void distance_match(Tensor student, Tensor teacher, Tensor mask, Tensor scalars, Tensor loss,
                    Tensor ds, Tensor dt, bool squared, bool normalize, int64_t reduction,
                    int64_t threads) {
  const float* given = scalars.as<float>();
  const Match m{student.as<float>(), teacher.as<float>(), mask.as<float>(), student.shape[0],
                given[kBeta],        given[kEps],         threads};
  const auto run = squared ? (mask ? match<true, true> : match<true, false>)
                           : (mask ? match<false, true> : match<false, false>);
  run(m, normalize, reduction, loss.as<float>(), ds.as<float>(), dt.as<float>());
}

KDK_EXPORT(pairwise_distance_forward)
KDK_EXPORT(pairwise_distance_backward)
KDK_EXPORT(distance_match)

}  // namespace
}  // namespace KDK_NAMESPACE
