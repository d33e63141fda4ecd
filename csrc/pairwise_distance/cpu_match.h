// The match of two distance matrices, row by row: whole vectors of pairs, of which the diagonal and
// what is beyond a row's end have no weight.
#pragma once
#include "common/lanes.h"
#include "common/parallel.h"
#include "pairwise_distance/math.h"

namespace KDK_NAMESPACE {

struct Match {
  const float *student, *teacher, *mask;
  int64_t n;
  float beta, eps;
  bool normalize;
  int64_t reduction;
  double weight;  // of the loss
  bool add;       // the gradients to what is there
  int64_t threads;
};

constexpr int64_t kFields = 5;

// What a model's distances are multiplied by, and what comes back to each of them through the mean.
struct Scale {
  float inverse_mean = 1.f, rest = 0.f;  // in two parts: one rounding would be shared by all pairs
  float through_mean = 0.f;

  void set_mean(double mean) {
    const double inverse = mean <= 0.0 ? 0.0 : 1.0 / mean;  // of NaN NaN
    inverse_mean = static_cast<float>(inverse);
    rest = static_cast<float>(inverse - static_cast<double>(inverse_mean));
  }
};

KDK_INLINE Floats difference(Floats a, Scale of_a, Floats b, Scale of_b) {
  return apart(a * of_a.inverse_mean, b * of_b.inverse_mean) + apart(a * of_a.rest, b * of_b.rest);
}

// Rows of the match. Sums are floats over kRun pairs at a time, then doubles.
template <bool kSquared, bool kMasked>
class Matcher {
 public:
  explicit Matcher(const Match& m) : m_(m) {}

  // Sums over the pairs of row i: weight, weighted distances, weights where a distance is positive.
  KDK_ONE_COPY void means(int64_t i, double* out) const {
    sum<5>(i, out, [&](const Pairs& p, Floats* sums) {
      const Floats s = measure(p.student), t = measure(p.teacher), none = {};
      sums[0] += p.weight;
      sums[1] += p.weight * s;
      sums[2] += p.weight * t;
      sums[3] += s > 0.f ? p.weight : none;
      sums[4] += t > 0.f ? p.weight : none;
    });
  }

  // Sums over the pairs of row i: the loss over beta, and slope times either distance.
  KDK_ONE_COPY void values(int64_t i, Scale of_s, Scale of_t, double* out) const {
    const Floats inverse_beta = broadcast(1.f / m_.beta), one = broadcast(1.f), half = one * 0.5f;
    sum<3>(i, out, [&](const Pairs& p, Floats* sums) {
      const Floats s = measure(p.student), t = measure(p.teacher);
      const Floats x = difference(s, of_s, t, of_t) * inverse_beta, c = huber_slope(x, one);
      const Floats slope = p.weight * c;
      sums[0] += p.weight * huber_value(x, c, half);
      sums[1] += slope * s;
      sums[2] += slope * t;
    });
  }

  // The gradient to one model's squared distances; the loss is symmetric in the models.
  KDK_ONE_COPY void gradient(int64_t i, Scale own, Scale other, float scale, bool of_student,
                             float* grad) const {
    const Floats inverse_beta = broadcast(1.f / m_.beta), one = broadcast(1.f),
                 eps = broadcast(m_.eps);
    for (int64_t j = 0; j < m_.n; j += kFloats) {
      const Pairs p = pairs(i, j);
      const Floats d2 = of_student ? p.student : p.teacher, a = measure(d2),
                   b = measure(of_student ? p.teacher : p.student);
      const Floats c = huber_slope(difference(a, own, b, other) * inverse_beta, one);
      const Floats slope = c * own.inverse_mean - own.through_mean;
      const Floats g = scale * p.weight * slope * distance_slope(d2, a, eps, one, kSquared);
      float* const to = grad + i * m_.n + j;
      store_first(to, m_.n - j, m_.add ? load_first(to, m_.n - j) + g : g);
    }
  }

 private:
  static constexpr int64_t kRun = 512;

