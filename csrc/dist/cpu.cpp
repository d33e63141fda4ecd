// DIST on the CPU: rows, then columns, then (in the backward) rows again, each shared among
// threads.
//
// Columns are taken in tiles a few cache lines wide, down all rows; where there are few tiles the
// rows are cut too, in a way that does not depend on the number of threads. See
// kdkernels/ops/dist/README.md.
#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/convert.h"
#include "common/parallel.h"
#include "common/registry.h"
#include "common/softmax.h"
#include "dist/math.h"

namespace KDK_NAMESPACE {
namespace {

constexpr int64_t kTile = 1024;     // classes of a row
constexpr int64_t kColumns = 128;   // classes of a column tile
constexpr int64_t kBlockRows = 64;  // rows that are added up in float32
constexpr int64_t kKeptFloats =
    128 * 1024;  // a column tile's probabilities are kept up to this many

enum RowStat { kRefS, kInverseS, kRefT, kInverseT, kRowA, kRowBs, kRowBt, kRowRho, kRowStats };
// A column's mean is kept as a row's probability and what is missing from it, so that deviations
// are as exact as their own size: a rounded mean would shift a whole column, and nothing cancels
// that.
enum ColumnStat { kShiftS, kDeltaS, kShiftT, kDeltaT, kColA, kColBs, kColBt, kColumnStats };
enum Sum { kTotalWeight, kValidRows, kRowTerm, kColumnTerm };
enum ScalarPlace { kT, kBeta, kGamma, kEps };

struct Job {
  Tensor s, t;
  const int64_t* labels;
  const float *weight, *scalars;
  float *rows, *columns;  // statistics
  bool clamp;
  int64_t ignore_index, classes, inner, count, threads;

  RunningSoftmax softmax() const { return RunningSoftmax(1.0 / scalars[kT]); }
  Pair factor() const { return split_factor(softmax().c); }
  float row_weight(int64_t r) const {
    if (labels && labels[r] == ignore_index) return 0.f;
    return weight ? weight[r] : 1.f;
  }
  float* row(int64_t r) const { return rows + r * kRowStats; }
  float* column(ColumnStat which) const { return columns + which * classes; }
};

int64_t offset(const Tensor& x, int64_t r, int64_t inner) {
  return r / inner * x.stride[0] + r % inner * x.stride[2];
}

// n scores of row r from class `start`, padded with -inf to whole vectors.
const float* scores(const Tensor& x, int64_t r, int64_t inner, int64_t start, int64_t n,
                    float* buffer) {
  const int64_t at = offset(x, r, inner) + start * x.stride[1];
  if (x.stride[1] == 1) return load_tile(advance(x.data, x.dtype, at), x.dtype, n, buffer);
  for (int64_t v = 0; v < n; ++v) buffer[v] = load_one(x.data, x.dtype, at + v * x.stride[1]);
  for (int64_t v = n; v < padded(n); ++v) buffer[v] = -INFINITY;
  return buffer;
}

// The tile that follows the one at `start`, in this row or the next.
Ahead after(const Tensor& x, int64_t r, int64_t inner, int64_t start) {
  if (x.stride[1] != 1 || !exceeds_caches(x)) return {};
  return {advance(x.data, x.dtype, offset(x, r, inner) + start + kTile), x.dtype};
}

void probabilities(const float* x, int64_t n, float ref, Pair c, float inverse_z, float* p) {
#pragma omp simd
  for (int64_t v = 0; v < n; ++v) {
    const float d = x[v] - ref;
    p[v] = vexp2_nonpositive(d * c.hi + d * c.lo) * inverse_z;
  }
}

Scratch& thread_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

// ---- rows: log-sum-exp, and the moments around 1 / V, which is every row's mean ----

struct Side {
  RunningSoftmax run;
  float *e, *top;

