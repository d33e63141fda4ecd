// The angle match of all triplets of samples, from both models' squared distances.
//
// A block has a tile of ordered pairs (p, q) and gathers all three roles of them over the third
// sample r: the angle at p between q and r, and the angle at r between p and q. Nothing is added
// from two blocks, so there are no atomics, at the price of looking at each triplet twice. See
// kdkernels/ops/triplet_angle/README.md.
#include "common/cuda.cuh"
#include "common/registry.h"
#include "triplet_angle/math.h"

namespace KDK_NAMESPACE {
namespace {

constexpr int kSide = 16;  // threads on a side of a block
constexpr int kThreads = kSide * kSide;
constexpr int kTile = 2 * kSide;  // pairs on a side of a tile, 2 x 2 a thread
constexpr int kOthers = 16;       // third samples in shared memory at a time
constexpr int kPitch = kTile + 1;

// Both models' d2 in two parts and 1 / (d sqrt(2 beta)).
struct Sides {
  float s_hi, s_lo, s_inv, t_hi, t_lo, t_inv;
};
constexpr int kFields = 6;

struct Job {
  const float *s_hi, *s_lo, *t_hi, *t_lo;
  float* grad;
  int64_t n;
  float beta, scale;
};

__device__ inline Sides sides_at(const Job& job, int64_t i, int64_t j) {
  if (i >= job.n || j >= job.n) return {0.f, 0.f, 0.f, 0.f, 0.f, 0.f};
  const int64_t at = i * job.n + j;
  const float s = job.s_hi[at], t = job.t_hi[at];
  return {s, job.s_lo[at], inverse_distance(s, job.beta),
          t, job.t_lo[at], inverse_distance(t, job.beta)};
}
__device__ inline void put(float* tile, int at, const Sides& x) {
  constexpr int kSize = kOthers * kPitch;
  tile[at] = x.s_hi, tile[kSize + at] = x.s_lo, tile[2 * kSize + at] = x.s_inv;
  tile[3 * kSize + at] = x.t_hi, tile[4 * kSize + at] = x.t_lo, tile[5 * kSize + at] = x.t_inv;
}
__device__ inline Sides get(const float* tile, int at) {
  constexpr int kSize = kOthers * kPitch;
  return {tile[at],
          tile[kSize + at],
          tile[2 * kSize + at],
          tile[3 * kSize + at],
          tile[4 * kSize + at],
          tile[5 * kSize + at]};
}

// The difference of both models' cosines over beta of the angle between sides a and b, opposite c.
struct Angle {
  float weight, cosine, difference;
};
__device__ inline Angle angle(const Sides& a, const Sides& b, const Sides& c) {
  const float weight = a.s_inv * b.s_inv;
  const float s = weight * numerator(a.s_hi, b.s_hi, c.s_hi, a.s_lo, b.s_lo, c.s_lo);
  const float t = a.t_inv * b.t_inv * numerator(a.t_hi, b.t_hi, c.t_hi, a.t_lo, b.t_lo, c.t_lo);
  return {weight, s, apart(s, t)};
}

struct Sums {
  float t, q, opposite;
};

template <bool kGrad>
__global__ void __launch_bounds__(kThreads) angle_kernel(Job job, float* partial) {
  // [field][r][p or q]
  SMEM_STATIC(float, at_p, kFields * kOthers * kPitch);
  SMEM_STATIC(float, at_q, kFields * kOthers * kPitch);
  const int64_t p0 = int64_t{blockIdx.y} * kTile, q0 = int64_t{blockIdx.x} * kTile;
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
  Sides own[2][2];
  Sums sums[2][2] = {};
#pragma unroll
  for (int u = 0; u < 2; ++u)
#pragma unroll
    for (int v = 0; v < 2; ++v) own[u][v] = sides_at(job, p0 + ty + u * kSide, q0 + tx + v * kSide);
  float loss = 0.f;
  for (int64_t r0 = 0; r0 < job.n; r0 += kOthers) {
    for (int k = threadIdx.x; k < kOthers * kTile; k += kThreads) {
      const int r = k / kTile, other = k % kTile;
      put(at_p, r * kPitch + other, sides_at(job, r0 + r, p0 + other));
      put(at_q, r * kPitch + other, sides_at(job, r0 + r, q0 + other));
    }
    __syncthreads();
    Sums part[2][2] = {};  // a tile's sums go to the whole ones as one number
    float part_loss = 0.f;
    for (int r = 0; r < kOthers; ++r) {
      const Sides b[2] = {get(at_p, r * kPitch + ty), get(at_p, r * kPitch + ty + kSide)};
      const Sides c[2] = {get(at_q, r * kPitch + tx), get(at_q, r * kPitch + tx + kSide)};
#pragma unroll
      for (int u = 0; u < 2; ++u) {
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          Angle x = angle(own[u][v], b[u], c[v]);
          const bool itself = r0 + r == q0 + tx + v * kSide;
          // The angle of a side with itself is 1, or 0 where it has no length, without gradient.
          if (itself)
            x = {0.f, 0.f,
                 ((own[u][v].s_hi > 0.f ? 1.f : 0.f) - (own[u][v].t_hi > 0.f ? 1.f : 0.f)) /
                     job.beta};
          const float slope = huber_slope(x.difference, 1.f);
          part_loss += huber_value(x.difference, slope, 0.5f);
          if constexpr (kGrad) {
            part[u][v].t += slope * x.weight;
            part[u][v].q += slope * x.cosine;
            const Angle y = angle(b[u], c[v], own[u][v]);
            part[u][v].opposite += huber_slope(y.difference, 1.f) * y.weight;
          }
        }
      }
    }
    loss += part_loss;
    if constexpr (kGrad) {
#pragma unroll
      for (int u = 0; u < 2; ++u)
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          sums[u][v].t += part[u][v].t;
          sums[u][v].q += part[u][v].q;
          sums[u][v].opposite += part[u][v].opposite;
        }
    }
    __syncthreads();
  }
  if constexpr (kGrad) {
    for (int u = 0; u < 2; ++u) {
      for (int v = 0; v < 2; ++v) {
        const int64_t p = p0 + ty + u * kSide, q = q0 + tx + v * kSide;
        if (p >= job.n || q >= job.n) continue;
        // Once for each order of the sides; the opposite role is seen from (p, q) and from (q, p).
        const float inverse = own[u][v].s_inv;
        const float g = 2.f * (sums[u][v].t - job.beta * (inverse * inverse * sums[u][v].q)) -
                        sums[u][v].opposite;
        job.grad[p * job.n + q] = p == q ? 0.f : job.beta * job.scale * g;
      }
    }
  }
  loss = block_sum<kThreads>(loss);
  if (threadIdx.x == 0) partial[int64_t{blockIdx.y} * gridDim.x + blockIdx.x] = loss;
}

