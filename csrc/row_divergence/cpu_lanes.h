// Sixteen rows at a time, one in each vector lane: for short rows, of which a vector along the
// classes would be mostly a fixed cost, and for a strided class axis, where sixteen neighbouring
// rows are what lies together in memory. Logits only.
#pragma once
#include <algorithm>
#include <cmath>

#include "common/lanes.h"
#include "common/softmax.h"
#include "row_divergence/cpu_job.h"

namespace KDK_NAMESPACE {
namespace {

constexpr int kRowLanes = 16;
constexpr int64_t kLaneBlock = 16;  // classes whose sums are kept in float; above that, double

template <typename Body>
KDK_INLINE void each_lane(const Body& body) {
#pragma omp simd
  for (int l = 0; l < kRowLanes; ++l) body(l);
}

// Sums over the classes, a lane each.
template <int kSums>
struct LaneSums {
  double of[kSums][kRowLanes] = {};
};

// body(v, sums) adds class v's lanes to float sums.
template <int kSums, typename Body>
KDK_INLINE LaneSums<kSums> sum_classes(int64_t classes, const Body& body) {
  LaneSums<kSums> total;
  for (int64_t begin = 0; begin < classes; begin += kLaneBlock) {
    const int64_t end = std::min(classes, begin + kLaneBlock);
    float part[kSums][kRowLanes] = {};
    for (int64_t v = begin; v < end; ++v) body(v, part);
    for (int k = 0; k < kSums; ++k) each_lane([&](int l) { total.of[k][l] += part[k][l]; });
  }
  return total;
}

// Classes by lanes, `step` floats from class to class.
struct LaneScores {
  const float* x;
  int64_t x_step;
  float* d;  // the gradient's place; null: none
  int64_t d_step;
};

class LaneKernel {
 public:
  // Exponentials of both models and of the hard-label term, derivatives of both.
  static int64_t memory(int64_t classes) { return 5 * kRowLanes * classes; }

  LaneKernel(const Job& job, const LaneScores& student, const LaneScores& teacher, int64_t first,
             int lanes, float* memory)
      : job_(job), first_(first), lanes_(lanes), classes_(job.classes) {
    auto take = [&] { return memory += kRowLanes * classes_, memory - kRowLanes * classes_; };
    student_.scores = student, teacher_.scores = teacher;
    student_.scale = job.inverse_ts(), teacher_.scale = job.inverse_tt();
    student_.e = take(), teacher_.e = take(), hard_.e = take();
    g_s_ = take(), g_t_ = take();
    hard_.scores = student;
    for (int l = 0; l < kRowLanes; ++l) {
      weight_[l] = l < lanes ? job.row_weight(first + l) : 0.f;
      label_[l] = l < lanes && job.labels && weight_[l] != 0.f
                      ? static_cast<int32_t>(job.labels[first + l])
                      : -1;
    }
  }

  // As RowKernel::run, for every lane that is a row; `upstream` is one number or one a row.
  void run(float* losses, float* stats, const float* upstream, bool per_row,
           float* by_temperature) {
    learn_temperature_ = by_temperature != nullptr;
    each_lane([&](int l) {
      const float up = per_row ? upstream[l < lanes_ ? l : 0] : upstream[0];
      kd_[l] = job_.kd * weight_[l] * up;
      ce_[l] = job_.ce * weight_[l] * up;
    });
    exponentials();
    double hard[kRowLanes] = {};
    if (job_.hard) hard_sums(hard);
    if (student_.scores.d || teacher_.scores.d || learn_temperature_) {
      if (!in_one())
        term_gradients();
      else if (reverse())
        kl_gradients(student_, teacher_);
      else
        kl_gradients(teacher_, student_);
    }
    for (int l = 0; l < lanes_; ++l) {
      const bool live = weight_[l] != 0.f;
      if (!live) zero(l);
      if (by_temperature) {
        by_temperature[2 * l] = live ? static_cast<float>(-student_.dot[l] * student_.scale) : 0.f;
        by_temperature[2 * l + 1] =
            live ? static_cast<float>(-teacher_.dot[l] * teacher_.scale) : 0.f;
      }
      if (!losses) continue;
      float unread[kStats];
      float* s = stats ? stats + l * kStats : unread;
      s[kTopS] = student_.ref[l], s[kTopT] = teacher_.ref[l];
      s[kZs] = static_cast<float>(student_.z[l]), s[kZt] = static_cast<float>(teacher_.z[l]);
      s[kZ1] = job_.hard ? static_cast<float>(hard_.z[l]) : 0.f;
      s[kGs] = sum_s_[l], s[kGt] = sum_t_[l], s[kDiv] = value_[l];
      losses[l] = kd_[l] * value_[l];
      if (job_.hard) losses[l] += ce_[l] * static_cast<float>(hard[l]);
      if (!live) std::fill(s, s + kStats, 0.f), losses[l] = 0.f;
    }
  }

