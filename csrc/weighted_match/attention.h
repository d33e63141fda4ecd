// The distance between two models' normalised attention, and its gradient, image by image: sums of
// powers, a comparison as small as these, and the gradient while an image's maps are still in
// cache.
#pragma once
#include <cmath>

#include "weighted_match/powers.h"

namespace KDK_NAMESPACE {
namespace {

struct Comparison {
  double eps, scale;      // the least norm; of the loss
  bool add_eps, squared;  // eps added to the norm instead; (a - b)^2, else |a - b| of each image
};

// One model's attention of one image: a = A / |A| with A the sums over `share`.
struct Attention {
  float* sums;           // becomes the gradient by them
  double share;          // 1, or one over what the mean goes over
  double inverse = 0.0;  // one over the norm, times share; 0 where there is nothing to normalise
  double bend = 0.0;     // how much of the gradient along a the norm takes away

  void measure(double squares, const Comparison& by) {
    const double norm = std::sqrt(squares) * share;
    if (norm == 0) return;
    const double long_enough = !(norm <= by.eps);
    const double divisor = by.add_eps ? norm + by.eps : long_enough ? norm : by.eps;
    inverse = share / divisor;
    bend = by.add_eps ? divisor / norm : long_enough;
  }
};

KDK_ONE_COPY inline double squares_of(const float* x, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  return sum;
}

// The loss of one image; both sums become the gradients by them.
KDK_ONE_COPY inline double compare(Attention a, Attention b, int64_t n, const Comparison& by) {
  a.measure(squares_of(a.sums, n), by);
  b.measure(squares_of(b.sums, n), by);
  double squares = 0, along_a = 0, along_b = 0;
#pragma omp simd reduction(+ : squares, along_a, along_b)
  for (int64_t i = 0; i < n; ++i) {
    const double u = a.inverse * static_cast<double>(a.sums[i]),
                 v = b.inverse * static_cast<double>(b.sums[i]), d = u - v;
    squares += d * d, along_a += d * u, along_b += d * v;
  }
  const double apart = std::sqrt(squares);
  const double slope = by.scale * (by.squared ? 2.0 : apart == 0 ? 0.0 : 1.0 / apart);
  along_a *= a.bend, along_b *= b.bend;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const double u = a.inverse * static_cast<double>(a.sums[i]),
                 v = b.inverse * static_cast<double>(b.sums[i]), d = u - v;
    a.sums[i] = static_cast<float>(a.inverse * slope * (d - along_a * u));
    b.sums[i] = static_cast<float>(b.inverse * slope * (along_b * v - d));
  }
  return by.squared ? squares : apart;
}

// One model's part in the work.
struct Attended {
  Powers of;
  bool keep_rows;  // attention over the rows (summed over lanes), else over the lanes
  int64_t kept;
  Tensor gradient;  // (batch, kept): by the sums
  Output dx;        // or none
  PowerTile tile;
  PowerGradientTile slope;
  Grid grid;
  Sums<float> rows, lanes;

  Attended(const Tensor& x, const Tensor& by_sums, const Tensor& d, Exponent e, int64_t exponent,
           bool of_rows)
      : of{x, Tensor{}, Tensor{}, e},
        keep_rows(of_rows),
        kept(by_sums.shape[1]),
        gradient(by_sums),
        dx(d),
        tile(power_tile_of(exponent, of_rows, !of_rows, false)),
        slope(power_gradient_tile_of(exponent)),
        grid(x),
        rows(of_rows ? by_sums : Tensor{}, 1, x.shape[0], x.shape[1], grid.across),
        lanes(of_rows ? Tensor{} : by_sums, 1, x.shape[0], x.shape[2], grid.down) {}

  void sum(const Tile& t) { tile(of, t, rows, lanes); }
  void sum(int64_t b) {
    for (int64_t i = 0; i < grid.of_image; ++i) sum(grid[b * grid.of_image + i]);
  }
  Attention joined(int64_t b, bool mean) {
    rows.join(b), lanes.join(b);
    const int64_t over = keep_rows ? of.x.shape[2] : of.x.shape[1];
    return {gradient.as<float>() + b * kept, mean ? 1.0 / static_cast<double>(over) : 1.0};
  }
  void differentiate(const Tile& t) const {
    slope(of, t, keep_rows ? gradient : Tensor{}, keep_rows ? Tensor{} : gradient, dx);
  }
  void differentiate(int64_t b) const {
    for (int64_t i = 0; dx && i < grid.of_image; ++i) differentiate(grid[b * grid.of_image + i]);
  }
};

// The loss. Whole images are shared among threads where there are enough of them, else tiles; no
// bit depends on which. The student comes last, to be found in cache again.
inline double attention_loss(Attended& s, Attended& t, bool mean, const Comparison& by,
                             int64_t threads) {
  const int64_t batch = s.grid.batch;
  std::vector<double> each(static_cast<size_t>(batch));
  const int64_t work = s.of.x.numel() + t.of.x.numel();
  if (batch >= 4 * threads || threads == 1) {
    for_each(batch, work, threads, [&](int64_t b) {
      t.sum(b), s.sum(b);
      each[static_cast<size_t>(b)] = compare(s.joined(b, mean), t.joined(b, mean), s.kept, by);
      s.differentiate(b), t.differentiate(b);
    });
  } else {
    for (Attended* x : {&t, &s})
      x->grid.each(threads, [&](const Tile& tile, int64_t) { x->sum(tile); });
    for_each(batch, 4 * batch * s.kept, threads, [&](int64_t b) {
      each[static_cast<size_t>(b)] = compare(s.joined(b, mean), t.joined(b, mean), s.kept, by);
    });
    for (Attended* x : {&s, &t})
      if (x->dx) x->grid.each(threads, [&](const Tile& tile, int64_t) { x->differentiate(tile); });
  }
  double total = 0;
  for (double one : each) total += one;
  return total * by.scale;
}

}  // namespace
}  // namespace KDK_NAMESPACE
