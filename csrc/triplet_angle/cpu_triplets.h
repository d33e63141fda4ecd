// The angle match of all triplets of samples, from both models' squared distances.
//
// Vector lanes are vertices i, and register blocks are 2 x 2 sides (j, k): every load is of
// consecutive floats, and the two roles at the vertex are summed without a horizontal step. The
// rows of all sides are packed for a share of the vertices. Few samples: a thread has some shares
// and all their pairs of sides. Many: tiles of sides meet in pairs, as teams in a tournament; the
// games of a round touch no common tile, so each thread owns the rows that it adds to. Either way
// the order of the sums does not depend on the number of threads.
// See kdkernels/ops/triplet_angle/README.md.
#pragma once
#include "common/lanes.h"
#include "common/parallel.h"
#include "pairwise_distance/cpu_distances.h"
#include "triplet_angle/math.h"

namespace KDK_NAMESPACE {
namespace triplets {

constexpr int64_t kFew = 192;        // samples up to which threads share vertices, not sides
constexpr int64_t kFewLanes = 32;    // vertices of a share then
constexpr int64_t kManyLanes = 128;  // vertices of a packed row otherwise
constexpr int64_t kShare = 1024;     // vertices whose packed rows are there at once
constexpr int64_t kCached = 512;     // vertices times sides whose packed rows stay in the L1 cache

// Matrices of both models: the squared distances as the numerators want them, `plane[p]` being
// kPlanes / 2 of the student and then as many of the teacher, and 1/d.
struct Job {
  const float* plane[4];
  const float* inverse[2];
  float unit[2];  // of the planes' numbers
  float* grad;    // null: forward only
  int64_t n;
  float beta;
};

// x cut to [-1, 1].
KDK_INLINE Floats to_one(Floats x) {
#if defined(__AVX512DQ__)
  return _mm512_maskz_range_ps(0xffff, x, broadcast(1.f), 2);  // the lesser magnitude, x's sign
#else
  return huber_slope(x, broadcast(1.f));
#endif
}

// Two floats, good for any range of distances: 7 operations a numerator.
struct Split {
  static constexpr int kPlanes = 4;
  struct Pair {
    Floats hi, lo;
  };
  static KDK_INLINE Pair at(const float* x) { return {load(x), load(x + kFloats)}; }
  static KDK_INLINE Pair broadcast_at(const Job& job, int model, int64_t at) {
    return {broadcast(job.plane[2 * model][at]), broadcast(job.plane[2 * model + 1][at])};
  }
  static KDK_INLINE Floats numerator_of(Pair a, Pair b, Pair c) {
    return numerator(a.hi, b.hi, c.hi, a.lo, b.lo, c.lo);
  }
};

// Integers of 30 bits: where no distance is a small part of another, sums lose nothing and take 3.
struct Fixed {
  static constexpr int kPlanes = 2;
  typedef Ints Pair;
  static KDK_INLINE Pair at(const float* x) {
    Ints v;
    memcpy(&v, x, sizeof(v));
    return v;
  }
  static KDK_INLINE Pair broadcast_at(const Job& job, int model, int64_t at) {
    int32_t x;
    memcpy(&x, job.plane[model] + at, 4);
    return x - Ints{};
  }
  static KDK_INLINE Floats numerator_of(Pair a, Pair b, Pair c) { return to_floats(a + b - c); }
};

// A side's packed row, for every kFloats vertices i: the planes of d2_ij, both models' 1/d_ij, and
// the sums over the other sides k of slope / d_ik and of slope times cosine.
template <typename Form>
struct Row {
  static constexpr int64_t kInvS = Form::kPlanes * kFloats, kInvT = kInvS + kFloats,
                           kSumT = kInvT + kFloats, kSumQ = kSumT + kFloats,
                           kStep = kSumQ + kFloats;
  static int64_t size(int64_t lanes) { return lanes / kFloats * kStep; }
};

// Triplets of the sides j..j+J-1 and k..k+K-1 and the vertices of packed rows; returns the sum of
// losses over beta. What pairs of sides get as the opposite one is taken from `opposite`.
template <typename Form, bool kGrad, int J, int K>
KDK_INLINE Floats block(const Job& job, float* opposite, float* rows, int64_t size, int64_t j,
                        int64_t k) {
  typedef Row<Form> R;
  constexpr int64_t kTeacher = Form::kPlanes / 2 * kFloats;
  float* pj[J];
  float* pk[K];
  typename Form::Pair s_jk[J][K], t_jk[J][K];
  for (int a = 0; a < J; ++a) pj[a] = rows + (j + a) * size;
  for (int b = 0; b < K; ++b) pk[b] = rows + (k + b) * size;
  for (int a = 0; a < J; ++a)
    for (int b = 0; b < K; ++b) {
      s_jk[a][b] = Form::broadcast_at(job, 0, (j + a) * job.n + k + b);
      t_jk[a][b] = Form::broadcast_at(job, 1, (j + a) * job.n + k + b);
    }
  const Floats half = broadcast(0.5f);
  Floats loss = {}, pair[J][K] = {};
  for (int64_t i = 0; i < size; i += R::kStep) {
    Floats sum_t[K], sum_q[K];
    if constexpr (kGrad)
      for (int b = 0; b < K; ++b)
        sum_t[b] = load(pk[b] + i + R::kSumT), sum_q[b] = load(pk[b] + i + R::kSumQ);
    Floats other_s[K], other_t[K];
    for (int b = 0; b < K; ++b) {
      other_s[b] = in_register(load(pk[b] + i + R::kInvS));
      other_t[b] = in_register(load(pk[b] + i + R::kInvT));
    }
    for (int a = 0; a < J; ++a) {
      const float* const x = pj[a] + i;
      const Floats inv_s = in_register(load(x + R::kInvS)), inv_t = in_register(load(x + R::kInvT));
      const auto x_s = Form::at(x), x_t = Form::at(x + kTeacher);
      Floats own_t, own_q;
      if constexpr (kGrad) own_t = load(x + R::kSumT), own_q = load(x + R::kSumQ);
      for (int b = 0; b < K; ++b) {
        const float* const y = pk[b] + i;
        const Floats weight = inv_s * other_s[b];
        const Floats cos_s = in_register(weight * Form::numerator_of(x_s, Form::at(y), s_jk[a][b]));
        const Floats cos_t = in_register(
            inv_t * other_t[b] * Form::numerator_of(x_t, Form::at(y + kTeacher), t_jk[a][b]));
        const Floats d = cos_s - cos_t, slope = to_one(d);
        loss += huber_value(d, slope, half);
        if constexpr (kGrad) {
          const Floats q = in_register(slope * cos_s);
          own_t += slope * other_s[b], sum_t[b] += slope * inv_s;
          own_q += q, sum_q[b] += q;
          pair[a][b] += slope * weight;
        }
      }
      if constexpr (kGrad) store(pj[a] + i + R::kSumT, own_t), store(pj[a] + i + R::kSumQ, own_q);
    }
    if constexpr (kGrad)
      for (int b = 0; b < K; ++b)
        store(pk[b] + i + R::kSumT, sum_t[b]), store(pk[b] + i + R::kSumQ, sum_q[b]);
  }
  if constexpr (kGrad)
    for (int a = 0; a < J; ++a)
      for (int b = 0; b < K; ++b) opposite[(j + a) * job.n + k + b] -= sum_of<float>(pair[a][b]);
  return loss;
}

// All pairs j < k with j in [j0, j1) and k in [k0, k1); the two ranges are equal or disjoint.
template <typename Form, bool kGrad>
KDK_ONE_COPY double sides(const Job& job, float* opposite, float* rows, int64_t lanes, int64_t j0,
                          int64_t j1, int64_t k0, int64_t k1) {
  // An even number: two sides j go together, and never across the beginning of a range of sides k.
  const int64_t size = Row<Form>::size(lanes), together = kCached / lanes / 2 * 2;
  double loss = 0.0;
  for (int64_t kk = k0; kk < k1; kk += together) {
    const int64_t end = least(kk + together, k1);
    Floats part = {};
    for (int64_t j = j0; j < j1; j += 2) {
      if (j0 == k0 && j >= end) break;
      const bool two = j + 1 < j1;
      int64_t k = kk;
      if (j0 == k0 && j >= kk) {
        if (two) part += block<Form, kGrad, 1, 1>(job, opposite, rows, size, j, j + 1);
        k = j + 2;
      }
      for (; k + 1 < end && two; k += 2)
        part += block<Form, kGrad, 2, 2>(job, opposite, rows, size, j, k);
      for (; k < end; ++k) {
        part += block<Form, kGrad, 1, 1>(job, opposite, rows, size, j, k);
        if (two) part += block<Form, kGrad, 1, 1>(job, opposite, rows, size, j + 1, k);
      }
    }
    loss += static_cast<double>(sum_of<float>(part));
  }
  return loss;
}

// Packs the vertices [i0, i0 + lanes) of side j's row, those beyond n as coincident samples.
template <typename Form>
KDK_ONE_COPY void pack(const Job& job, int64_t j, int64_t i0, int64_t lanes, float* row) {
  typedef Row<Form> R;
  constexpr int kFields = Form::kPlanes + 2;
  const float* from[kFields] = {};
  for (int p = 0; p < Form::kPlanes; ++p) from[p] = job.plane[p] + j * job.n + i0;
  for (int m = 0; m < 2; ++m) from[Form::kPlanes + m] = job.inverse[m] + j * job.n + i0;
  const int64_t used = least(lanes, job.n - i0);
  for (int64_t i = 0; i < lanes; i += kFloats, row += R::kStep) {
    for (int f = 0; f < kFields; ++f) {
      if (i + kFloats <= used) {
        store(row + f * kFloats, load(from[f] + i));
      } else {
        store(row + f * kFloats, Floats{});
        memcpy(row + f * kFloats, from[f] + i, static_cast<size_t>(used - i) * 4);
      }
    }
    store(row + R::kSumT, Floats{});
    store(row + R::kSumQ, Floats{});
  }
}

// What side j is to the vertices of a packed row: T - Q / d^2, into its row of the gradient.
template <typename Form>
KDK_ONE_COPY void add_roles(const Job& job, int64_t j, int64_t i0, int64_t lanes,
                            const float* row) {
  typedef Row<Form> R;
  const Floats beta = broadcast(job.beta);
  float* out = job.grad + j * job.n + i0;
  const int64_t used = least(lanes, job.n - i0);
  for (int64_t i = 0; i < used; i += kFloats, row += R::kStep) {
    const Floats inverse = load(row + R::kInvS),
                 role = inverse * (load(row + R::kSumT) - beta * (inverse * load(row + R::kSumQ)));
    if (i + kFloats <= used) {
      store(out + i, load(out + i) + role);
    } else {
      float last[kFloats];
      store(last, role);
      for (int64_t l = 0; i + l < used; ++l) out[i + l] += last[l];
    }
  }
}

// grad = scale * (grad + the shares' sums over j < k), the diagonal 0. What a pair gets is divided
// among its two places anyhow: only their sum counts.
KDK_ONE_COPY inline void finish_row(const Job& job, int64_t j, const float* sums, int64_t shares,
                                    float scale) {
  const int64_t n = job.n;
  float* const out = job.grad + j * n;
  for (int64_t s = 0; s < shares; ++s) {
    const float* const from = sums + (s * n + j) * n;
#pragma omp simd
    for (int64_t k = j; k < n; ++k) out[k] += from[k];
  }
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) out[k] *= scale;
  out[j] = 0.f;
}

inline void finish(const Job& job, const float* sums, int64_t shares, float scale,
                   int64_t threads) {
  parallel_for(job.n, job.n * job.n, threads, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) finish_row(job, j, sums, shares, scale);
  });
}

