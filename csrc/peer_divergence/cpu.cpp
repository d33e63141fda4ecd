// Peer divergence on the CPU: a row of every learner at a time, rows shared among threads.
//
// Exponentials are kept from the first sweep, so that the second, which joins the learners, costs
// no more exponentials however many pairs there are. See kdkernels/ops/peer_divergence/README.md.
#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/convert.h"
#include "common/parallel.h"
#include "common/registry.h"
#include "common/softmax.h"

namespace KDK_NAMESPACE {
namespace {

constexpr int64_t kTile = 512;
constexpr int64_t kColumnLanes = 16;  // rows moved together where the class axis is strided

// One learner's scores, as (outer, classes, inner), and where its gradient goes (null: nowhere).
struct Learner {
  void *x, *d;
  int64_t x_stride[3], d_stride[3];

  bool contiguous() const { return x_stride[1] == 1 && (!d || d_stride[1] == 1); }
};

struct Job {
  std::vector<Learner> learners;
  DType dtype = DType::f32;
  const int64_t* labels;
  const float* weight;
  double inverse_t;
  float factor;
  const float* upstream;  // null: 1
  bool upstream_per_row;
  float* losses;  // (learners, rows); null: not wanted
  int64_t ignore_index, classes, inner, rows, threads;

  int64_t count() const { return static_cast<int64_t>(learners.size()); }
  float row_weight(int64_t r) const {
    if (labels && labels[r] == ignore_index) return 0.f;
    return weight ? weight[r] : 1.f;
  }
  float upstream_of(int64_t learner, int64_t r) const {
    return upstream ? upstream[upstream_per_row ? learner * rows + r : 0] : 1.f;
  }
};

struct Place {
  const void* x;
  void* d;
};

// A row of every learner, classes side by side, and the memory it is worked on in.
class RowKernel {
 public:
  static int64_t memory(int64_t learners, int64_t classes) {
    const int64_t tiles = (classes + kTile - 1) / kTile;
    return learners * (padded(classes) + padded(tiles) + kTile) + 6 * kTile;
  }
  RowKernel(const Job& job, float* memory)
      : job_(job),
        full_(padded(job.classes)),
        tiles_((job.classes + kTile - 1) / kTile),
        run_(job.count()),
        sum_(job.count()) {
    auto take = [&](int64_t n) { return memory += n, memory - n; };
    buffer_ = take(kTile);
    target_ = take(kTile);
    total_ = take(kTile);
    middle_log_ = take(kTile);
    least_log_ = take(kTile);
    entropy_ = take(kTile);
    e_ = take(job.count() * full_);
    log_p_ = take(job.count() * kTile);
    top_ = take(job.count() * padded(tiles_));
  }

  void run(int64_t r, const Place* rows, DType dtype) {
    const int64_t learners = job_.count();
    const float weight = job_.row_weight(r);
    if (weight == 0.f) {
      for (int64_t i = 0; i < learners; ++i) {
        if (job_.losses) job_.losses[i * job_.rows + r] = 0.f;
        if (rows[i].d) memset(rows[i].d, 0, static_cast<size_t>(job_.classes * size_of(dtype)));
      }
      return;
    }
    for (int64_t i = 0; i < learners; ++i) normalise(i, rows[i].x, dtype);
    std::fill(sum_.begin(), sum_.end(), 0.0);
    for (int64_t k = 0, start = 0; start < job_.classes; ++k, start += kTile)
      join(r, k, start, std::min(kTile, job_.classes - start), weight, rows, dtype);
    if (!job_.losses) return;
    for (int64_t i = 0; i < learners; ++i)
      job_.losses[i * job_.rows + r] = job_.factor * weight * static_cast<float>(sum_[i]);
  }

 private:
  void normalise(int64_t i, const void* x, DType dtype) {
    RunningSoftmax run(job_.inverse_t);
    for (int64_t k = 0, start = 0; start < job_.classes; ++k, start += kTile) {
      const int64_t n = std::min(kTile, job_.classes - start), m = padded(n);
      const float* tile = load_tile(advance(x, dtype, start), dtype, n, buffer_);
      run.raise(largest_of(tile, m));
      run.z += exponentials_of(tile, m, run, e_ + i * full_ + start);
      top_[i * padded(tiles_) + k] = run.top;
    }
    run_[i] = run;
  }