  void fill(const Job& job, const Tensor& x, int64_t r, float* buffer) {
    run = job.softmax();
    for (int64_t k = 0, start = 0; start < job.classes; ++k, start += kTile) {
      const int64_t n = std::min(kTile, job.classes - start), m = padded(n);
      const float* tile = scores(x, r, job.inner, start, n, buffer);
      run.raise(largest_of(tile, m));
      run.z += exponentials_of(tile, m, run, e + start, after(x, r, job.inner, start));
      top[k] = run.top;
    }
  }
};

void row_moments(const Job& job, int64_t r, Side& s, Side& t, float* buffer) {
  s.fill(job, job.s, r, buffer);
  t.fill(job, job.t, r, buffer);
  const float mean = static_cast<float>(1.0 / static_cast<double>(job.classes));
  double st = 0.0, ss = 0.0, tt = 0.0;
  for (int64_t k = 0, start = 0; start < job.classes; ++k, start += kTile) {
    const int64_t n = std::min(kTile, job.classes - start);
    const float fs = s.run.to_probability(s.top[k]), ft = t.run.to_probability(t.top[k]);
    const float *es = s.e + start, *et = t.e + start;
    float xy = 0.f, xx = 0.f, yy = 0.f;
#pragma omp simd reduction(+ : xy, xx, yy)
    for (int64_t v = 0; v < n; ++v) {
      const float x = es[v] * fs - mean, y = et[v] * ft - mean;
      xy += x * y;
      xx += x * x;
      yy += y * y;
    }
    st += xy, ss += xx, tt += yy;
  }
  const Pearson p = pearson(static_cast<float>(st), static_cast<float>(ss), static_cast<float>(tt),
                            job.scalars[kEps], job.clamp);
  const float stats[] = {s.run.ref, static_cast<float>(1.0 / s.run.z),
                         t.run.ref, static_cast<float>(1.0 / t.run.z),
                         p.a,       p.bx,
                         p.by,      p.rho};
  std::copy(stats, stats + kRowStats, job.row(r));
}

void all_rows(const Job& job) {
  parallel_for(
      job.count, 2 * job.count * job.classes, job.threads, [&](int64_t begin, int64_t end) {
        const int64_t full = padded(job.classes), tiles = padded((job.classes + kTile - 1) / kTile);
        float* at = thread_scratch().floats(kTile + 2 * (full + tiles));
        auto take = [&](int64_t n) { return at += n, at - n; };
        float* buffer = take(kTile);
        Side s{{}, take(full), take(tiles)}, t{{}, take(full), take(tiles)};
        for (int64_t r = begin; r < end; ++r) {
          if (job.row_weight(r) != 0.f)
            row_moments(job, r, s, t, buffer);
          else
            std::fill(job.row(r), job.row(r) + kRowStats, 0.f);
        }
      });
}

// ---- columns: means, then the moments around them ----

// The sums of one tile of columns over one share of the rows.
class ColumnTile {
 public:
  ColumnTile(const Job& job, int64_t first_valid, int64_t start)
      : job_(job), start_(start), n_(std::min(kColumns, job.classes - start)), m_(padded(n_)) {
    // Differences from a valid row: the deviations of a constant column are exactly 0.
    load(first_valid, shift_s_, shift_t_);
  }

  // Adds sum w (p - shift) of rows [begin, end) to sums (2, kColumns); `kept` remembers
  // probabilities.
  void add_sums(int64_t begin, int64_t end, double* sums, float* kept) {
    blocks<2>(begin, end, sums, [&](int64_t r, float w, float (*acc)[kColumns]) {
      float* ps = kept ? kept + 2 * (r - begin) * kColumns : ps_;
      float* pt = ps + kColumns;
      if (!kept) pt = pt_;
      load(r, ps, pt);
      float *a = acc[0], *b = acc[1];
#pragma omp simd
      for (int64_t v = 0; v < m_; ++v) {
        a[v] += w * (ps[v] - shift_s_[v]);
        b[v] += w * (pt[v] - shift_t_[v]);
      }
    });
  }
  void set_means(const double* sums, double total_weight) {
    for (int64_t v = 0; v < m_; ++v) {
      delta_s_[v] = static_cast<float>(sums[v] / total_weight);
      delta_t_[v] = static_cast<float>(sums[kColumns + v] / total_weight);
    }
    for (int64_t v = 0; v < n_; ++v) {
      job_.column(kShiftS)[start_ + v] = shift_s_[v];
      job_.column(kDeltaS)[start_ + v] = delta_s_[v];
      job_.column(kShiftT)[start_ + v] = shift_t_[v];
      job_.column(kDeltaT)[start_ + v] = delta_t_[v];
    }
  }
  void add_moments(int64_t begin, int64_t end, double* moments, const float* kept) {
    blocks<3>(begin, end, moments, [&](int64_t r, float w, float (*acc)[kColumns]) {
      const float* ps = kept ? kept + 2 * (r - begin) * kColumns : ps_;
      const float* pt = kept ? ps + kColumns : pt_;
      if (!kept) load(r, ps_, pt_);
      float *xy = acc[0], *xx = acc[1], *yy = acc[2];
#pragma omp simd
      for (int64_t v = 0; v < m_; ++v) {
        const float x = (ps[v] - shift_s_[v]) - delta_s_[v],
                    y = (pt[v] - shift_t_[v]) - delta_t_[v];
        xy[v] += w * x * y;
        xx[v] += w * x * x;
        yy[v] += w * y * y;
      }
    });
  }
  // Returns the sum of 1 - rho over the tile.
  double finish(const double* moments) {
    double sum = 0.0;
    for (int64_t v = 0; v < n_; ++v) {
      const Pearson p =
          pearson(static_cast<float>(moments[v]), static_cast<float>(moments[kColumns + v]),
                  static_cast<float>(moments[2 * kColumns + v]), job_.scalars[kEps], job_.clamp);
      job_.column(kColA)[start_ + v] = p.a;
      job_.column(kColBs)[start_ + v] = p.bx;
      job_.column(kColBt)[start_ + v] = p.by;
      sum += 1.0 - p.rho;
    }
    return sum;
  }