inline int64_t whole_lanes(int64_t vertices) {
  return (vertices + kFloats - 1) / kFloats * kFloats;
}

// Sum over triplets j < k of the losses over beta; the gradient in job.grad, times `scale`.
// Few samples: all pairs of sides for a share of the vertices, and the pairs' sums one a share.
template <typename Form, bool kGrad>
double few(const Job& job, float scale, int64_t threads) {
  const int64_t n = job.n, shares = (n + kFewLanes - 1) / kFewLanes;
  const int64_t size = n * Row<Form>::size(kFewLanes), pairs = kGrad ? n * n : 0;
  Scratch memory;
  float* packed = memory.floats(shares * (size + pairs));
  float* sums = packed + shares * size;
  double losses[kFew / kFewLanes];
  parallel_for(shares, n * n * n, threads, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const int64_t i0 = s * kFewLanes, lanes = whole_lanes(least(kFewLanes, n - i0));
      float *rows = packed + s * size, *opposite = sums + s * pairs;
      for (int64_t j = 0; j < n; ++j)
        pack<Form>(job, j, i0, lanes, rows + j * Row<Form>::size(lanes));
      memset(opposite, 0, static_cast<size_t>(pairs) * 4);
      losses[s] = sides<Form, kGrad>(job, opposite, rows, lanes, 0, n, 0, n);
      if constexpr (kGrad)
        for (int64_t j = 0; j < n; ++j)
          add_roles<Form>(job, j, i0, lanes, rows + j * Row<Form>::size(lanes));
    }
  });
  if constexpr (kGrad) finish(job, sums, shares, scale, threads);
  double sum = 0.0;
  for (int64_t s = 0; s < shares; ++s) sum += losses[s];
  return sum;
}