  // With P = sum_j p_j, learner i's loss is sum_j p_j (log p_j - log p_i) = S - P (log p_i - c),
  // S = sum_j p_j (log p_j - c), whatever c is: its own term is 0. The middle between the largest
  // and the least log p_j for c keeps the terms small where the learners agree. Its gradient is
  // M p_i - P.
  void join(int64_t r, int64_t k, int64_t start, int64_t n, float weight, const Place* rows,
            DType dtype) {
    const int64_t learners = job_.count(), m = padded(n);
    float *total = total_, *c = middle_log_, *least = least_log_, *s = entropy_;
    std::fill(total, total + m, 0.f);
    std::fill(c, c + m, -INFINITY);
    std::fill(least, least + m, INFINITY);
    for (int64_t i = 0; i < learners; ++i) {
      const float* x = load_tile(advance(rows[i].x, dtype, start), dtype, n, buffer_);
      const float f = run_[i].to_probability(top_[i * padded(tiles_) + k]);
      const float ref = run_[i].ref;
      const Pair scale = split_factor(job_.inverse_t), log_z = split(run_[i].log_z());
      float *p = e_ + i * full_ + start, *a = log_p_ + i * kTile;
#pragma omp simd
      for (int64_t v = 0; v < m; ++v) {
        p[v] *= f;
        const float d = x[v] - ref;
        a[v] = (d * scale.hi - log_z.hi) + (d * scale.lo - log_z.lo);
        total[v] += p[v];
        c[v] = a[v] > c[v] ? a[v] : c[v];
        const float low = a[v] == -INFINITY ? INFINITY : a[v];
        least[v] = low < least[v] ? low : least[v];
      }
    }
    if (job_.losses) {
      std::fill(s, s + m, 0.f);
#pragma omp simd
      for (int64_t v = 0; v < m; ++v) c[v] = c[v] == -INFINITY ? c[v] : 0.5f * (c[v] + least[v]);
      for (int64_t i = 0; i < learners; ++i) {
        const float *p = e_ + i * full_ + start, *a = log_p_ + i * kTile;
#pragma omp simd
        for (int64_t v = 0; v < m; ++v) s[v] += p[v] > 0.f ? p[v] * (a[v] - c[v]) : 0.f;
      }
      for (int64_t i = 0; i < learners; ++i) {
        const float* a = log_p_ + i * kTile;
        float sum = 0.f;
#pragma omp simd reduction(+ : sum)
        for (int64_t v = 0; v < m; ++v)
          sum += total[v] == 0.f ? 0.f : s[v] - total[v] * (a[v] - c[v]);
        sum_[i] += sum;
      }
    }
    for (int64_t i = 0; i < learners; ++i) {
      if (!rows[i].d) continue;
      void* place = advance(rows[i].d, dtype, start);
      float* g = tile_target(place, dtype, n, target_);
      const float* p = e_ + i * full_ + start;
      const float by =
          static_cast<float>(job_.factor * weight * job_.upstream_of(i, r) * job_.inverse_t);
      const float peers = static_cast<float>(learners);
#pragma omp simd
      for (int64_t v = 0; v < m; ++v) g[v] = by * (peers * p[v] - total[v]);
      store_tile(place, dtype, n, g);
    }
  }

  const Job& job_;
  const int64_t full_, tiles_;
  std::vector<RunningSoftmax> run_;
  std::vector<double> sum_;
  float *buffer_, *target_, *total_, *middle_log_, *least_log_, *entropy_, *e_, *log_p_, *top_;
};

int64_t offset(const int64_t* stride, int64_t r, int64_t inner) {
  return r / inner * stride[0] + r % inner * stride[2];
}

void for_rows(const Job& job) {
  const int64_t learners = job.count(), classes = job.classes, work = learners * job.rows * classes;
  const bool contiguous = classes == 1 || std::all_of(job.learners.begin(), job.learners.end(),
                                                      [](auto& l) { return l.contiguous(); });
  if (contiguous) {
    parallel_for(job.rows, work, job.threads, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      RowKernel kernel(job, scratch.floats(RowKernel::memory(learners, classes)));
      std::vector<Place> rows(learners);
      for (int64_t r = begin; r < end; ++r) {
        for (int64_t i = 0; i < learners; ++i) {
          const Learner& l = job.learners[i];
          rows[i] = {advance(l.x, job.dtype, offset(l.x_stride, r, job.inner)),
                     l.d ? advance(l.d, job.dtype, offset(l.d_stride, r, job.inner)) : nullptr};
        }
        kernel.run(r, rows.data(), job.dtype);
      }
    });
    return;
  }
  // A few neighbouring rows are copied together, lanes in the inner loop: where the class axis is
  // strided they usually lie side by side. A gradient takes the place of its scores.
  const int64_t groups = (job.rows + kColumnLanes - 1) / kColumnLanes;
  parallel_for(groups, work, job.threads, [&](int64_t begin, int64_t end) {
    const int64_t block = kColumnLanes * classes;
    Scratch scratch;
    float* copies = scratch.floats(padded(learners * block) + RowKernel::memory(learners, classes));
    RowKernel kernel(job, copies + padded(learners * block));
    std::vector<Place> rows(learners);
    int64_t at[kColumnLanes];
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = group * kColumnLanes, lanes = std::min(kColumnLanes, job.rows - first);
      for (int64_t i = 0; i < learners; ++i) {
        const Learner& l = job.learners[i];
        for (int64_t j = 0; j < lanes; ++j) at[j] = offset(l.x_stride, first + j, job.inner);
        for (int64_t v = 0; v < classes; ++v)
          for (int64_t j = 0; j < lanes; ++j)
            copies[i * block + j * classes + v] =
                load_one(l.x, job.dtype, at[j] + v * l.x_stride[1]);
      }
      for (int64_t j = 0; j < lanes; ++j) {
        for (int64_t i = 0; i < learners; ++i) {
          float* row = copies + i * block + j * classes;
          rows[i] = {row, job.learners[i].d ? row : nullptr};
        }
        kernel.run(first + j, rows.data(), DType::f32);
      }
      for (int64_t i = 0; i < learners; ++i) {
        const Learner& l = job.learners[i];
        if (!l.d) continue;
        for (int64_t j = 0; j < lanes; ++j) at[j] = offset(l.d_stride, first + j, job.inner);
        for (int64_t v = 0; v < classes; ++v)
          for (int64_t j = 0; j < lanes; ++j)
            store_one(l.d, job.dtype, at[j] + v * l.d_stride[1],
                      copies[i * block + j * classes + v]);
      }
    }
  });
}