  struct Pairs {
    Floats student, teacher, weight;
  };
  // Those of sample i with kFloats others from j.
  KDK_INLINE Pairs pairs(int64_t i, int64_t j) const {
    const int64_t at = i * m_.n + j, left = m_.n - j;
    Pairs p{load_first(m_.student + at, left), load_first(m_.teacher + at, left),
            kMasked ? load_first(m_.mask + at, left) : broadcast(1.f)};
    if (left < kFloats || (i >= j && i < j + kFloats)) {
      const Ints lane = lane_index();
      const Ints counted = (lane < static_cast<int32_t>(left < kFloats ? left : kFloats)) &
                           (lane != static_cast<int32_t>(i >= j && i < j + kFloats ? i - j : -1));
      const Floats none = {};
      p.weight = counted ? p.weight : none;
    }
    return p;
  }
  KDK_INLINE Floats measure(Floats d2) const { return distance(d2, broadcast(m_.eps), kSquared); }

  // Adds to out[f] what add(pairs, sums) adds to the lanes of sums[f].
  template <int kCount, typename Add>
  KDK_INLINE void sum(int64_t i, double* out, const Add& add) const {
    for (int64_t run = 0; run < m_.n; run += kRun) {
      Floats sums[kCount] = {};
      const int64_t end = run + kRun < m_.n ? run + kRun : m_.n;
      for (int64_t j = run; j < end; j += kFloats) add(pairs(i, j), sums);
      for (int f = 0; f < kCount; ++f) out[f] += static_cast<double>(sum_of<float>(sums[f]));
    }
  }

  const Match& m_;
};

// Totals over rows, in their order whatever the number of threads.
template <typename Visit>
void sum_rows(const Match& m, double* rows, double* total, const Visit& visit) {
  parallel_for(m.n, m.n * m.n / 4, m.threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t f = 0; f < kFields; ++f) rows[i * kFields + f] = 0.0;
      visit(i, rows + i * kFields);
    }
  });
  for (int64_t f = 0; f < kFields; ++f) total[f] = 0.0;
  for (int64_t i = 0; i < m.n; ++i)
    for (int64_t f = 0; f < kFields; ++f) total[f] += rows[i * kFields + f];
}

// The loss, and where they are wanted its gradients by both models' squared distances.
template <bool kSquared, bool kMasked>
double match(const Match& m, float* ds, float* dt) {
  const Matcher<kSquared, kMasked> rows(m);
  Scratch memory;
  double* sums = reinterpret_cast<double*>(memory.floats(2 * kFields * m.n));
  double mean[kFields], total[kFields];
  sum_rows(m, sums, mean, [&](int64_t i, double* out) { rows.means(i, out); });
  const double kept = mean[0];
  const double mean_s = mean[3] > 0.0 ? mean[1] / mean[3] : 0.0,
               mean_t = mean[4] > 0.0 ? mean[2] / mean[4] : 0.0;
  Scale of_s, of_t;
  if (m.normalize) {
    of_s.set_mean(mean_s);
    of_t.set_mean(mean_t);
  }
  sum_rows(m, sums, total, [&](int64_t i, double* out) { rows.values(i, of_s, of_t, out); });
  const double pairs = static_cast<double>(m.n) * static_cast<double>(m.n);
  const double divisor = m.reduction == kAllPairs ? pairs : m.reduction == kKeptPairs ? kept : 1.0;
  const double inverse = divisor != 0.0 ? m.weight / divisor : 0.0;
  const double loss = total[0] * m.beta * inverse;
  if (!ds && !dt) return loss;
  if (m.normalize) {
    if (mean_s > 0.0)
      of_s.through_mean = static_cast<float>(total[1] / (mean[3] * mean_s * mean_s));
    if (mean_t > 0.0)
      of_t.through_mean = static_cast<float>(-total[2] / (mean[4] * mean_t * mean_t));
  }
  const float scale = static_cast<float>(inverse);
  parallel_for(m.n, m.n * m.n / 4, m.threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (ds) rows.gradient(i, of_s, of_t, scale, true, ds);
      if (dt) rows.gradient(i, of_t, of_s, scale, false, dt);
    }
  });
  return loss;
}

}  // namespace KDK_NAMESPACE