 private:
  struct Side {
    LaneScores scores;
    double scale = 1.0;  // one over the temperature
    float* e = nullptr;  // 2^((x - ref) c)
    float ref[kRowLanes];
    double z[kRowLanes];
    double log_z[kRowLanes];
    double dot[kRowLanes] = {};  // of the scores with the divergence's gradient
  };

  bool reverse() const { return job_.kind == kReverseKL; }
  bool in_one() const { return job_.kind == kForwardKL || job_.kind == kReverseKL || decoupled(); }
  bool decoupled() const { return job_.kind == kDecoupledKL; }

  // A decoupled KL does not see the label's score.
  template <bool kOthers>
  static KDK_INLINE float seen(float score, int32_t label, int64_t v) {
    if constexpr (kOthers) return label == static_cast<int32_t>(v) ? -INFINITY : score;
    return score;
  }

  template <bool kOthers>
  void find_top(Side& x) const {
    float top[kRowLanes];
    each_lane([&](int l) { top[l] = -INFINITY; });
    for (int64_t v = 0; v < classes_; ++v) {
      const float* s = x.scores.x + v * x.scores.x_step;
      const int32_t* label = label_;
      each_lane([&](int l) {
        const float score = seen<kOthers>(s[l], label[l], v);
        top[l] = score > top[l] ? score : top[l];
      });
    }
    each_lane([&](int l) { x.ref[l] = top[l] == -INFINITY ? 0.f : top[l]; });
  }

  void exponentials() {
    if (decoupled())
      kl_sums<true>(teacher_, student_), decouple();
    else if (reverse())
      kl_sums<false>(student_, teacher_);
    else if (in_one())
      kl_sums<false>(teacher_, student_);
    else
      exponential_rows(student_), exponential_rows(teacher_), term_sums();
  }

  void exponential_rows(Side& x) const {
    find_top<false>(x);
    const Pair c = split_factor(x.scale * kLog2EDouble);
    const auto sums = sum_classes<1>(classes_, [&](int64_t v, float (*part)[kRowLanes]) {
      const float *s = x.scores.x + v * x.scores.x_step, *ref = x.ref;
      float *e = x.e + v * kRowLanes, *z = part[0];
      each_lane([&](int l) {
        const float d = s[l] - ref[l];
        const float p = vexp2_nonpositive(d * c.hi + d * c.lo);
        e[l] = p;
        z[l] += p;
      });
    });
    each_lane([&](int l) { x.z[l] = sums.of[0][l]; });
    each_lane([&](int l) { x.log_z[l] = vlog_double(x.z[l]); });
  }

