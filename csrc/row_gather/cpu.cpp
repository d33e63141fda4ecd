// Log-probabilities at k classes a row, and what the other classes hold, on the CPU.
//
// Rows are shared among threads and read once, in tiles. The indices of a row ascend, so that a
// tile's are neighbours; where the other classes are wanted, these are taken out of a copy of the
// tile. See kdkernels/ops/row_gather/README.md.
#include <algorithm>
#include <cmath>

#include "common/convert.h"
#include "common/parallel.h"
#include "common/registry.h"
#include "common/softmax.h"
#include "row_gather/math.h"

namespace KDK_NAMESPACE {
namespace {

constexpr int64_t kTile = 1024;

struct Row {
  const void* x;
  DType type;
  int64_t stride, classes;
  const int64_t* index;  // ascending; -1 is no index
  int64_t k;
  bool from_memory;  // side by side, and too many to be in a cache yet

  Row(const Tensor& t, const Tensor& indices, int64_t r)
      : type(t.dtype),
        stride(t.stride[1]),
        classes(t.shape[1]),
        k(indices.shape[1]),
        from_memory(t.stride[1] == 1 && exceeds_caches(t)) {
    const int64_t inner = t.shape[2];
    x = advance(t.data, t.dtype, r / inner * t.stride[0] + r % inner * t.stride[2]);
    index = indices.as<int64_t>() + r * k;
  }
  bool in_range() const { return index[0] >= -1 && index[k - 1] < classes; }
  int64_t first() const { return std::upper_bound(index, index + k, int64_t{-1}) - index; }
  float at(int64_t v) const { return load_one(x, type, v * stride); }
  // n scores from class `start`, padded with -inf to whole vectors: where they lie if they can stay
  // there.
  const float* tile(int64_t start, int64_t n, float* buffer) const {
    if (stride == 1) return load_tile(advance(x, type, start), type, n, buffer);
    for (int64_t v = 0; v < n; ++v) buffer[v] = at(start + v);
    for (int64_t v = n; v < padded(n); ++v) buffer[v] = -INFINITY;
    return buffer;
  }
  // The tile that follows the one at `start`, in this row or the next.
  Ahead after(int64_t start) const {
    return from_memory ? Ahead(advance(x, type, start + kTile), type) : Ahead();
  }
};

Scratch& thread_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

double sum_of_differences(const float* x, int64_t n, float base) {
  float sum = 0.f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i] - base;
  return sum;
}

struct RowOutputs {
  float *gathered, *rest, *total, *stats;
};

void forward_row(const Row& row, float t, int outside, float* buffer, float* e,
                 const RowOutputs& out) {
  const int64_t first = row.first(), k = row.k;
  RunningSoftmax run(1.0 / t);  // of all classes, or of those outside
  double sum = 0.0;
  float base = 0.f;
  int64_t unique = 0, j = first;
  for (int64_t start = 0; start < row.classes; start += kTile) {
    const int64_t n = std::min(kTile, row.classes - start), m = padded(n);
    const float* x = row.tile(start, n, buffer);
    if (outside != kNoOutside) {
      if (outside == kRestAndTotal && start == 0) {
        base = largest_of(x, n);
        if (!std::isfinite(base)) base = 0.f;
      }
      const int64_t from = j;
      while (j < k && row.index[j] < start + n) ++j;
      if (j > from && x != buffer) std::copy(x, x + m, buffer), x = buffer;
      for (int64_t i = from; i < j; ++i) {
        unique += i == first || row.index[i] != row.index[i - 1];
        buffer[row.index[i] - start] = base;
      }
      if (outside == kRestAndTotal) sum += sum_of_differences(x, n, base);
      for (int64_t i = from; i < j; ++i) buffer[row.index[i] - start] = -INFINITY;
    }
    run.raise(largest_of(x, m));
    run.z += exponentials_of(x, m, run, e, row.after(start));
  }
  float ref = run.ref;
  double z = run.z, mass_out = 1.0;
  const double inverse_t = 1.0 / t;
  if (outside != kNoOutside) {
    float top = run.top;
    for (int64_t i = first; i < k; ++i) {
      const float x = row.at(row.index[i]);
      top = x > top ? x : top;
    }
    ref = top == -INFINITY ? 0.f : top;
    mass_out = z > 0.0 ? std::exp((run.ref - ref) * inverse_t) : z;  // or NaN
    z *= mass_out;
    for (int64_t i = first; i < k; ++i)
      if (i == first || row.index[i] != row.index[i - 1])
        z += std::exp((row.at(row.index[i]) - ref) * inverse_t);
  }
  const double log_z = std::log(z);
  std::fill(out.gathered, out.gathered + first, -INFINITY);
  for (int64_t i = first; i < k; ++i)
    out.gathered[i] =
        static_cast<float>((static_cast<double>(row.at(row.index[i])) - ref) * inverse_t - log_z);
  const double count = static_cast<double>(row.classes - unique);
  if (out.rest)
    *out.rest = static_cast<float>(std::log(run.z) +
                                   (static_cast<double>(run.ref) - ref) * inverse_t - log_z);
  if (out.total) {
    const double shift = (static_cast<double>(base) - ref) * inverse_t - log_z;
    *out.total = count == 0.0 ? 0.f : static_cast<float>(sum * inverse_t + count * shift);
  }
  std::fill(out.stats, out.stats + kGatherStats, 0.f);
  out.stats[kRef] = ref;
  out.stats[kInverseZ] = static_cast<float>(1.0 / z);
  out.stats[kRefOutside] = run.ref;
  out.stats[kInverseZOut] = run.z == 0.0 ? 0.f : static_cast<float>(1.0 / run.z);
  out.stats[kMassOut] = static_cast<float>(mass_out / z);
  out.stats[kCountOut] = static_cast<float>(count);
}

void outside_tile(const float* x, int64_t n, float ref, Pair c, const GatherCoefficients& f,
                  float* out) {
  const float factor = f.outside, constant = f.constant;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float d = x[i] - ref, y = d * c.hi + d * c.lo;
    // Above 0 are only classes among the indices, which are replaced.
    out[i] = vexp2_nonpositive(y > 0.f ? 0.f : y) * factor + constant;
  }
}

