// The sums over a row's classes that the row's threads take and combine.
//
// Everything is in units of log 2: u = (x - m) c with c = log2(e) / T and m the row's maximum, p is
// 2^u / Z. For 16-bit inputs u = x c - m c instead, one instruction: the rounded m c is the same
// for the whole row and drops out of the probabilities, and what is left of it is far below their
// error.
#pragma once
#include "row_divergence/cuda_problem.cuh"

namespace KDK_NAMESPACE {

// Maxima so far and the sums relative to them: Z_s, Z_t, Z_s at T = 1, and the log ratio
// sum e (u_t - u_s), where e is the teacher's exponential or, for reverse KL, the student's.
struct Online {
  float m_s, m_t, z_s, z_t, z_1, ratio;
};
struct Maxima {
  float s, t;
};
struct Sums {
  float x, y, z;
};
struct SumsOp {
  __device__ Sums operator()(const Sums& a, const Sums& b) const {
    return {a.x + b.x, a.y + b.y, a.z + b.z};
  }
};
struct MaximaOp {
  __device__ Maxima operator()(const Maxima& a, const Maxima& b) const {
    return {fmaxf(a.s, b.s), fmaxf(a.t, b.t)};
  }
};

// The exponent of a class from what is kept of the maximum.
template <bool kExact>
__device__ inline float offset_of(float m, float c) {
  return kExact ? m : m * c;
}
template <bool kExact>
__device__ inline float exponent(float x, float c, float offset) {
  return kExact ? (x - offset) * c : fmaf(x, c, -offset);
}

template <bool kExact>
struct OnlineOp {
  float c_s, c_t;
  bool reverse, separate_z1;

  // Low enough to lose against every logit, high enough that m c stays finite.
  __device__ Online start() const {
    const float low = kExact ? -FLT_MAX : -2e38f;
    return {kExact ? low : low / fmaxf(1.f, 0.7f * c_s),
            kExact ? low : low / fmaxf(1.f, 0.7f * c_t),
            0.f,
            0.f,
            0.f,
            0.f};
  }
  __device__ static float distance(float from, float to, float c) {  // what u loses
    return kExact ? (from - to) * c : from * c - to * c;
  }
  // The sums of `o` relative to maxima that are at least its own.
  __device__ Online moved(const Online& o, float m_s, float m_t) const {
    const float d_s = distance(o.m_s, m_s, c_s), d_t = distance(o.m_t, m_t, c_t);
    const float f_s = fast_exp2(d_s), f_t = fast_exp2(d_t);
    Online r{m_s, m_t, o.z_s * f_s, o.z_t * f_t, 0.f, 0.f};
    // Where the weights e vanish the ratio does too, whatever the distance.
    const float z = reverse ? o.z_s : o.z_t, f = reverse ? f_s : f_t;
    r.ratio = z * f > 0.f ? f * fmaf(z, d_t - d_s, o.ratio) : z * f;
    if (separate_z1) r.z_1 = o.z_1 * fast_exp2(distance(o.m_s, m_s, kLog2e));
    return r;
  }
  __device__ Online operator()(const Online& a, const Online& b) const {
    const float m_s = fmaxf(a.m_s, b.m_s), m_t = fmaxf(a.m_t, b.m_t);
    const Online x = moved(a, m_s, m_t), y = moved(b, m_s, m_t);
    return {m_s, m_t, x.z_s + y.z_s, x.z_t + y.z_t, x.z_1 + y.z_1, x.ratio + y.ratio};
  }

  template <int N>
  __device__ void add(Online& o, const float (&xs)[N], const float (&xt)[N]) const {
    float m_s = xs[0], m_t = xt[0];
#pragma unroll
    for (int i = 1; i < N; ++i) {
      m_s = fmaxf(m_s, xs[i]);
      m_t = fmaxf(m_t, xt[i]);
    }
    if (m_s > o.m_s || m_t > o.m_t) o = moved(o, fmaxf(m_s, o.m_s), fmaxf(m_t, o.m_t));
    const float at_s = offset_of<kExact>(o.m_s, c_s), at_t = offset_of<kExact>(o.m_t, c_t);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float us = exponent<kExact>(xs[i], c_s, at_s);
      const float ut = exponent<kExact>(xt[i], c_t, at_t);
      const float es = fast_exp2(us), et = fast_exp2(ut);
      o.z_s += es;
      o.z_t += et;
      const float e = reverse ? es : et;
      if (e > 0.f) o.ratio = fmaf(e, ut - us, o.ratio);  // no mass: not 0 * inf
    }
    if (separate_z1) {
      const float at_1 = offset_of<kExact>(o.m_s, kLog2e);
#pragma unroll
      for (int i = 0; i < N; ++i) o.z_1 += fast_exp2(exponent<kExact>(xs[i], kLog2e, at_1));
    }
  }
};

template <bool kExact, class Group>
__device__ inline Online reduce(const Group& group, const Online& mine,
                                const OnlineOp<kExact>& op) {
  const Maxima m = group.within_warp(Maxima{mine.m_s, mine.m_t}, MaximaOp{});
  Online o = op.moved(mine, m.s, m.t);
  const Sums a = group.within_warp(Sums{o.z_s, o.z_t, o.ratio}, SumsOp{});
  o.z_s = a.x, o.z_t = a.y, o.ratio = a.z;
  if (op.separate_z1) o.z_1 = group.within_warp(o.z_1, Sum{});
  return group.template across_warps<0>(o, op);
}
template <int kSlot, class Group>
__device__ inline Sums reduce(const Group& group, const Sums& mine) {
  return group.template across_warps<kSlot>(group.within_warp(mine, SumsOp{}), SumsOp{});
}

}  // namespace KDK_NAMESPACE