// How many tiles the sides are cut into, an odd number: more would mean more rounds to wait for,
// fewer would leave threads without a game.
inline int64_t teams_of(int64_t n) { return n <= 1024 ? 15 : 63; }

// Many samples: a tournament of tiles of sides, for kShare vertices at a time.
template <typename Form, bool kGrad>
double many(const Job& job, float scale, int64_t threads) {
  const int64_t n = job.n, teams = teams_of(n), tile = (n + 2 * teams - 1) / (2 * teams) * 2;
  const int64_t games = (teams + 1) / 2, size = Row<Form>::size(kManyLanes);
  const int64_t most = (least(kShare, n) + kManyLanes - 1) / kManyLanes;
  Scratch memory;
  float* packed = memory.floats(n * most * size + 2 * teams);
  double* losses = reinterpret_cast<double*>(packed + n * most * size);
  for (int64_t t = 0; t < teams; ++t) losses[t] = 0.0;
  auto first = [&](int64_t team) { return least(team * tile, n); };

  for (int64_t start = 0; start < n; start += kShare) {
    const int64_t vertices = least(kShare, n - start),
                  blocks = (vertices + kManyLanes - 1) / kManyLanes;
    auto lanes_of = [&](int64_t b) {
      return whole_lanes(least(kManyLanes, vertices - b * kManyLanes));
    };
    // The rows of a block of vertices are side by side.
    auto rows = [&](int64_t b) { return packed + b * n * size; };
    auto row = [&](int64_t b, int64_t j) { return rows(b) + j * Row<Form>::size(lanes_of(b)); };
    parallel_for(n, n * vertices, threads, [&](int64_t begin, int64_t end) {
      for (int64_t b = 0; b < blocks; ++b)
        for (int64_t j = begin; j < end; ++j)
          pack<Form>(job, j, start + b * kManyLanes, lanes_of(b), row(b, j));
    });
    for (int64_t round = 0; round < teams; ++round) {
      parallel_for(games, games * tile * tile * vertices, threads, [&](int64_t begin, int64_t end) {
        for (int64_t game = begin; game < end; ++game) {
          // Teams whose numbers add up to twice the round's; one of them meets itself.
          const int64_t x = (round + game) % teams, y = (round - game + teams) % teams;
          const int64_t a = x < y ? x : y, b = x < y ? y : x;
          for (int64_t v = 0; v < blocks; ++v)
            losses[a] += sides<Form, kGrad>(job, job.grad, rows(v), lanes_of(v), first(a),
                                            first(a + 1), first(b), first(b + 1));
        }
      });
    }
    if constexpr (kGrad)
      parallel_for(n, n * vertices, threads, [&](int64_t begin, int64_t end) {
        for (int64_t b = 0; b < blocks; ++b)
          for (int64_t j = begin; j < end; ++j)
            add_roles<Form>(job, j, start + b * kManyLanes, lanes_of(b), row(b, j));
      });
  }
  if constexpr (kGrad) finish(job, nullptr, 0, scale, threads);
  double sum = 0.0;
  for (int64_t t = 0; t < teams; ++t) sum += losses[t];
  return sum;
}