template <size_t N>
Job make_job(const Tensor (&parts)[N], Tensor labels, Tensor weight, Tensor scalars, Tensor d,
             int64_t ignore_index, int64_t threads) {
  Job job{};
  job.dtype = parts[0].dtype;
  for (const Tensor& x : parts) {
    if (!x && x.ndim == 0) break;
    for (int64_t i = 0; i < x.shape[0]; ++i) {
      const int64_t k = job.count();
      job.learners.push_back({advance(x.data, x.dtype, i * x.stride[0]),
                              d ? advance(d.data, d.dtype, k * d.stride[0]) : nullptr,
                              {x.stride[1], x.stride[2], x.stride[3]},
                              {d.stride[1], d.stride[2], d.stride[3]}});
    }
  }
  job.classes = parts[0].shape[2], job.inner = parts[0].shape[3];
  job.rows = parts[0].shape[1] * job.inner;
  job.labels = labels.as<int64_t>(), job.weight = weight.as<float>();
  job.ignore_index = ignore_index, job.threads = threads;
  job.inverse_t = 1.0 / scalars.as<float>()[0];
  for (int64_t r = 0; job.labels && r < job.rows; ++r) {
    const int64_t y = job.labels[r];
    if (y != ignore_index && (y < 0 || y >= job.classes))
      throw std::out_of_range("labels hold " + std::to_string(y) + " at row " + std::to_string(r) +
                              ", outside 0 to " + std::to_string(job.classes - 1) +
                              " and not ignore_index");
  }
  return job;
}

float factor_of(Tensor scalars, Tensor divisor) {
  const float by = divisor ? *divisor.as<float>() : 1.f;
  return by == 0.f ? 0.f : scalars.as<float>()[1] / by;
}

void peer_divergence_forward(Tensor x0, Tensor x1, Tensor x2, Tensor x3, Tensor x4, Tensor x5,
                             Tensor x6, Tensor x7, Tensor x8, Tensor x9, Tensor x10, Tensor x11,
                             Tensor x12, Tensor x13, Tensor x14, Tensor x15, Tensor labels,
                             Tensor weight, Tensor scalars, Tensor divisor, Tensor losses,
                             Tensor total, Tensor d, int64_t count, int64_t ignore_index,
                             int64_t threads) {
  const Tensor parts[] = {x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15};
  Job job = make_job(parts, labels, weight, scalars, d, ignore_index, threads);
  if (count) {
    double sum = 0.0;
    for (int64_t r = 0; r < job.rows; ++r) sum += job.row_weight(r);
    *divisor.as<float>() = static_cast<float>(sum);
  }
  job.factor = factor_of(scalars, divisor);
  job.losses = losses.as<float>();
  for_rows(job);
  double sum = 0.0;
  for (int64_t k = 0; k < job.count() * job.rows; ++k) sum += job.losses[k];
  *total.as<float>() = static_cast<float>(sum);
}

void peer_divergence_backward(Tensor x0, Tensor x1, Tensor x2, Tensor x3, Tensor x4, Tensor x5,
                              Tensor x6, Tensor x7, Tensor x8, Tensor x9, Tensor x10, Tensor x11,
                              Tensor x12, Tensor x13, Tensor x14, Tensor x15, Tensor labels,
                              Tensor weight, Tensor scalars, Tensor divisor, Tensor upstream,
                              Tensor d, int64_t ignore_index, int64_t threads) {
  const Tensor parts[] = {x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15};
  Job job = make_job(parts, labels, weight, scalars, d, ignore_index, threads);
  job.factor = factor_of(scalars, divisor);
  job.upstream = upstream.as<float>();
  job.upstream_per_row = upstream.numel() != 1;
  for_rows(job);
}

KDK_EXPORT(peer_divergence_forward)
KDK_EXPORT(peer_divergence_backward)

}  // namespace
}  // namespace KDK_NAMESPACE