 private:
  void load(int64_t r, float* ps, float* pt) {
    const float* row = job_.row(r);
    const Pair c = job_.factor();
    probabilities(scores(job_.s, r, job_.inner, start_, n_, buffer_), m_, row[kRefS], c,
                  row[kInverseS], ps);
    probabilities(scores(job_.t, r, job_.inner, start_, n_, buffer_), m_, row[kRefT], c,
                  row[kInverseT], pt);
  }
  // visit(r, w, acc) on the valid rows; `acc` is float32 and goes to `sums` every kBlockRows rows.
  template <int kCount, typename Visit>
  void blocks(int64_t begin, int64_t end, double* sums, const Visit& visit) {
    alignas(64) float acc[kCount][kColumns];
    for (int64_t first = begin; first < end; first += kBlockRows) {
      memset(acc, 0, sizeof(acc));
      for (int64_t r = first; r < std::min(first + kBlockRows, end); ++r) {
        const float w = job_.row_weight(r);
        if (w != 0.f) visit(r, w, acc);
      }
      for (int k = 0; k < kCount; ++k)
        for (int64_t v = 0; v < m_; ++v) sums[k * kColumns + v] += acc[k][v];
    }
  }

  const Job& job_;
  const int64_t start_, n_, m_;
  alignas(64) float shift_s_[kColumns], shift_t_[kColumns], delta_s_[kColumns], delta_t_[kColumns];
  alignas(64) float ps_[kColumns], pt_[kColumns], buffer_[kColumns];
};

double all_columns(const Job& job, int64_t first_valid, double total_weight) {
  const int64_t tiles = (job.classes + kColumns - 1) / kColumns, work = 2 * job.count * job.classes;
  std::vector<double> terms(tiles);
  // Enough shares of rows to occupy a machine where the columns alone do not.
  const int64_t chunks =
      std::min<int64_t>(std::max<int64_t>(1, 32 / tiles), (job.count + 255) / 256);
  if (chunks == 1) {
    parallel_for(tiles, work, job.threads, [&](int64_t begin, int64_t end) {
      const bool keep = 2 * job.count * kColumns <= kKeptFloats;
      float* kept = keep ? thread_scratch().floats(2 * job.count * kColumns) : nullptr;
      for (int64_t k = begin; k < end; ++k) {
        double sums[3 * kColumns] = {}, moments[3 * kColumns] = {};
        ColumnTile tile(job, first_valid, k * kColumns);
        tile.add_sums(0, job.count, sums, kept);
        tile.set_means(sums, total_weight);
        tile.add_moments(0, job.count, moments, kept);
        terms[k] = tile.finish(moments);
      }
    });
  } else {
    std::vector<double> sums(chunks * tiles * 3 * kColumns);
    const auto place = [&](int64_t chunk, int64_t k) {
      return sums.data() + (chunk * tiles + k) * 3 * kColumns;
    };
    const auto join = [&](int64_t k) {
      for (int64_t chunk = 1; chunk < chunks; ++chunk)
        for (int64_t i = 0; i < 3 * kColumns; ++i) place(0, k)[i] += place(chunk, k)[i];
    };
    const auto share = [&](int64_t chunk) { return job.count * chunk / chunks; };
    parallel_for(chunks * tiles, work, job.threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        ColumnTile(job, first_valid, i % tiles * kColumns)
            .add_sums(share(i / tiles), share(i / tiles + 1), place(i / tiles, i % tiles), nullptr);
    });
    std::vector<double> means(tiles * 3 * kColumns);
    for (int64_t k = 0; k < tiles; ++k) {
      join(k);
      std::copy(place(0, k), place(0, k) + 3 * kColumns, means.data() + k * 3 * kColumns);
    }
    std::fill(sums.begin(), sums.end(), 0.0);
    parallel_for(chunks * tiles, work, job.threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        ColumnTile tile(job, first_valid, i % tiles * kColumns);
        tile.set_means(means.data() + i % tiles * 3 * kColumns, total_weight);
        tile.add_moments(share(i / tiles), share(i / tiles + 1), place(i / tiles, i % tiles),
                         nullptr);
      }
    });
    for (int64_t k = 0; k < tiles; ++k) {
      join(k);
      terms[k] = ColumnTile(job, first_valid, k * kColumns).finish(place(0, k));
    }
  }
  double sum = 0.0;
  for (double x : terms) sum += x;
  return sum / static_cast<double>(job.classes);
}