template <typename Form>
double triplets(const Job& job, float scale, int64_t threads) {
  const bool small = job.n <= kFew;
  if (!job.grad) return (small ? few<Form, false> : many<Form, false>)(job, scale, threads);
  parallel_for(job.n, job.n * job.n, threads, [&](int64_t begin, int64_t end) {
    memset(job.grad + begin * job.n, 0, static_cast<size_t>((end - begin) * job.n) * 4);
  });
  // Twice: for (j, k) and (k, j).
  return (small ? few<Form, true> : many<Form, true>)(job, 2.f * scale * job.beta / job.unit[0],
                                                      threads);
}

// ---- what the squared distances allow ----

struct Range {
  float low = INFINITY, high = 0.f;  // of the positive ones
  int64_t strange = 0;               // infinite or NaN
};

KDK_ONE_COPY inline Range range_of(const float* d2, int64_t count) {
  float low = INFINITY, high = 0.f;
  int32_t strange = 0;
#pragma omp simd reduction(min : low) reduction(max : high) reduction(| : strange)
  for (int64_t i = 0; i < count; ++i) {
    const float x = d2[i], positive = x > 0.f ? x : INFINITY;
    low = positive < low ? positive : low;
    high = x > high ? x : high;
    strange |= !(x < INFINITY);
  }
  return {low, high, strange};
}

