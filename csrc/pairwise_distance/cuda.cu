// Squared distances of all pairs, their gradient, and the match of two normalised distance
// matrices. See kdkernels/ops/pairwise_distance/README.md.
#include "common/cuda.cuh"
#include "common/registry.h"
#include "pairwise_distance/math.h"

namespace KDK_NAMESPACE {
namespace {

constexpr int kSide = 16;  // threads on a side of a block
constexpr int kThreads = kSide * kSide;
constexpr int kTile = 2 * kSide;  // samples on a side of a tile of pairs: 2 x 2 pairs a thread
constexpr int kFeatures = 32;     // features in shared memory at a time, as many loads in flight

int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

// ---- squared distances ----

// One tile of pairs of the upper triangle, and its mirror image.
template <typename T, typename Real>
__global__ void __launch_bounds__(kThreads)
    distance_kernel(const T* x, int64_t row, int64_t n, int64_t features, float* hi, float* lo) {
  SMEM_STATIC(float, a, kTile*(kFeatures + 1));
  SMEM_STATIC(float, b, kTile*(kFeatures + 1));
  const int64_t i0 = int64_t{blockIdx.y} * kTile, j0 = int64_t{blockIdx.x} * kTile;
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
  Real sums[2][2] = {};
  const int64_t end = blockIdx.x < blockIdx.y ? 0 : features;
  for (int64_t f0 = 0; f0 < end; f0 += kFeatures) {
    for (int k = threadIdx.x; k < kTile * kFeatures; k += kThreads) {
      const int r = k / kFeatures, f = k % kFeatures;
      const bool in = f0 + f < features;
      a[r * (kFeatures + 1) + f] = in && i0 + r < n ? to_float(x[(i0 + r) * row + f0 + f]) : 0.f;
      b[r * (kFeatures + 1) + f] = in && j0 + r < n ? to_float(x[(j0 + r) * row + f0 + f]) : 0.f;
    }
    __syncthreads();
    for (int f = 0; f < kFeatures; ++f) {
      Real y[2];
#pragma unroll
      for (int v = 0; v < 2; ++v)
        y[v] = static_cast<Real>(b[(tx + v * kSide) * (kFeatures + 1) + f]);
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const Real own = static_cast<Real>(a[(ty + u * kSide) * (kFeatures + 1) + f]);
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          const Real d = own - y[v];
          sums[u][v] += d * d;
        }
      }
    }
    __syncthreads();
  }
  if (blockIdx.x < blockIdx.y) return;
  for (int u = 0; u < 2; ++u) {
    for (int v = 0; v < 2; ++v) {
      const int64_t i = i0 + ty + u * kSide, j = j0 + tx + v * kSide;
      if (i >= n || j >= n) continue;
      const float high = static_cast<float>(sums[u][v]);
      hi[i * n + j] = hi[j * n + i] = high;
      if (lo)
        lo[i * n + j] = lo[j * n + i] = static_cast<float>(sums[u][v] - static_cast<Real>(high));
    }
  }
}

// ---- gradient: dx_i = sum_j 2 (w_ij + w_ji) (x_i - x_j) ----

constexpr int kWidth = 4 * kSide;  // features of a block, four a thread

template <typename T, typename Out>
__global__ void __launch_bounds__(kThreads)
    gradient_kernel(const T* x, int64_t row, int64_t n, int64_t features, const float* weights,
                    Out* dx, int64_t out_row) {
  SMEM_STATIC(float, w, kSide*(kSide + 1));
  SMEM_STATIC(float, y, kSide* kWidth);
  const int64_t i0 = int64_t{blockIdx.x} * kSide, f0 = int64_t{blockIdx.y} * kWidth;
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
  const int64_t i = i0 + ty;
  float own[4], sums[4] = {};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int64_t f = f0 + tx + k * kSide;
    own[k] = i < n && f < features ? to_float(x[i * row + f]) : 0.f;
  }
  for (int64_t j0 = 0; j0 < n; j0 += kSide) {
    const int64_t j = j0 + tx;
    w[ty * (kSide + 1) + tx] =
        i < n && j < n ? 2.f * (weights[i * n + j] + weights[j * n + i]) : 0.f;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int64_t f = f0 + tx + k * kSide;
      y[ty * kWidth + tx + k * kSide] =
          j0 + ty < n && f < features ? to_float(x[(j0 + ty) * row + f]) : 0.f;
    }
    __syncthreads();
    float part[4] = {};  // a tile's sum goes to the whole one as one number
    for (int p = 0; p < kSide; ++p) {
      const float weight = w[ty * (kSide + 1) + p];
#pragma unroll
      for (int k = 0; k < 4; ++k) part[k] += weight * (own[k] - y[p * kWidth + tx + k * kSide]);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) sums[k] += part[k];
    __syncthreads();
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int64_t f = f0 + tx + k * kSide;
    if (i < n && f < features) dx[i * out_row + f] = from_float<Out>(sums[k]);
  }
}