// ---- the gradient of a row ----

struct Pull {
  float a, b;  // row coefficients
  const float *col_a, *col_b;
};

// g = -d loss / d p for one tile; x is the side that it belongs to. Returns sum p g.
float pull_tile(int64_t n, float row_factor, float column_factor, float mean, const Pull& pull,
                const float* px, const float* py, const float* shift_x, const float* delta_x,
                const float* shift_y, const float* delta_y, float* g) {
  const float a = row_factor * pull.a, b = row_factor * pull.b;
  const float *col_a = pull.col_a, *col_b = pull.col_b;
  float dot = 0.f;
#pragma omp simd reduction(+ : dot)
  for (int64_t v = 0; v < n; ++v) {
    const float by_row = a * (py[v] - mean) - b * (px[v] - mean);
    const float x = (px[v] - shift_x[v]) - delta_x[v], y = (py[v] - shift_y[v]) - delta_y[v];
    const float by_column = col_a[v] * y - col_b[v] * x;
    g[v] = by_row + column_factor * by_column;
    dot += px[v] * g[v];
  }
  return dot;
}

void store_row(const Tensor& d, int64_t r, int64_t inner, int64_t start, int64_t n,
               const float* g) {
  const int64_t at = offset(d, r, inner) + start * d.stride[1];
  if (d.stride[1] == 1) return store_tile(advance(d.data, d.dtype, at), d.dtype, n, g);
  for (int64_t v = 0; v < n; ++v) store_one(d.data, d.dtype, at + v * d.stride[1], g[v]);
}

void gradients(const Job& job, const float* sums, float upstream, const Tensor& ds,
               const Tensor& dt) {
  const float total_weight = sums[kTotalWeight], inverse_t = 1.f / job.scalars[kT];
  const float mean = static_cast<float>(1.0 / static_cast<double>(job.classes));
  parallel_for(
      job.count, 3 * job.count * job.classes, job.threads, [&](int64_t begin, int64_t end) {
        const int64_t full = padded(job.classes);
        float* at = thread_scratch().floats(3 * full + 2 * kTile);
        auto take = [&](int64_t n) { return at += n, at - n; };
        float *ps = take(full), *pt = take(full), *g = take(full), *buffer = take(kTile),
              *out = take(kTile);
        for (int64_t r = begin; r < end; ++r) {
          const float w = job.row_weight(r), *row = job.row(r);
          if (w == 0.f) {
            std::fill(out, out + kTile, 0.f);
            for (int64_t start = 0; start < job.classes; start += kTile)
              for (const Tensor* d : {&ds, &dt})
                if (*d)
                  store_row(*d, r, job.inner, start, std::min(kTile, job.classes - start), out);
            continue;
          }
          for (int64_t start = 0; start < job.classes; start += kTile) {
            const int64_t n = std::min(kTile, job.classes - start), m = padded(n);
            const float* s = scores(job.s, r, job.inner, start, n, buffer);
            probabilities(s, m, row[kRefS], job.factor(), row[kInverseS], ps + start);
            const float* t = scores(job.t, r, job.inner, start, n, buffer);
            probabilities(t, m, row[kRefT], job.factor(), row[kInverseT], pt + start);
          }
          const float row_factor = upstream * job.scalars[kBeta] * w / total_weight;
          const float column_factor = sums[kValidRows] > 1.f ? upstream * job.scalars[kGamma] * w /
                                                                   static_cast<float>(job.classes)
                                                             : 0.f;
          const auto side = [&](const Tensor& d, const float* px, const float* py,
                                ColumnStat shift_x, ColumnStat shift_y, float b, ColumnStat col_b) {
            double dot = 0.0;
            for (int64_t start = 0; start < job.classes; start += kTile) {
              const int64_t n = std::min(kTile, job.classes - start);
              const Pull pull{row[kRowA], b, job.column(kColA) + start, job.column(col_b) + start};
              dot += pull_tile(n, row_factor, column_factor, mean, pull, px + start, py + start,
                               job.column(shift_x) + start,
                               job.column(ColumnStat(shift_x + 1)) + start,
                               job.column(shift_y) + start,
                               job.column(ColumnStat(shift_y + 1)) + start, g + start);
            }
            const float centre = static_cast<float>(dot);
            for (int64_t start = 0; start < job.classes; start += kTile) {
              const int64_t n = std::min(kTile, job.classes - start);
              const float *p = px + start, *from = g + start;
#pragma omp simd
              for (int64_t v = 0; v < n; ++v) out[v] = inverse_t * p[v] * (centre - from[v]);
              store_row(d, r, job.inner, start, n, out);
            }
          };
          if (ds) side(ds, ps, pt, kShiftS, kShiftT, row[kRowBs], kColBs);
          if (dt) side(dt, pt, ps, kShiftT, kShiftS, row[kRowBt], kColBt);
        }
      });
}

