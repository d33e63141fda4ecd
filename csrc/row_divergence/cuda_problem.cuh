// What a launch of row_divergence is asked for, and what a row leaves behind for its backward.
#pragma once
#include <cfloat>

#include "common/cuda.cuh"
#include "row_divergence/math.h"

namespace KDK_NAMESPACE {

struct Matrix {  // (outer, classes, inner), strides in elements; row r is (r / inner, r % inner)
  unsigned char* data;
  int64_t outer, cls, inner;
  DType dtype;
};

struct Problem {
  Matrix s, t, ds, dt;
  int64_t rows, inner;
  int classes;
  const int64_t* labels;
  const float* weight;
  const float* class_weight;
  const float* scalars;  // on the device, or null: `values`
  float values[kScalars];
  float* divisors;
  float* losses;
  float* total;
  float* stats;
  const float* upstream;
  float* temperature_grad;
  int64_t ignore_index;
  int kind, inputs, count;
  bool hard, backward, upstream_per_row;
  // Shape of the launch of rows_kernel.
  int lanes;        // threads of a warp that share a row; kThreads: the block (or cluster) does
  int cluster;      // blocks that share a row
  int on_chip;      // chunks of a row that each group keeps in shared memory
  bool one_launch;  // the cluster is the whole grid: it counts before and adds up after
};

constexpr int kThreads = 128;
constexpr float kLog2Min = FLT_MIN;

// How a kind is computed. Kernels are built with the first three and with the last: the registers
// of a general formula would cost the common losses their occupancy.
enum Path : int { kFastForward, kFastReverse, kFastJsd, kAnyKind };

// What the scalars come to: the same in every thread of the launch.
struct Setup {
  float c_s, c_t, inv_ts, inv_tt;  // c = log2(e) / T
  float kd, ce, smoothing, p0, p1;
  int kind;
  Path path;
  bool separate_z1;  // the hard-label term has its own temperature
  bool smooth;
};

__device__ inline Setup make_setup(const Problem& p, float divisor_kd, float divisor_ce) {
  float v[kScalars];
#pragma unroll
  for (int i = 0; i < kScalars; ++i) v[i] = p.scalars ? __ldg(p.scalars + i) : p.values[i];
  Setup q;
  const float ts = p.inputs ? 1.f : v[kTs], tt = p.inputs ? 1.f : v[kTt];
  q.c_s = kLog2e / ts;
  q.c_t = kLog2e / tt;
  q.inv_ts = 1.f / ts;
  q.inv_tt = 1.f / tt;
  q.kd = divisor_kd == 0.f ? 0.f : v[kKdWeight] / divisor_kd;
  q.ce = divisor_ce == 0.f ? 0.f : v[kCeWeight] / divisor_ce;
  q.smoothing = v[kSmoothing];
  q.p0 = v[kP0];
  q.p1 = v[kP1];
  q.kind = p.kind;
  if (p.kind == kJSD) q.kind = q.p0 <= 0.f ? kForwardKL : (q.p0 >= 1.f ? kReverseKL : kJSD);
  if (p.kind == kSymmetricKL)
    q.kind = q.p0 >= 1.f ? kForwardKL : (q.p0 <= 0.f ? kReverseKL : kSymmetricKL);
  q.path = p.inputs               ? kAnyKind
           : q.kind == kForwardKL ? kFastForward
           : q.kind == kReverseKL ? kFastReverse
           : q.kind == kJSD       ? kFastJsd
                                  : kAnyKind;
  q.separate_z1 = p.hard && ts != 1.f;
  q.smooth = p.hard && q.smoothing != 0.f;
  return q;
}

__device__ inline bool wants_teacher(const Problem& p) { return p.dt.data || p.temperature_grad; }
__device__ inline bool wants_gradient(const Problem& p) { return p.ds.data || wants_teacher(p); }

// 0 where the row does not count.
__device__ inline float row_weight(const Problem& p, int64_t row) {
  if (p.labels && p.labels[row] == p.ignore_index) return 0.f;
  return p.weight ? p.weight[row] : 1.f;
}

// ---------------------------------------------------------------------------- statistics

// A decoupled KL's: lse_s and lse_t are of the classes other than the label's (-inf: there is
// none), G_s is the KL among them, G_t the label's binary KL.

// A float32 log-sum-exp of 20 is off by up to 1e-6, and so would be every probability that a
// backward makes from it, several times a softmax's error. Seven more bits of each of the three
// log-sum-exps travel in the last place of a row's statistics; as a float that is a subnormal, and
// the 0 that other backends leave there means none.
constexpr int kLseLow = 7;

// log2(z) for 1 <= z < inf, or 0, to about 1e-10, from the float32 one by a Newton step.
__device__ inline double exact_log2(float z) {
  const float l = log2f(z), n = rintf(l);
  if (l == -INFINITY) return l;                                        // no classes
  const double x = -0.69314718055994531 * static_cast<double>(l - n);  // |x| < 0.35
  double e = 1. / 362880;
  e = fma(e, x, 1. / 40320);
  e = fma(e, x, 1. / 5040);
  e = fma(e, x, 1. / 720);
  e = fma(e, x, 1. / 120);
  e = fma(e, x, 1. / 24);
  e = fma(e, x, 1. / 6);
  e = fma(e, x, 0.5);
  e = fma(e, x, 1.);
  e = fma(e, x, 1.);
  const double ratio = static_cast<double>(z * exp2f(-n)) * e;  // z / 2^l
  return l + (ratio - 1.) * 1.4426950408889634;
}

// The spacing of the low bits of an lse: an ulp / 128.
__device__ inline double low_unit(float lse) {
  const int e = __float_as_int(lse) >> 23 & 255;
  return e < 64 || e == 255 ? 0. : exp2f(static_cast<float>(e - 127 - 23 - 7));
}
__device__ inline float split_lse(double lse, int place, int& low) {
  const float high = static_cast<float>(lse);
  const double unit = low_unit(high);
  if (unit > 0.) {
    const int q = static_cast<int>(rint((lse - high) / unit));
    low |= (min(max(q, -64), 63) & 127) << (7 * place);
  }
  return high;
}
__device__ inline double join_lse(float high, int low, int place) {
  const int q = ((low >> (7 * place) & 127) ^ 64) - 64;
  return high + q * low_unit(high);
}

}  // namespace KDK_NAMESPACE