// ---- the match of two distance matrices ----

constexpr int kPairs = 4 * kThreads;  // of a block
constexpr int kFields = 8;            // sums of a block

struct Match {
  const float *student, *teacher, *mask;
  int64_t n;
  float beta, eps;
  bool squared, normalize;
};

// One ordered pair: its weight (0 on the diagonal) and both distances.
struct Pair {
  float weight, s2, t2, s, t;
};
__device__ inline Pair pair_at(const Match& m, int64_t at) {
  Pair p = {0.f, 0.f, 0.f, 0.f, 0.f};
  if (at >= m.n * m.n || at / m.n == at % m.n) return p;
  p.weight = m.mask ? m.mask[at] : 1.f;
  p.s2 = m.student[at], p.t2 = m.teacher[at];
  p.s = distance(p.s2, m.eps, m.squared), p.t = distance(p.t2, m.eps, m.squared);
  return p;
}

// `sums`: [0..4] those of the means (weight, weighted distances, weights where positive),
// [8..10] those of the values (loss over beta, slope times either distance).
__device__ inline float inverse_mean(const Match& m, const float* sums, int which) {
  if (!m.normalize) return 1.f;
  return sums[which] <= 0.f ? 0.f : sums[which + 2] / sums[which];  // of NaN NaN
}
__device__ inline float through_mean(const Match& m, const float* sums, int which) {
  if (!m.normalize || !(sums[which] > 0.f)) return 0.f;
  return sums[kFields + which] / sums[which] * (sums[which + 2] / sums[which]);
}

__global__ void __launch_bounds__(kThreads) mean_kernel(Match m, float* partial) {
  float sums[5] = {};
  for (int k = 0; k < kPairs; k += kThreads) {
    const Pair p = pair_at(m, int64_t{blockIdx.x} * kPairs + k + threadIdx.x);
    sums[0] += p.weight;
    sums[1] += p.weight * p.s;
    sums[2] += p.weight * p.t;
    sums[3] += p.s > 0.f ? p.weight : 0.f;
    sums[4] += p.t > 0.f ? p.weight : 0.f;
  }
  for (int f = 0; f < 5; ++f) {
    const float sum = block_sum<kThreads>(sums[f]);
    if (threadIdx.x == 0) partial[int64_t{blockIdx.x} * kFields + f] = sum;
  }
}

__global__ void __launch_bounds__(kThreads)
    value_kernel(Match m, const float* total, float* partial) {
  const float by_s = inverse_mean(m, total, 1), by_t = inverse_mean(m, total, 2);
  float sums[3] = {};
  for (int k = 0; k < kPairs; k += kThreads) {
    const Pair p = pair_at(m, int64_t{blockIdx.x} * kPairs + k + threadIdx.x);
    const float x = apart(p.s * by_s, p.t * by_t) / m.beta, c = huber_slope(x, 1.f);
    sums[0] += p.weight * huber_value(x, c, 0.5f);
    sums[1] += p.weight * c * p.s;
    sums[2] += p.weight * c * p.t;
  }
  for (int f = 0; f < 3; ++f) {
    const float sum = block_sum<kThreads>(sums[f]);
    if (threadIdx.x == 0) partial[int64_t{blockIdx.x} * kFields + f] = sum;
  }
}

// total[f] = sum over blocks in a fixed order; one block a field.
__global__ void __launch_bounds__(kThreads)
    total_kernel(const float* partial, int64_t count, float* total) {
  double sum = 0.0;
  for (int64_t k = threadIdx.x; k < count; k += kThreads) sum += partial[k * kFields + blockIdx.x];
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) total[blockIdx.x] = static_cast<float>(sum);
}

__global__ void __launch_bounds__(kThreads)
    match_kernel(Match m, const float* total, float divisor, bool by_kept, float* loss, float* ds,
                 float* dt) {
  const float kept = total[0];
  const float scale = by_kept ? (kept != 0.f ? 1.f / kept : 0.f) : divisor;
  if (blockIdx.x == 0 && threadIdx.x == 0) *loss = total[kFields] * m.beta * scale;
  const float by_s = inverse_mean(m, total, 1), by_t = inverse_mean(m, total, 2);
  const float mean_s = through_mean(m, total, 1), mean_t = -through_mean(m, total, 2);
  for (int k = 0; k < kPairs; k += kThreads) {
    const int64_t at = int64_t{blockIdx.x} * kPairs + k + threadIdx.x;
    if (at >= m.n * m.n) continue;
    const Pair p = pair_at(m, at);
    const bool itself = at / m.n == at % m.n;
    const float c = huber_slope(apart(p.s * by_s, p.t * by_t) / m.beta, 1.f),
                factor = scale * p.weight;
    if (ds)
      ds[at] =
          itself ? 0.f
                 : factor * (c * by_s - mean_s) * distance_slope(p.s2, p.s, m.eps, 1.f, m.squared);
    if (dt)
      dt[at] =
          itself ? 0.f
                 : factor * (-c * by_t - mean_t) * distance_slope(p.t2, p.t, m.eps, 1.f, m.squared);
  }
}