Job make_job(Tensor student, Tensor teacher, Tensor labels, Tensor weight, Tensor scalars,
             Tensor rows, Tensor columns, bool clamp, int64_t ignore_index, int64_t threads) {
  Job job{student,
          teacher,
          labels.as<int64_t>(),
          weight.as<float>(),
          scalars.as<float>(),
          rows.as<float>(),
          columns.as<float>(),
          clamp,
          ignore_index,
          student.shape[1],
          student.shape[2],
          0,
          threads};
  job.count = student.shape[0] * job.inner;
  for (int64_t r = 0; job.labels && r < job.count; ++r) {
    const int64_t y = job.labels[r];
    if (y != ignore_index && (y < 0 || y >= job.classes))
      throw std::out_of_range("labels hold " + std::to_string(y) + " at row " + std::to_string(r) +
                              ", outside 0 to " + std::to_string(job.classes - 1) +
                              " and not ignore_index");
  }
  return job;
}

void dist_forward(Tensor student, Tensor teacher, Tensor labels, Tensor weight, Tensor scalars,
                  Tensor total, Tensor rows, Tensor columns, Tensor sums, Tensor, bool clamp,
                  int64_t ignore_index, int64_t /*shares*/, int64_t threads) {
  const Job job = make_job(student, teacher, labels, weight, scalars, rows, columns, clamp,
                           ignore_index, threads);
  double total_weight = 0.0, row_term = 0.0, column_term = 0.0;
  int64_t valid = 0, first_valid = 0;
  for (int64_t r = job.count - 1; r >= 0; --r) {
    const float w = job.row_weight(r);
    if (w != 0.f) total_weight += w, ++valid, first_valid = r;
  }
  all_rows(job);
  for (int64_t r = 0; r < job.count; ++r) {
    const float w = job.row_weight(r);
    if (w != 0.f) row_term += w * (1.0 - job.row(r)[kRowRho]);
  }
  if (total_weight != 0.0) row_term /= total_weight;
  if (valid > 1)
    column_term = all_columns(job, first_valid, total_weight);
  else
    std::fill(job.columns, job.columns + kColumnStats * job.classes, 0.f);
  const double found[] = {total_weight, static_cast<double>(valid), row_term, column_term};
  std::fill(sums.as<float>(), sums.as<float>() + 8, 0.f);
  for (int i = 0; i < 4; ++i) sums.as<float>()[i] = static_cast<float>(found[i]);
  *total.as<float>() = static_cast<float>(scalars.as<float>()[kBeta] * row_term +
                                          scalars.as<float>()[kGamma] * column_term);
}

void dist_backward(Tensor student, Tensor teacher, Tensor labels, Tensor weight, Tensor scalars,
                   Tensor rows, Tensor columns, Tensor sums, Tensor upstream, Tensor ds, Tensor dt,
                   bool clamp, int64_t ignore_index, int64_t threads) {
  const Job job = make_job(student, teacher, labels, weight, scalars, rows, columns, clamp,
                           ignore_index, threads);
  gradients(job, sums.as<float>(), *upstream.as<float>(), ds, dt);
}

KDK_EXPORT(dist_forward)
KDK_EXPORT(dist_backward)

}  // namespace
}  // namespace KDK_NAMESPACE