struct Upstream {
  const float* gathered;
  float rest, total;
};

void backward_row(const Row& row, float t, const float* stats, const Upstream& up, float* buffer,
                  float* out, void* d, DType d_type, int64_t d_stride) {
  const int64_t first = row.first(), k = row.k;
  const float inverse_t = 1.f / t;
  const Pair c = split_factor(RunningSoftmax(1.0 / t).c);
  double sum = 0.0;
  for (int64_t i = first; i < k; ++i) sum += up.gathered[i];
  const GatherCoefficients f =
      gather_coefficients(stats, static_cast<float>(sum), up.rest, up.total, inverse_t);
  int64_t j = first;
  for (int64_t start = 0; start < row.classes; start += kTile) {
    const int64_t n = std::min(kTile, row.classes - start);
    const float* x = row.tile(start, n, buffer);
    void* const at = advance(d, d_type, start * d_stride);
    float* const g = d_stride == 1 ? tile_target(at, d_type, n, out) : out;
    outside_tile(x, padded(n), stats[kRefOutside], c, f, g);
    while (j < k && row.index[j] < start + n) {
      const int64_t v = row.index[j];
      float own = up.gathered[j++];
      while (j < k && row.index[j] == v) own += up.gathered[j++];
      const float d = x[v - start] - stats[kRef], y = d * c.hi + d * c.lo;
      g[v - start] = vexp2_nonpositive(y) * stats[kInverseZ] * f.inside + own * inverse_t;
    }
    if (d_stride == 1)
      store_tile(at, d_type, n, g);
    else
      for (int64_t v = 0; v < n; ++v) store_one(at, d_type, v * d_stride, g[v]);
  }
}

void fill_row(void* d, DType type, int64_t n, int64_t stride, float value) {
  for (int64_t v = 0; v < n; ++v) store_one(d, type, v * stride, value);
}

void row_gather_forward(Tensor student, Tensor indices, Tensor live, Tensor scalars,
                        Tensor gathered, Tensor rest, Tensor total, Tensor stats, int64_t outside,
                        int64_t threads) {
  const int64_t rows = student.shape[0] * student.shape[2], k = indices.shape[1];
  const float t = scalars.as<float>()[0];
  parallel_for(rows, rows * student.shape[1], threads, [&](int64_t begin, int64_t end) {
    float* const scratch = thread_scratch().floats(2 * kTile);
    for (int64_t r = begin; r < end; ++r) {
      const Row row(student, indices, r);
      const RowOutputs out{gathered.as<float>() + r * k, rest ? rest.as<float>() + r : nullptr,
                           total ? total.as<float>() + r : nullptr,
                           stats.as<float>() + r * kGatherStats};
      if (row.in_range() && (!live || live.as<uint8_t>()[r])) {
        forward_row(row, t, static_cast<int>(outside), scratch, scratch + kTile, out);
        continue;
      }
      const float fill = !live || live.as<uint8_t>()[r] ? NAN : 0.f;
      for (int64_t i = 0; i < k; ++i) out.gathered[i] = row.index[i] == -1 ? -INFINITY : fill;
      if (rest) *out.rest = fill;
      if (total) *out.total = fill;
      std::fill(out.stats, out.stats + kGatherStats, fill);
    }
  });
}

void row_gather_backward(Tensor student, Tensor indices, Tensor live, Tensor scalars, Tensor stats,
                         Tensor g, Tensor g_rest, Tensor g_total, Tensor ds, int64_t threads) {
  const int64_t classes = student.shape[1], inner = student.shape[2];
  const int64_t rows = student.shape[0] * inner, k = indices.shape[1];
  const float t = scalars.as<float>()[0];
  parallel_for(rows, 2 * rows * classes, threads, [&](int64_t begin, int64_t end) {
    float* const scratch = thread_scratch().floats(2 * kTile);
    for (int64_t r = begin; r < end; ++r) {
      const Row row(student, indices, r);
      void* const d =
          advance(ds.data, ds.dtype, r / inner * ds.stride[0] + r % inner * ds.stride[2]);
      if (live && !live.as<uint8_t>()[r]) {
        fill_row(d, ds.dtype, classes, ds.stride[1], 0.f);
      } else if (!row.in_range()) {
        fill_row(d, ds.dtype, classes, ds.stride[1], NAN);
      } else {
        const Upstream up{g.as<float>() + r * k, g_rest ? g_rest.as<float>()[r] : 0.f,
                          g_total ? g_total.as<float>()[r] : 0.f};
        backward_row(row, t, stats.as<float>() + r * kGatherStats, up, scratch, scratch + kTile, d,
                     ds.dtype, ds.stride[1]);
      }
    }
  });
}

KDK_EXPORT(row_gather_forward)
KDK_EXPORT(row_gather_backward)

}  // namespace
}  // namespace KDK_NAMESPACE