void require(bool ok, const char* message) {
  if (!ok) throw std::invalid_argument(message);
}

template <typename T>
void run_forward(Tensor x, Tensor hi, Tensor lo, int64_t device, int64_t stream) {
  const int64_t n = x.shape[0], tiles = blocks_of(n, kTile);
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(tiles));
  const LaunchConfig config{"pairwise_distance", grid, dim3(kThreads), device, stream};
  launch(config, lo ? distance_kernel<T, double> : distance_kernel<T, float>, x.as<T>(),
         x.stride[0], n, x.shape[1], hi.as<float>(), lo.as<float>());
}

template <typename T, typename Out>
void run_backward(Tensor x, Tensor weights, Tensor dx, int64_t device, int64_t stream) {
  const int64_t n = x.shape[0];
  const dim3 grid(static_cast<unsigned>(blocks_of(n, kSide)),
                  static_cast<unsigned>(blocks_of(x.shape[1], kWidth)));
  launch({"pairwise_distance gradient", grid, dim3(kThreads), device, stream},
         gradient_kernel<T, Out>, x.as<T>(), x.stride[0], n, x.shape[1], weights.as<float>(),
         dx.as<Out>(), dx.stride[0]);
}
template <typename T>
void run_backward(Tensor x, Tensor weights, Tensor dx, int64_t device, int64_t stream) {
  if (dx.dtype == DType::f32) return run_backward<T, float>(x, weights, dx, device, stream);
  run_backward<T, T>(x, weights, dx, device, stream);
}

}  // namespace

void pairwise_distance_forward(Tensor x, Tensor hi, Tensor lo, int64_t device, int64_t stream) {
  switch (x.dtype) {
    case DType::f32: return run_forward<float>(x, hi, lo, device, stream);
    case DType::f16: return run_forward<__half>(x, hi, lo, device, stream);
    case DType::bf16: return run_forward<__nv_bfloat16>(x, hi, lo, device, stream);
    default: require(false, "pairwise_distance_forward: x must be f32, f16 or bf16");
  }
}
KDK_EXPORT(pairwise_distance_forward)

void pairwise_distance_backward(Tensor x, Tensor weights, Tensor dx, int64_t device,
                                int64_t stream) {
  require(dx.dtype == x.dtype || dx.dtype == DType::f32,
          "pairwise_distance_backward: dx must be f32 or have x's dtype");
  switch (x.dtype) {
    case DType::f32: return run_backward<float>(x, weights, dx, device, stream);
    case DType::f16: return run_backward<__half>(x, weights, dx, device, stream);
    case DType::bf16: return run_backward<__nv_bfloat16>(x, weights, dx, device, stream);
    default: require(false, "pairwise_distance_backward: x must be f32, f16 or bf16");
  }
}
KDK_EXPORT(pairwise_distance_backward)

// `scratch`: 8 floats for every 1024 pairs, and 16 more.
void distance_match(Tensor student, Tensor teacher, Tensor mask, Tensor scalars, Tensor loss,
                    Tensor ds, Tensor dt, bool squared, bool normalize, int64_t reduction,
                    Tensor scratch, int64_t device, int64_t stream) {
  const int64_t n = student.shape[0], blocks = blocks_of(n * n, kPairs);
  require(scratch.numel() >= blocks * kFields + 2 * kFields,
          "distance_match: scratch is too small");
  const Match m{student.as<float>(),        teacher.as<float>(),       mask.as<float>(), n,
                scalars.as<float>()[kBeta], scalars.as<float>()[kEps], squared,          normalize};
  float *total = scratch.as<float>(), *partial = total + 2 * kFields;
  const dim3 grid(static_cast<unsigned>(blocks)), block(kThreads);
  launch({"distance_match means", grid, block, device, stream}, mean_kernel, m, partial);
  launch({"distance_match total", dim3(5), block, device, stream}, total_kernel, partial, blocks,
         total);
  launch({"distance_match values", grid, block, device, stream}, value_kernel, m, total, partial);
  launch({"distance_match total", dim3(3), block, device, stream}, total_kernel, partial, blocks,
         total + kFields);
  const float pairs = static_cast<float>(n) * static_cast<float>(n);
  launch({"distance_match", ds || dt ? grid : dim3(1), block, device, stream}, match_kernel, m,
         total, reduction == kAllPairs ? 1.f / pairs : 1.f, reduction == kKeptPairs,
         loss.as<float>(), ds.as<float>(), dt.as<float>());
}
KDK_EXPORT(distance_match)

}  // namespace KDK_NAMESPACE