  // Both sums and KL(p, q).
  template <bool kOthers>
  void kl_sums(Side& p, Side& q) {
    find_top<kOthers>(p);
    find_top<kOthers>(q);
    const Pair cp = split_factor(p.scale * kLog2EDouble), cq = split_factor(q.scale * kLog2EDouble);
    const auto sums = sum_classes<3>(classes_, [&](int64_t v, float (*part)[kRowLanes]) {
      const float *xp = p.scores.x + v * p.scores.x_step, *xq = q.scores.x + v * q.scores.x_step;
      const float *ref_p = p.ref, *ref_q = q.ref;
      const int32_t* label = label_;
      float *ep = p.e + v * kRowLanes, *eq = q.e + v * kRowLanes;
      float *zp = part[0], *zq = part[1], *cross = part[2];
      each_lane([&](int l) {
        const float dp = seen<kOthers>(xp[l], label[l], v) - ref_p[l],
                    dq = seen<kOthers>(xq[l], label[l], v) - ref_q[l];
        const float yp = dp * cp.hi + dp * cp.lo, yq = dq * cq.hi + dq * cq.lo;
        const float a = vexp2_nonpositive(yp), b = vexp2_nonpositive(yq);
        ep[l] = a;
        eq[l] = b;
        zp[l] += a;
        zq[l] += b;
        cross[l] += a > 0.f ? a * (yp - yq) : 0.f;
      });
    });
    const double *zp = sums.of[0], *zq = sums.of[1], *cross = sums.of[2];
    double log_ratio[kRowLanes], value[kRowLanes];
    each_lane([&](int l) { log_ratio[l] = vlog_double(zq[l] / zp[l]); });
    each_lane([&](int l) { value[l] = cross[l] / zp[l] * kLn2Double + log_ratio[l]; });
    float* const sum_p = reverse() ? sum_s_ : sum_t_;
    float* const sum_q = reverse() ? sum_t_ : sum_s_;
    for (int l = 0; l < kRowLanes; ++l) {
      p.z[l] = zp[l], q.z[l] = zq[l];
      const bool none = kOthers && zp[l] == 0.0;  // the label's is the only class
      value_[l] = none ? 0.f : static_cast<float>(value[l]);
      shift_[l] = none ? 0.f : static_cast<float>(log_ratio[l] - value[l]);
      sum_p[l] = value_[l] + 1.f;
      sum_q[l] = -1.f;
    }
  }

  // From the KL over the other classes to alpha * (KL of label against rest) + beta * (that KL).
  void decouple() {
    const float alpha = job_.scalars[kP0], beta = job_.scalars[kP1];
    for (int l = 0; l < lanes_; ++l) {
      if (label_[l] < 0) continue;
      // Where the label's is the only class with mass, its log-odds are infinite: still right.
      auto odds = [&](const Side& x) {
        const double y = x.scores.x[label_[l] * x.scores.x_step + l];
        return static_cast<float>((y - x.ref[l]) * x.scale - std::log(x.z[l]));
      };
      const Binary binary = binary_kl(odds(student_), odds(teacher_));
      by_s_[l] = binary.by_s, by_t_[l] = binary.by_t;
      value_[l] = times(alpha, binary.value) + times(beta, value_[l]);
    }
  }

  void kl_gradients(Side& p, Side& q) {
    const float alpha = decoupled() ? job_.scalars[kP0] : 0.f,
                beta = decoupled() ? job_.scalars[kP1] : 1.f;
    float label_p[kRowLanes], label_q[kRowLanes], wp[kRowLanes], wq[kRowLanes], vp[kRowLanes],
        vl[kRowLanes];
    each_lane([&](int l) {
      const float per_p = static_cast<float>(kd_[l] * p.scale),
                  per_q = static_cast<float>(kd_[l] * q.scale);
      const bool rest_p = !decoupled() || p.z[l] != 0.0, rest_q = !decoupled() || q.z[l] != 0.0;
      const float fp = rest_p ? static_cast<float>(1.0 / p.z[l]) : 0.f;
      const float fq = rest_q ? static_cast<float>(1.0 / q.z[l]) : 0.f;
      const float b = rest_p ? beta : 0.f;
      // What a decoupled KL takes off every other class, in parts of its probability, and gives
      // the label.
      label_q[l] = decoupled() ? per_q * alpha * by_s_[l] : 0.f;
      label_p[l] = decoupled() ? per_p * alpha * by_t_[l] : 0.f;
      wp[l] = per_q * b * fp;
      wq[l] = (per_q * b - label_q[l]) * fq;
      vp[l] = per_p * b * fp;
      vl[l] = label_p[l] * fp;
    });
    if (q.scores.d || learn_temperature_)
      write(q, label_q, [&](int64_t v, float* g) {
        const float *ep = p.e + v * kRowLanes, *eq = q.e + v * kRowLanes;
        each_lane([&](int l) { g[l] = wq[l] * eq[l] - wp[l] * ep[l]; });
      });
    if (p.scores.d || learn_temperature_) {
      const Pair sp = split_factor(p.scale), sq = split_factor(q.scale);
      write(p, label_p, [&](int64_t v, float* g) {
        const float *xp = p.scores.x + v * p.scores.x_step, *xq = q.scores.x + v * q.scores.x_step;
        const float *ep = p.e + v * kRowLanes, *ref_p = p.ref, *ref_q = q.ref, *shift = shift_;
        each_lane([&](int l) {
          const float dp = xp[l] - ref_p[l], dq = xq[l] - ref_q[l];
          const float difference = (dp * sp.hi - dq * sq.hi) + (dp * sp.lo - dq * sq.lo) + shift[l];
          g[l] = ep[l] > 0.f ? (vp[l] * difference - vl[l]) * ep[l] : 0.f;
        });
      });
    }
  }

