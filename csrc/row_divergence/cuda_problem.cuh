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

}  // namespace KDK_NAMESPACE