__global__ void __launch_bounds__(kThreads)
    total_kernel(const float* partial, int64_t count, float factor, float* loss) {
  double sum = 0.0;
  for (int64_t k = threadIdx.x; k < count; k += kThreads) sum += partial[k];
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) *loss = static_cast<float>(sum * factor);
}

}  // namespace

// `scratch`: a float for every 32 x 32 pairs.
void triplet_angle(Tensor student, Tensor student_lo, Tensor teacher, Tensor teacher_lo,
                   Tensor scalars, Tensor loss, Tensor ds, Tensor dt, Tensor scratch,
                   int64_t device, int64_t stream) {
  const int64_t n = student.shape[0], tiles = (n + kTile - 1) / kTile;
  if (scratch.numel() < tiles * tiles)
    throw std::invalid_argument("triplet_angle: scratch is too small");
  const float beta = scalars.as<float>()[0], scale = scalars.as<float>()[1];
  const Job by_student{student.as<float>(),
                       student_lo.as<float>(),
                       teacher.as<float>(),
                       teacher_lo.as<float>(),
                       ds.as<float>(),
                       n,
                       beta,
                       scale};
  // The loss is symmetric in the models: the teacher's gradient is the student's, exchanged.
  const Job by_teacher{by_student.t_hi,
                       by_student.t_lo,
                       by_student.s_hi,
                       by_student.s_lo,
                       dt.as<float>(),
                       n,
                       beta,
                       scale};
  float* partial = scratch.as<float>();
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(tiles));
  const LaunchConfig config{"triplet_angle", grid, dim3(kThreads), device, stream};
  if (dt) launch(config, angle_kernel<true>, by_teacher, partial);
  if (ds) launch(config, angle_kernel<true>, by_student, partial);
  if (!ds && !dt) launch(config, angle_kernel<false>, by_student, partial);
  launch({"triplet_angle total", dim3(1), dim3(kThreads), device, stream}, total_kernel, partial,
         tiles * tiles, beta * scale, loss.as<float>());
}
KDK_EXPORT(triplet_angle)

}  // namespace KDK_NAMESPACE