  template <int kKind>
  void term_sums_of() {
    const float p0 = job_.scalars[kP0], p1 = job_.scalars[kP1];
    const AlphaBeta constants = alpha_beta_constants(p0, p1);
    const Pair cs = split_factor(student_.scale), ct = split_factor(teacher_.scale);
    float hi_s[kRowLanes], lo_s[kRowLanes], hi_t[kRowLanes], lo_t[kRowLanes];
    float norm_s[kRowLanes], norm_t[kRowLanes];
    each_lane([&](int l) {
      hi_s[l] = static_cast<float>(student_.log_z[l]);
      lo_s[l] = static_cast<float>(student_.log_z[l] - hi_s[l]);
      hi_t[l] = static_cast<float>(teacher_.log_z[l]);
      lo_t[l] = static_cast<float>(teacher_.log_z[l] - hi_t[l]);
      norm_s[l] = static_cast<float>(1.0 / student_.z[l]);
      norm_t[l] = static_cast<float>(1.0 / teacher_.z[l]);
    });
    const auto sums = sum_classes<3>(classes_, [&](int64_t v, float (*part)[kRowLanes]) {
      const float *s = student_.scores.x + v * student_.scores.x_step,
                  *t = teacher_.scores.x + v * teacher_.scores.x_step;
      const float *es = student_.e + v * kRowLanes, *et = teacher_.e + v * kRowLanes;
      const float *ref_s = student_.ref, *ref_t = teacher_.ref;
      float *g_s = g_s_ + v * kRowLanes, *g_t = g_t_ + v * kRowLanes;
      float *f = part[0], *sum_s = part[1], *sum_t = part[2];
      each_lane([&](int l) {
        const float d_s = s[l] - ref_s[l], d_t = t[l] - ref_t[l];
        const float a = (d_s * cs.hi - hi_s[l]) + (d_s * cs.lo - lo_s[l]);
        const float b = (d_t * ct.hi - hi_t[l]) + (d_t * ct.lo - lo_t[l]);
        const Terms x = tile_terms<kKind, kLogits>(a, b, es[l] * norm_s[l], et[l] * norm_t[l], p0,
                                                   p1, constants);
        g_s[l] = x.g_s;
        g_t[l] = x.g_t;
        f[l] += x.f;
        sum_s[l] += x.g_s;
        sum_t[l] += x.g_t;
      });
    });
    each_lane([&](int l) {
      value_[l] = static_cast<float>(sums.of[0][l]);
      sum_s_[l] = static_cast<float>(sums.of[1][l]);
      sum_t_[l] = static_cast<float>(sums.of[2][l]);
    });
  }

  template <int... kKind>
  void dispatch_terms(std::integer_sequence<int, kKind...>) {
    using Sums = void (LaneKernel::*)();
    static constexpr Sums table[] = {&LaneKernel::term_sums_of<kKind>...};
    (this->*table[job_.kind])();
  }
  void term_sums() { dispatch_terms(std::make_integer_sequence<int, kKinds>{}); }

  void term_gradients() {
    const float none[kRowLanes] = {};
    auto project = [&](Side& x, const float* gradients, const float* sums) {
      if (!x.scores.d && !learn_temperature_) return;
      float scale[kRowLanes], share[kRowLanes];
      each_lane([&](int l) {
        scale[l] = static_cast<float>(kd_[l] * x.scale);
        share[l] = sums[l] * static_cast<float>(1.0 / x.z[l]);
      });
      write(x, none, [&](int64_t v, float* g) {
        const float *from = gradients + v * kRowLanes, *e = x.e + v * kRowLanes;
        each_lane([&](int l) { g[l] = scale[l] * (from[l] - e[l] * share[l]); });
      });
    };
    project(student_, g_s_, sum_s_);
    project(teacher_, g_t_, sum_t_);
  }