// The unit in which Fixed loses nothing that the match could see, or 0: the least squared distance
// must have some 23 of the 30 bits.
inline float unit_of(const Range& r) {
  constexpr float kSpan = 128.f;
  if (r.strange || !(r.high <= kSpan * r.low) || !(r.high > 1e-30f && r.high < 1e30f)) return 0.f;
  return ldexpf(1.f, ilogbf(r.high) - 29);
}

KDK_ONE_COPY inline void to_fixed(const float* hi, const float* lo, int64_t count, double scale,
                                  int32_t* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i)
    out[i] = static_cast<int32_t>(
        (static_cast<double>(hi[i]) + static_cast<double>(lo[i])) * scale + 0.5);
}

KDK_ONE_COPY inline void invert(const float* hi, int64_t count, float scale, float beta,
                                float* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = inverse_distance(hi[i] * scale, beta);
}

// How many ordered pairs coincide in one model only: there the angle of a side with itself is
// 0 in one and 1 in the other.
inline int64_t unequal_pairs(const float* s, const float* t, int64_t count) {
  int64_t unequal = 0;
  for (int64_t i = 0; i < count; ++i) unequal += (s[i] > 0.f) != (t[i] > 0.f);
  return unequal;
}

// `scale` times the sum over all triplets, from both models' squared distances in two parts, and
// where they are wanted the gradients by these.
inline double match(int64_t n, const float* const (&hi)[2], const float* const (&lo)[2], float beta,
                    float scale, float* const (&grads)[2], int64_t threads) {
  const int64_t count = n * n;
  float unit[2];
  for (int m = 0; m < 2; ++m) unit[m] = unit_of(range_of(hi[m], count));
  const bool fixed = unit[0] > 0.f && unit[1] > 0.f;
  Scratch memory;
  float* const made = memory.floats(4 * count);
  Job job{{hi[0], lo[0], hi[1], lo[1]}, {made, made + count}, {1.f, 1.f}, nullptr, n, beta};
  if (fixed)
    for (int m = 0; m < 2; ++m) job.plane[m] = made + (2 + m) * count, job.unit[m] = unit[m];
  parallel_for(2 * n, 16 * count, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t m = row / n, at = row % n * n;
      invert(hi[m] + at, n, 1.f / job.unit[m], beta, made + m * count + at);
      if (fixed)
        to_fixed(hi[m] + at, lo[m] + at, n, 1.0 / static_cast<double>(unit[m]),
                 reinterpret_cast<int32_t*>(made + (2 + m) * count + at));
    }
  });
  const auto run = fixed ? triplets<Fixed> : triplets<Split>;
  double sum = 0.0;
  bool summed = false;
  for (int side = 0; side < 2; ++side) {
    if (!grads[side] && (summed || !side)) continue;
    // The loss is symmetric in the models: the teacher's gradient is the student's, exchanged.
    Job own = job;
    own.grad = grads[side];
    if (side) {
      const int half = fixed ? 1 : 2;
      for (int p = 0; p < 2 * half; ++p) own.plane[p] = job.plane[(p + half) % (2 * half)];
      for (int m = 0; m < 2; ++m)
        own.inverse[m] = job.inverse[1 - m], own.unit[m] = job.unit[1 - m];
    }
    const double value = run(own, scale, threads);
    if (!summed) sum = value;
    summed = true;
  }
  const float c = huber_slope(1.f / beta, 1.f);
  sum = 2.0 * sum +
        static_cast<double>(unequal_pairs(hi[0], hi[1], count)) * huber_value(1.f / beta, c, 0.5f);
  return sum * beta * scale;
}

}  // namespace triplets
}  // namespace KDK_NAMESPACE
