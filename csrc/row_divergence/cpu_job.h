// What the CPU kernels of a call have in common.
#pragma once
#include <stdexcept>
#include <string>

#include "common/tensor.h"
#include "row_divergence/math.h"

namespace KDK_NAMESPACE {
namespace {

enum InputKind : int { kLogits = 0, kLogProbs = 1, kLogProbsAndProbs = 2 };

// The arguments that do not change from row to row.
struct Job {
  Tensor student, teacher, ds, dt;
  const int64_t* labels;
  const float *weight, *class_weight;
  const float* scalars;
  float kd, ce;  // factors of the two terms, divisors included
  int kind;
  int inputs;
  bool hard;
  int64_t ignore_index;
  int64_t classes, inner, rows;
  double class_weight_sum;
  int64_t threads;

  bool logits() const { return inputs == kLogits; }
  double inverse_ts() const { return logits() ? 1.0 / scalars[kTs] : 1.0; }
  double inverse_tt() const { return logits() ? 1.0 / scalars[kTt] : 1.0; }
  float row_weight(int64_t r) const {
    if (labels && labels[r] == ignore_index) return 0.f;
    return weight ? weight[r] : 1.f;
  }
  float label_weight(int64_t r) const { return class_weight ? class_weight[labels[r]] : 1.f; }
};

// (outer, classes, inner); a matrix has its classes side by side or at its own stride.
Tensor as_rows(Tensor x) {
  if (x.ndim == 2) x.shape[2] = 1, x.stride[2] = 0, x.ndim = 3;
  return x;
}

Job make_job(Tensor student, Tensor teacher, Tensor labels, Tensor weight, Tensor class_weight,
             Tensor scalars, Tensor ds, Tensor dt, int64_t kind, int64_t inputs, bool hard,
             int64_t ignore_index, int64_t threads) {
  if (kind == kDecoupledKL && (inputs != kLogits || !labels))
    throw std::invalid_argument("a decoupled KL needs labels, and logits to leave them out of");
  if (hard && inputs != kLogits) throw std::invalid_argument("the hard-label term needs logits");
  Job job{};
  job.student = as_rows(student), job.teacher = as_rows(teacher);
  job.ds = as_rows(ds), job.dt = as_rows(dt);
  job.labels = labels.as<int64_t>(), job.weight = weight.as<float>();
  job.class_weight = class_weight.as<float>(), job.scalars = scalars.as<float>();
  job.kind = static_cast<int>(kind), job.inputs = static_cast<int>(inputs), job.hard = hard;
  job.ignore_index = ignore_index;
  job.classes = job.student.shape[1], job.inner = job.student.shape[2];
  job.rows = job.student.shape[0] * job.inner;
  job.threads = threads;
  // JSD(beta) at its ends is a KL, and takes the shorter way.
  if (kind == kJSD && job.scalars[kP0] <= 0.f) job.kind = kForwardKL;
  if (kind == kJSD && job.scalars[kP0] >= 1.f) job.kind = kReverseKL;
  for (int64_t r = 0; job.labels && r < job.rows; ++r) {
    const int64_t y = job.labels[r];
    if (y != ignore_index && (y < 0 || y >= job.classes))
      throw std::out_of_range("labels hold " + std::to_string(y) + ", outside 0 to " +
                              std::to_string(job.classes - 1) + " and not ignore_index (" +
                              std::to_string(ignore_index) + "): row " + std::to_string(r));
  }
  job.class_weight_sum = static_cast<double>(job.classes);
  if (class_weight) {
    job.class_weight_sum = 0.0;
    for (int64_t v = 0; v < job.classes; ++v) job.class_weight_sum += job.class_weight[v];
  }
  return job;
}

void set_factors(Job& job, const float* divisors) {
  auto factor = [&](Scalar weight, int which) {
    const float d = divisors[which];
    return d == 0.f ? 0.f : job.scalars[weight] / d;
  };
  job.kd = factor(kKdWeight, 0);
  job.ce = factor(kCeWeight, 1);
}

// Without a choice between two structs, which would be one between addresses: that GCC does not
// vectorise.
template <int kKind, int kInputs>
KDK_HD Terms tile_terms(float a, float b, float p, float q, float p0, float p1,
                        const AlphaBeta& constants) {
  // The ends of JSD(beta) were made KLs by make_job.
  if constexpr (kKind == kJSD) {
    return with_nan(a, jsd_interior(a, b, p, q, p0));
  } else if constexpr (kKind == kAlphaBeta) {
    return with_nan(a, alpha_beta(a, b, constants));
  } else if constexpr (kKind == kSymmetricKL && kInputs == kLogits) {
    return behind_softmax(kKind, terms(kKind, a, b, p, q, p0, p1), p, q, p0);
  } else {
    return terms(kKind, a, b, p, q, p0, p1);
  }
}

}  // namespace
}  // namespace KDK_NAMESPACE
