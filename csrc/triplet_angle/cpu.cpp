// The angle match of all triplets of samples, from both models' squared distances.
//
// Vector lanes are vertices i, and register blocks are 2 x 2 sides (j, k): every load is of
// consecutive floats of a symmetric matrix's row, and all three roles of a pair are summed without
// a horizontal step. For a share of the vertices, the rows of all sides are packed; then tiles of
// sides meet in pairs, as teams in a tournament. The games of a round share no tile, so each thread
// owns the rows that it adds to, and the order of the sums does not depend on the number of
// threads. See kdkernels/ops/triplet_angle/README.md.
#include "common/lanes.h"
#include "common/parallel.h"
#include "common/registry.h"
#include "triplet_angle/math.h"

namespace KDK_NAMESPACE {
namespace {

constexpr int64_t kShare = 1024;  // vertices whose packed rows are there at once
constexpr int64_t kLanes = 128;   // vertices of a packed row
constexpr int64_t kSides = 4;     // sides whose packed rows stay in the first-level cache

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// One side's packed row: of kLanes vertices i, both models' d2_ij in two parts and 1/d_ij, and the
// sums over the other sides k of slope times weight and of slope times cosine.
enum Field : int {
  kHiS,
  kLoS,
  kInvS,
  kHiT,
  kLoT,
  kInvT,
  kFields,
  kSumT = kFields,
  kSumQ,
  kAllFields
};
constexpr int64_t kRow = kAllFields * kLanes;

struct Job {
  const float *s_hi, *s_lo, *t_hi, *t_lo;
  float* grad;  // null: forward only
  int64_t n;
  float beta;
};

// One side's two-part squared distance to another, broadcast.
struct Opposite {
  Floats s_hi, s_lo, t_hi, t_lo;
};
KDK_INLINE Opposite opposite(const Job& job, int64_t j, int64_t k) {
  const int64_t at = j * job.n + k;
  return {broadcast(job.s_hi[at]), broadcast(job.s_lo[at]), broadcast(job.t_hi[at]),
          broadcast(job.t_lo[at])};
}

KDK_INLINE Floats field(const float* row, int f, int64_t i) { return load(row + f * kLanes + i); }

// Triplets of the sides j..j+J-1 and k..k+K-1 and all `lanes` vertices; returns the sum of losses
// over beta. The packed rows are `rows` + side * kRow.
template <bool kGrad, int J, int K>
Floats block(const Job& job, float* rows, int64_t j, int64_t k, int64_t lanes) {
  float* pj[J];
  float* pk[K];
  Opposite c[J][K];
  for (int a = 0; a < J; ++a) pj[a] = rows + (j + a) * kRow;
  for (int b = 0; b < K; ++b) pk[b] = rows + (k + b) * kRow;
  for (int a = 0; a < J; ++a)
    for (int b = 0; b < K; ++b) c[a][b] = opposite(job, j + a, k + b);
  const Floats one = broadcast(1.f), half = broadcast(0.5f);
  Floats loss = {}, pair[J][K] = {};
  for (int64_t i = 0; i < lanes; i += kFloats) {
    Floats sum_t[K], sum_q[K];
    if constexpr (kGrad)
      for (int b = 0; b < K; ++b)
        sum_t[b] = field(pk[b], kSumT, i), sum_q[b] = field(pk[b], kSumQ, i);
    for (int a = 0; a < J; ++a) {
      Floats own_t, own_q;
      if constexpr (kGrad) own_t = field(pj[a], kSumT, i), own_q = field(pj[a], kSumQ, i);
      for (int b = 0; b < K; ++b) {
        const Opposite& o = c[a][b];
        const Floats weight = field(pj[a], kInvS, i) * field(pk[b], kInvS, i);
        const Floats cos_s =
            weight * numerator(field(pj[a], kHiS, i), field(pk[b], kHiS, i), o.s_hi,
                               field(pj[a], kLoS, i), field(pk[b], kLoS, i), o.s_lo);
        const Floats cos_t = field(pj[a], kInvT, i) * field(pk[b], kInvT, i) *
                             numerator(field(pj[a], kHiT, i), field(pk[b], kHiT, i), o.t_hi,
                                       field(pj[a], kLoT, i), field(pk[b], kLoT, i), o.t_lo);
        const Floats x = cos_s - cos_t, slope = huber_slope(x, one);
        loss += huber_value(x, slope, half);
        if constexpr (kGrad) {
          const Floats t = slope * weight, q = slope * cos_s;
          own_t += t, own_q += q;
          sum_t[b] += t, sum_q[b] += q;
          pair[a][b] += t;
        }
      }
      if constexpr (kGrad)
        store(pj[a] + kSumT * kLanes + i, own_t), store(pj[a] + kSumQ * kLanes + i, own_q);
    }
    if constexpr (kGrad)
      for (int b = 0; b < K; ++b)
        store(pk[b] + kSumT * kLanes + i, sum_t[b]), store(pk[b] + kSumQ * kLanes + i, sum_q[b]);
  }
  if constexpr (kGrad)
    for (int a = 0; a < J; ++a)
      for (int b = 0; b < K; ++b) job.grad[(j + a) * job.n + k + b] -= sum_of<float>(pair[a][b]);
  return loss;
}

// All pairs j < k with j in [j0, j1) and k in [k0, k1); the two ranges are equal or disjoint.
template <bool kGrad>
KDK_ONE_COPY double sides(const Job& job, float* rows, int64_t j0, int64_t j1, int64_t k0,
                          int64_t k1, int64_t lanes) {
  double loss = 0.0;
  for (int64_t kk = k0; kk < k1; kk += kSides) {
    const int64_t end = least(kk + kSides, k1);
    Floats part = {};
    for (int64_t j = j0; j < j1; j += 2) {
      if (j0 == k0 && j >= end) break;
      int64_t k = kk;
      if (j0 == k0 && j >= kk) {
        if (j + 1 < j1) part += block<kGrad, 1, 1>(job, rows, j, j + 1, lanes);
        k = j + 2;
      }
      const bool two = j + 1 < j1;
      for (; k + 1 < end && two; k += 2) part += block<kGrad, 2, 2>(job, rows, j, k, lanes);
      for (; k < end; ++k) {
        part += block<kGrad, 1, 1>(job, rows, j, k, lanes);
        if (two) part += block<kGrad, 1, 1>(job, rows, j + 1, k, lanes);
      }
    }
    loss += static_cast<double>(sum_of<float>(part));
  }
  return loss;
}

// Packs the columns [i0, i0 + lanes) of side j's row, the lanes beyond n as coincident samples.
KDK_ONE_COPY void pack(const Job& job, int64_t j, int64_t i0, int64_t lanes, float* row) {
  const int64_t at = j * job.n + i0, used = least(lanes, job.n - i0);
  const float* from[4] = {job.s_hi + at, job.s_lo + at, job.t_hi + at, job.t_lo + at};
  const int to[4] = {kHiS, kLoS, kHiT, kLoT};
  for (int f = 0; f < 4; ++f) {
    memcpy(row + to[f] * kLanes, from[f], static_cast<size_t>(used) * 4);
    for (int64_t i = used; i < lanes; ++i) row[to[f] * kLanes + i] = 0.f;
  }
#pragma omp simd
  for (int64_t i = 0; i < lanes; ++i) {
    row[kInvS * kLanes + i] = inverse_distance(row[kHiS * kLanes + i], job.beta);
    row[kInvT * kLanes + i] = inverse_distance(row[kHiT * kLanes + i], job.beta);
    row[kSumT * kLanes + i] = row[kSumQ * kLanes + i] = 0.f;
  }
}

// What side j is to the vertices of a packed row: T - Q / d^2, into its row of the gradient.
KDK_ONE_COPY void add_roles(const Job& job, int64_t j, int64_t i0, const float* row) {
  float* out = job.grad + j * job.n + i0;
  const float *t = row + kSumT * kLanes, *q = row + kSumQ * kLanes, *inverse = row + kInvS * kLanes;
  const int64_t used = least(kLanes, job.n - i0);
#pragma omp simd
  for (int64_t i = 0; i < used; ++i) out[i] += t[i] - job.beta * (inverse[i] * inverse[i] * q[i]);
}

// grad = scale * (grad + its transpose), the diagonal 0.
void symmetrise(const Job& job, float scale, int64_t threads) {
  constexpr int64_t kTile = 32;
  const int64_t n = job.n, tiles = (n + kTile - 1) / kTile;
  // Row t of tiles has tiles - t of them: the first and the last together are always as many.
  parallel_for((tiles + 1) / 2, n * n, threads, [&](int64_t begin, int64_t end) {
    for (int64_t half = begin; half < end; ++half) {
      for (int64_t side = 0; side < 2; ++side) {
        const int64_t t = side ? tiles - 1 - half : half;
        if (side && t == half) break;
        for (int64_t u = t; u < tiles; ++u) {
          for (int64_t j = t * kTile; j < least((t + 1) * kTile, n); ++j) {
            for (int64_t k = u == t ? j : u * kTile; k < least((u + 1) * kTile, n); ++k) {
              float &a = job.grad[j * n + k], &b = job.grad[k * n + j];
              a = b = j == k ? 0.f : scale * (a + b);
            }
          }
        }
      }
    }
  });
}

// How many tiles the sides are cut into, an odd number: more would mean more rounds to wait for,
// fewer would leave threads without a game.
int64_t teams_of(int64_t n) { return n <= 128 ? 7 : n <= 1024 ? 15 : 63; }

// Sum over triplets j < k of the losses over beta; the unscaled gradient in job.grad.
template <bool kGrad>
double triplets(const Job& job, int64_t threads) {
  const int64_t n = job.n, teams = teams_of(n), tile = (n + 2 * teams - 1) / (2 * teams) * 2;
  const int64_t games = (teams + 1) / 2, share = least(kShare, (n + kLanes - 1) / kLanes * kLanes);
  Scratch memory;
  float* packed = memory.floats(n * (share / kLanes) * kRow + 2 * teams);
  double* losses = reinterpret_cast<double*>(packed + n * (share / kLanes) * kRow);
  for (int64_t t = 0; t < teams; ++t) losses[t] = 0.0;
  auto first = [&](int64_t team) { return least(team * tile, n); };

  for (int64_t start = 0; start < n; start += share) {
    const int64_t vertices = least(share, n - start), blocks = (vertices + kLanes - 1) / kLanes;
    auto lanes_of = [&](int64_t block) {
      return (least(kLanes, vertices - block * kLanes) + kFloats - 1) / kFloats * kFloats;
    };
    // Row j of block b, so that a block's rows are side by side.
    auto row = [&](int64_t block, int64_t j) { return packed + (block * n + j) * kRow; };
    parallel_for(n, n * vertices, threads, [&](int64_t begin, int64_t end) {
      for (int64_t b = 0; b < blocks; ++b)
        for (int64_t j = begin; j < end; ++j)
          pack(job, j, start + b * kLanes, lanes_of(b), row(b, j));
    });
    for (int64_t round = 0; round < teams; ++round) {
      parallel_for(games, games * tile * tile * vertices, threads, [&](int64_t begin, int64_t end) {
        for (int64_t game = begin; game < end; ++game) {
          // Teams whose numbers add up to twice the round's; one of them meets itself.
          const int64_t x = (round + game) % teams, y = (round - game + teams) % teams;
          const int64_t a = x < y ? x : y, b = x < y ? y : x;
          for (int64_t v = 0; v < blocks; ++v)
            losses[a] += sides<kGrad>(job, row(v, 0), first(a), first(a + 1), first(b),
                                      first(b + 1), lanes_of(v));
        }
      });
    }
    if constexpr (kGrad)
      parallel_for(n, n * vertices, threads, [&](int64_t begin, int64_t end) {
        for (int64_t b = 0; b < blocks; ++b)
          for (int64_t j = begin; j < end; ++j) add_roles(job, j, start + b * kLanes, row(b, j));
      });
  }
  double sum = 0.0;
  for (int64_t t = 0; t < teams; ++t) sum += losses[t];
  return sum;
}

// How many ordered pairs coincide in one model only: there the angle of a side with itself is
// 0 in one and 1 in the other.
int64_t unequal_pairs(const Job& job) {
  int64_t count = 0;
  for (int64_t i = 0; i < job.n * job.n; ++i) count += (job.s_hi[i] > 0.f) != (job.t_hi[i] > 0.f);
  return count;
}

void fill_zero(float* x, int64_t n, int64_t threads) {
  parallel_for(n, n, threads, [&](int64_t begin, int64_t end) {
    memset(x + begin, 0, static_cast<size_t>(end - begin) * 4);
  });
}

void triplet_angle(Tensor student, Tensor student_lo, Tensor teacher, Tensor teacher_lo,
                   Tensor scalars, Tensor loss, Tensor ds, Tensor dt, int64_t threads) {
  const int64_t n = student.shape[0];
  const float beta = scalars.as<float>()[0], scale = scalars.as<float>()[1];
  Job job{student.as<float>(),
          student_lo.as<float>(),
          teacher.as<float>(),
          teacher_lo.as<float>(),
          nullptr,
          n,
          beta};
  double sum = 0.0;
  bool summed = false;
  for (int side = 0; side < 2; ++side) {
    float* grad = side ? dt.as<float>() : ds.as<float>();
    if (!grad) continue;
    // The loss is symmetric in the models: the teacher's gradient is the student's, exchanged.
    const Job own = side ? Job{job.t_hi, job.t_lo, job.s_hi, job.s_lo, grad, n, beta}
                         : Job{job.s_hi, job.s_lo, job.t_hi, job.t_lo, grad, n, beta};
    fill_zero(grad, n * n, threads);
    const double value = triplets<true>(own, threads);
    if (!summed) sum = value;
    summed = true;
    // Twice for (j, k) and (k, j); half to each of the two places of a pair.
    symmetrise(own, scale * beta, threads);
  }
  if (!summed) sum = triplets<false>(job, threads);
  const float c = huber_slope(1.f / beta, 1.f);
  sum = 2.0 * sum + static_cast<double>(unequal_pairs(job)) * huber_value(1.f / beta, c, 0.5f);
  *loss.as<float>() = static_cast<float>(sum * beta * scale);
}

KDK_EXPORT(triplet_angle)

}  // namespace
}  // namespace KDK_NAMESPACE