  // The hard-label term's values, at temperature 1.
  void hard_sums(double* values) {
    if (job_.scalars[kTs] == 1.f && !decoupled()) {
      hard_ = student_;
      if (in_one()) each_lane([&](int l) { hard_.log_z[l] = vlog_double(hard_.z[l]); });
    } else {
      exponential_rows(hard_);
    }
    const double eps = job_.scalars[kSmoothing];
    for (int l = 0; l < lanes_; ++l) {
      if (label_[l] < 0) continue;
      const double score = hard_.scores.x[label_[l] * hard_.scores.x_step + l];
      values[l] =
          (1.0 - eps) * job_.label_weight(first_ + l) * ((hard_.ref[l] - score) + hard_.log_z[l]);
      if (eps == 0.0) continue;
      double weighted = 0.0;
      for (int64_t v = 0; v < classes_; ++v) {
        const float s = hard_.scores.x[v * hard_.scores.x_step + l];
        weighted += job_.class_weight ? double(job_.class_weight[v]) * s : s;
      }
      values[l] += eps / static_cast<double>(classes_) *
                   ((hard_.ref[l] + hard_.log_z[l]) * job_.class_weight_sum - weighted);
    }
  }

  // The divergence's gradient, class by class from `body`, with `label` at the label's class of a
  // decoupled KL; what the temperature learns from it; the hard-label term's part.
  template <typename Body>
  KDK_INLINE void write(Side& x, const float* label, const Body& body) {
    const bool hard = job_.hard && &x == &student_;
    const float eps = job_.scalars[kSmoothing];
    float own[kRowLanes] = {}, share[kRowLanes], smooth[kRowLanes], mass[kRowLanes];
    if (hard)
      each_lane([&](int l) {
        const float to_p = static_cast<float>(1.0 / hard_.z[l]);
        smooth[l] = ce_[l] * eps / static_cast<float>(classes_);
        mass[l] = to_p * static_cast<float>(job_.class_weight_sum);
        share[l] = to_p;
      });
    for (int l = 0; hard && l < lanes_; ++l) {
      own[l] = label_[l] < 0 ? 0.f : ce_[l] * (1.f - eps) * job_.label_weight(first_ + l);
      share[l] *= own[l];
    }
    const bool others = decoupled();
    float* const place = x.scores.d;
    const int64_t step = place ? x.scores.d_step : 0;
    float unused[kRowLanes];
    float* const out = place ? place : unused;
    auto every = [&](const auto& finish) {
      for (int64_t v = 0; v < classes_; ++v) {
        float g[kRowLanes];
        body(v, g);
        if (others) each_lane([&](int l) { g[l] = label_[l] == v ? label[l] : g[l]; });
        finish(v, g);
        float* to = out + v * step;
        each_lane([&](int l) { to[l] = g[l]; });
      }
    };
    auto learn = [&](int64_t v, const float* g) {
      const float* s = x.scores.x + v * x.scores.x_step;
      each_lane([&](int l) { x.dot[l] += g[l] != 0.f ? double(s[l]) * g[l] : 0.0; });
    };
    if (!hard && !learn_temperature_) {
      every([](int64_t, float*) {});
      return;
    }
    every([&](int64_t v, float* g) {
      if (learn_temperature_) learn(v, g);
      if (!hard) return;
      const float* e = hard_.e + v * kRowLanes;
      const float cw = job_.class_weight ? job_.class_weight[v] : 1.f;
      // In pairs that cancel exactly where p is 1.
      each_lane([&](int l) {
        const float with = g[l] + share[l] * e[l];
        const float targeted = label_[l] == v ? with - own[l] : with;
        g[l] = targeted + smooth[l] * (mass[l] * e[l] - cw);
      });
    });
  }

  void zero(int l) {
    for (Side* x : {&student_, &teacher_})
      for (int64_t v = 0; x->scores.d && v < classes_; ++v)
        x->scores.d[v * x->scores.d_step + l] = 0.f;
  }

  const Job& job_;
  const int64_t first_;
  const int lanes_;
  const int64_t classes_;
  bool learn_temperature_ = false;
  Side student_, teacher_, hard_;  // hard_: the student at temperature 1
  float *g_s_, *g_t_;
  float weight_[kRowLanes], kd_[kRowLanes], ce_[kRowLanes];
  int32_t label_[kRowLanes];  // -1: none
  float value_[kRowLanes], shift_[kRowLanes], sum_s_[kRowLanes], sum_t_[kRowLanes];
  float by_s_[kRowLanes] = {}, by_t_[kRowLanes] = {};
};

}  // namespace
}  // namespace KDK_NAMESPACE
