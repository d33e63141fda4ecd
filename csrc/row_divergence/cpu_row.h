// One row at a time, its classes among the vector lanes.
//
// A row passes through the first-level cache once, in tiles: each tile's exponentials are kept as
// floats, relative to the largest score seen so far, and the later sweeps read those instead of the
// logits. Forward and reverse KL take their sums in that first sweep; the other kinds need both
// log-sum-exps first and take one more. See kdkernels/ops/row_divergence/README.md.
#pragma once
#include <algorithm>
#include <utility>

#include "common/convert.h"
#include "common/softmax.h"
#include "common/stream.h"
#include "row_divergence/cpu_job.h"

namespace KDK_NAMESPACE {
namespace {

constexpr int64_t kTile = 1024;

// One model's scores of a row, classes side by side, and where their gradient goes (null: nowhere).
struct Scores {
  const void* x;
  DType type;
  void* d;
  DType d_type;
  bool past_caches = false;  // how the gradient is stored
  bool from_memory = false;  // too large to be in a cache yet

  const float* tile(int64_t start, int64_t n, float* buffer) const {
    return load_tile(advance(x, type, start), type, n, buffer);
  }
  // Of this row or of the one after it.
  Ahead after(int64_t start) const {
    return from_memory ? Ahead(advance(x, type, start + kTile), type) : Ahead();
  }
  float* gradient_tile(int64_t start, int64_t n, float* buffer) const {
    return d && !past_caches ? tile_target(advance(d, d_type, start), d_type, n, buffer) : buffer;
  }
  void store(int64_t start, int64_t n, const float* tile) const {
    if (!d) return;
    void* to = advance(d, d_type, start);
    if (past_caches)
      stream_tile<kTile>(to, d_type, n, tile);
    else
      store_tile(to, d_type, n, tile);
  }
  void zero(int64_t n) const {
    if (d) memset(d, 0, static_cast<size_t>(n * size_of(d_type)));
  }
};

// Both models' exponentials, and sum e_p (log2 e_p - log2 e_q) for KL(p, q).
struct TileSums {
  double zp, zq, cross;
};
TileSums kl_tile(const float* p, const float* q, int64_t n, const RunningSoftmax& run_p,
                 const RunningSoftmax& run_q, float* ep, float* eq, const Ahead& ahead_p,
                 const Ahead& ahead_q) {
  const float ref_p = run_p.ref, ref_q = run_q.ref;
  const Pair cp = split_factor(run_p.c), cq = split_factor(run_q.c);
  TileSums sums{0.0, 0.0, 0.0};
  for_blocks(n, [&](int64_t begin, int64_t end) {
    ahead_p.ask(begin, end);
    ahead_q.ask(begin, end);
    float zp = 0.f, zq = 0.f, cross = 0.f;
#pragma omp simd reduction(+ : zp, zq, cross)
    for (int64_t i = begin; i < end; ++i) {
      const float dp = p[i] - ref_p, dq = q[i] - ref_q;
      const float yp = dp * cp.hi + dp * cp.lo, yq = dq * cq.hi + dq * cq.lo;
      const float a = vexp2_nonpositive(yp), b = vexp2_nonpositive(yq);
      ep[i] = a;
      eq[i] = b;
      zp += a;
      zq += b;
      cross += a > 0.f ? a * (yp - yq) : 0.f;
    }
    sums.zp += zp, sums.zq += zq, sums.cross += cross;
  });
  return sums;
}

struct Scaled {  // (x - ref) * scale
  const float* x;
  float ref;
  Pair scale;
};

// g = e_p (w (log p - log q - D) - label): with `offset` the scores' difference makes the bracket's
// first term.
void kl_gradient_of_p(const Scaled& p, const Scaled& q, const float* ep, int64_t n, float offset,
                      float w, float label, float* g) {
  const float *xp = p.x, *xq = q.x;
  const float ref_p = p.ref, ref_q = q.ref;
  const Pair sp = p.scale, sq = q.scale;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float dp = xp[i] - ref_p, dq = xq[i] - ref_q, e = ep[i];
    const float difference = (dp * sp.hi - dq * sq.hi) + (dp * sp.lo - dq * sq.lo) + offset;
    const float slope = (w * difference - label) * e;
    g[i] = e > 0.f ? slope : 0.f;
  }
}

int64_t most_tiles(int64_t classes) { return (classes + kTile - 1) / kTile + 1; }

template <typename Body>
void for_tiles(int64_t classes, const Body& body) {
  // What fills no vector must be copied; of a longer row only that is, as a tile of its own.
  const int64_t whole = classes < kBlock ? classes : classes / kLanes * kLanes;
  int64_t k = 0;
  for (int64_t start = 0; start < whole; start += kTile)
    body(k++, start, std::min(kTile, whole - start));
  if (whole < classes) body(k, whole, classes - whole);
}

// The kinds other than KL, one tile: values and derivatives from log-probabilities.
struct TermSums {
  double f, g_s, g_t;
};

struct TermTile {
  const float *s, *t;                   // scores
  Pair scale_s, scale_t, log_s, log_t;  // a = (s - ref_s) * scale_s - log_s
  float ref_s, ref_t;
  float norm_s, norm_t;  // what makes the exponentials probabilities
  float p0, p1;
  const float *es, *et;  // exponentials, of logits only
  float *g_s, *g_t;      // out: derivatives
};

template <int kKind, int kInputs>
TermSums terms_block(const TermTile& x, int64_t begin, int64_t end) {
  const float *s = x.s, *t = x.t;
  const Pair scale_s = x.scale_s, scale_t = x.scale_t, log_s = x.log_s, log_t = x.log_t;
  const float ref_s = x.ref_s, ref_t = x.ref_t, norm_s = x.norm_s, norm_t = x.norm_t, p0 = x.p0,
              p1 = x.p1;
  const float *es = x.es, *et = x.et;
  float *g_s = x.g_s, *g_t = x.g_t;
  const AlphaBeta constants = alpha_beta_constants(p0, p1);
  float f = 0.f, sum_s = 0.f, sum_t = 0.f;
#pragma omp simd reduction(+ : f, sum_s, sum_t)
  for (int64_t i = begin; i < end; ++i) {
    float a, b, p, q;
    if constexpr (kInputs == kLogits) {
      const float d_s = s[i] - ref_s, d_t = t[i] - ref_t;
      a = (d_s * scale_s.hi - log_s.hi) + (d_s * scale_s.lo - log_s.lo);
      b = (d_t * scale_t.hi - log_t.hi) + (d_t * scale_t.lo - log_t.lo);
      p = es[i] * norm_s, q = et[i] * norm_t;
    } else {
      a = s[i], p = vexp(a);
      if constexpr (kInputs == kLogProbs) {
        b = t[i], q = vexp(b);
      } else {
        q = t[i] == -INFINITY ? 0.f : t[i];  // the padding has no mass
        b = vlog(q);
      }
    }
    const Terms v = tile_terms<kKind, kInputs>(a, b, p, q, p0, p1, constants);
    g_s[i] = v.g_s;
    g_t[i] = v.g_t;
    f += v.f;
    sum_s += v.g_s;
    sum_t += v.g_t;
  }
  return {f, sum_s, sum_t};
}

template <int... kKind>
TermSums dispatch_terms(int kind, int inputs, const TermTile& x, int64_t n,
                        std::integer_sequence<int, kKind...>) {
  using Block = TermSums (*)(const TermTile&, int64_t, int64_t);
  static constexpr Block table[][kKinds] = {{terms_block<kKind, kLogits>...},
                                            {terms_block<kKind, kLogProbs>...},
                                            {terms_block<kKind, kLogProbsAndProbs>...}};
  TermSums sums{0.0, 0.0, 0.0};
  for_blocks(n, [&](int64_t begin, int64_t end) {
    const TermSums block = table[inputs][kind](x, begin, end);
    sums.f += block.f, sums.g_s += block.g_s, sums.g_t += block.g_t;
  });
  return sums;
}

TermSums terms_of(int kind, int inputs, const TermTile& x, int64_t n) {
  return dispatch_terms(kind, inputs, x, n, std::make_integer_sequence<int, kKinds>{});
}

// out = x * (g - e * share)
void project(const float* g, const float* e, int64_t n, float x, float share, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = x * (g[i] - e[i] * share);
}

void multiply(const float* g, int64_t n, float x, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = x * g[i];
}

float dot(const float* x, const float* g, int64_t n) {
  float sum = 0.f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += g[i] != 0.f ? x[i] * g[i] : 0.f;
  return sum;
}

Scratch& thread_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

// One row: its two models, its hard-label term, and the memory it is worked on in.
class RowKernel {
 public:
  RowKernel(const Job& job, const Scores& student, const Scores& teacher, int64_t r, float* memory)
      : job_(job), r_(r), weight_(job.row_weight(r)) {
    const int64_t full = padded(job.classes), tiles = most_tiles(job.classes);
    float* at = memory;
    auto take = [&](int64_t n) { return at += padded(n), at - padded(n); };
    for (float*& b : buffer_) b = take(kTile);
    student_ = {student, job.inverse_ts(), take(full), take(tiles)};
    teacher_ = {teacher, job.inverse_tt(), take(full), take(tiles)};
    hard_ = {student, 1.0, student_.e, student_.top};
    // At temperature 1 the KL kinds leave the exponentials as the hard-label term wants them.
    if (job.hard && !(fused() && job.scalars[kTs] == 1.f))
      hard_.e = take(full), hard_.top = take(tiles);
    g_s_ = take(full);
    g_t_ = take(full);
  }
  static int64_t memory(int64_t classes) {
    return kBuffers * kTile + 5 * padded(classes) + 3 * padded(most_tiles(classes));
  }

  // The loss, and the statistics that other backends' backward needs; the gradient, times
  // `upstream`, where there is a place for it; its products with the scores, by which temperatures
  // learn. A backward pass is this again: nothing is gained by remembering log-sum-exps, which
  // float32 would round, where the scores must be read twice anyway.
  float run(float* stats, float upstream, float* by_temperature) {
    std::fill(stats, stats + kStats, 0.f);
    if (by_temperature) by_temperature[0] = by_temperature[1] = 0.f;
    if (weight_ == 0.f) return zero(), 0.f;
    kd_ = job_.kd * weight_ * upstream;
    ce_ = job_.ce * weight_ * upstream;
    learn_temperature_ = by_temperature && job_.logits();
    const bool reverse = job_.kind == kReverseKL, in_one = fused() || decoupled();
    double shift = 0.0;
    if (in_one) {
      shift = reverse ? kl_sums(student_, teacher_, stats) : kl_sums(teacher_, student_, stats);
      stats[reverse ? kGt : kGs] = -1.f;
      stats[reverse ? kGs : kGt] = stats[kDiv] + 1.f;
    } else if (job_.logits()) {
      exponential_row(student_);
      exponential_row(teacher_);
    }
    if (job_.logits()) {
      stats[kTopS] = student_.run.ref, stats[kZs] = static_cast<float>(student_.run.z);
      stats[kTopT] = teacher_.run.ref, stats[kZt] = static_cast<float>(teacher_.run.z);
    }
    if (!in_one) term_sums(stats);
    if (decoupled()) decouple(stats);
    const double hard = job_.hard ? hard_sums(stats) : 0.0;
    if (student_.d || teacher_.d || learn_temperature_) {
      if (!in_one)
        term_gradients(stats);
      else if (reverse)
        kl_gradients(student_, teacher_, shift);
      else
        kl_gradients(teacher_, student_, shift);
    }
    if (learn_temperature_) {
      by_temperature[0] = static_cast<float>(-student_.dot * student_.scale);
      by_temperature[1] = static_cast<float>(-teacher_.dot * teacher_.scale);
    }
    float loss = kd_ * stats[kDiv];
    if (job_.hard) loss += ce_ * static_cast<float>(hard);
    return loss;
  }

 private:
  static constexpr int kBuffers = 5;

  struct Side : Scores {
    double scale = 1.0;  // one over the temperature
    float* e = nullptr;  // exponentials of the whole row, each tile relative to the top it had seen
    float* top = nullptr;  // those tops
    RunningSoftmax run;
    double dot = 0.0;  // of the scores with the divergence's gradient

    Side() = default;
    Side(const Scores& scores, double scale_, float* e_, float* top_)
        : Scores(scores), scale(scale_), e(e_), top(top_), run(scale_) {}
  };

  bool fused() const {
    return job_.logits() && (job_.kind == kForwardKL || job_.kind == kReverseKL);
  }
  bool decoupled() const { return job_.kind == kDecoupledKL; }

  // A tile of scores; a decoupled KL does not see the label's class.
  const float* scores(const Side& x, int64_t start, int64_t n, float* buffer) const {
    const float* tile = x.tile(start, n, buffer);
    if (!decoupled()) return tile;
    const int64_t y = job_.labels[r_] - start;
    if (y < 0 || y >= n) return tile;
    if (tile != buffer) memcpy(buffer, tile, static_cast<size_t>(padded(n)) * sizeof(float));
    buffer[y] = -INFINITY;
    return buffer;
  }

  void zero() {
    student_.zero(job_.classes);
    teacher_.zero(job_.classes);
  }

  void exponential_row(Side& x) {
    for_tiles(job_.classes, [&](int64_t k, int64_t start, int64_t n) {
      const float* tile = x.tile(start, n, buffer_[0]);
      const int64_t m = padded(n);
      x.run.raise(largest_of(tile, m));
      x.run.z += exponentials_of(tile, m, x.run, x.e + start, x.after(start));
      x.top[k] = x.run.top;
    });
  }

  // Sweep one of KL(p, q): both log-sum-exps and the divergence, online. Returns log Z_q - log Z_p
  // - D, which with the scores makes log p - log q - D.
  double kl_sums(Side& p, Side& q, float* stats) {
    double cross = 0.0;
    for_tiles(job_.classes, [&](int64_t k, int64_t start, int64_t n) {
      const float *xp = scores(p, start, n, buffer_[0]), *xq = scores(q, start, n, buffer_[1]);
      const int64_t m = padded(n);
      const double ref_p = p.run.ref, ref_q = q.run.ref, z = p.run.z;
      const float factor = p.run.raise(largest_of(xp, m));
      q.run.raise(largest_of(xq, m));
      // The sum so far was relative to the old refs. Mass that is none by now contributes none,
      // even where it stood against an infinity.
      if (factor == 0.f)
        cross = 0.0;
      else if (z > 0.0)
        cross =
            (cross + z * ((ref_p - p.run.ref) * p.run.c - (ref_q - q.run.ref) * q.run.c)) * factor;
      const TileSums sums = kl_tile(xp, xq, m, p.run, q.run, p.e + start, q.e + start,
                                    p.after(start), q.after(start));
      p.run.z += sums.zp;
      q.run.z += sums.zq;
      cross += sums.cross;
      p.top[k] = p.run.top;
      q.top[k] = q.run.top;
    });
    if (p.run.z == 0.0 && decoupled()) return 0.0;  // the label's is the only class
    const double log_ratio = std::log(q.run.z / p.run.z),
                 value = cross / p.run.z * kLn2 + log_ratio;
    stats[kDiv] = static_cast<float>(value);
    return log_ratio - value;
  }

  // From the KL over the other classes to alpha * (KL of label against rest) + beta * (that KL).
  void decouple(float* stats) {
    const float alpha = job_.scalars[kP0], beta = job_.scalars[kP1];
    // Where the label's is the only class with mass, its log-odds are infinite: still right.
    const double y_s = load_one(student_.x, student_.type, job_.labels[r_]);
    const double y_t = load_one(teacher_.x, teacher_.type, job_.labels[r_]);
    binary_ = binary_kl(
        static_cast<float>((y_s - student_.run.ref) * student_.scale - student_.run.log_z()),
        static_cast<float>((y_t - teacher_.run.ref) * teacher_.scale - teacher_.run.log_z()));
    stats[kDiv] = times(alpha, binary_.value) + times(beta, stats[kDiv]);
  }

  void kl_gradients(Side& p, Side& q, double shift) {
    const bool rest =
        !decoupled() || p.run.z > 0.0;  // p has mass on another class than the label's
    const float alpha = decoupled() ? job_.scalars[kP0] : 0.f;
    const float beta = !decoupled() ? 1.f : rest ? job_.scalars[kP1] : 0.f;
    const float per_p = static_cast<float>(kd_ * p.scale),
                per_q = static_cast<float>(kd_ * q.scale), cp = per_p * beta, cq = per_q * beta,
                offset = static_cast<float>(shift);
    // What a decoupled KL takes off every other class, in parts of its probability, and gives the
    // label.
    const float label_q = per_q * alpha * binary_.by_s, label_p = per_p * alpha * binary_.by_t;
    for_tiles(job_.classes, [&](int64_t k, int64_t start, int64_t n) {
      const int64_t m = padded(n);
      const float fp = rest ? p.run.to_probability(p.top[k]) : 0.f;
      const float fq = decoupled() && q.run.z == 0.0 ? 0.f : q.run.to_probability(q.top[k]);
      const float *ep = p.e + start, *eq = q.e + start;
      if (q.d || learn_temperature_) {
        float* g = q.gradient_tile(start, n, buffer_[2]);
        const float wp = cq * fp, wq = (cq - label_q) * fq;
#pragma omp simd
        for (int64_t i = 0; i < m; ++i) g[i] = wq * eq[i] - wp * ep[i];
        if (decoupled()) set_label(start, n, g, label_q);
        finish(q, k, start, n, g);
      }
      if (p.d || learn_temperature_) {
        const float *xp = p.tile(start, n, buffer_[0]), *xq = q.tile(start, n, buffer_[1]);
        float* g = p.gradient_tile(start, n, buffer_[3]);
        kl_gradient_of_p({xp, p.run.ref, split_factor(p.scale)},
                         {xq, q.run.ref, split_factor(q.scale)}, ep, m, offset, cp * fp,
                         label_p * fp, g);
        if (decoupled()) set_label(start, n, g, label_p);
        finish(p, k, start, n, g);
      }
    });
  }

  // Sweep two: values and derivatives.
  void term_sums(float* stats) {
    double f = 0.0, g_s = 0.0, g_t = 0.0;
    const Pair log_s = split(job_.logits() ? student_.run.log_z() : 0.0);
    const Pair log_t = split(job_.logits() ? teacher_.run.log_z() : 0.0);
    // What no gradient will need goes where it stays in the first-level cache.
    const bool with_s = student_.d || learn_temperature_, with_t = teacher_.d || learn_temperature_;
    for_tiles(job_.classes, [&](int64_t k, int64_t start, int64_t n) {
      const TermTile x{student_.tile(start, n, buffer_[0]),
                       teacher_.tile(start, n, buffer_[1]),
                       split_factor(student_.scale),
                       split_factor(teacher_.scale),
                       log_s,
                       log_t,
                       student_.run.ref,
                       teacher_.run.ref,
                       job_.logits() ? student_.run.to_probability(student_.top[k]) : 1.f,
                       job_.logits() ? teacher_.run.to_probability(teacher_.top[k]) : 1.f,
                       job_.scalars[kP0],
                       job_.scalars[kP1],
                       student_.e + start,
                       teacher_.e + start,
                       with_s ? g_s_ + start : buffer_[2],
                       with_t ? g_t_ + start : buffer_[2]};
      const TermSums sums = terms_of(job_.kind, job_.inputs, x, padded(n));
      f += sums.f;
      g_s += sums.g_s;
      g_t += sums.g_t;
    });
    stats[kDiv] = static_cast<float>(f);
    // Log-probabilities are free variables: no softmax stands behind them to be differentiated.
    if (job_.logits()) stats[kGs] = static_cast<float>(g_s), stats[kGt] = static_cast<float>(g_t);
  }

  void term_gradients(const float* stats) {
    for_tiles(job_.classes, [&](int64_t k, int64_t start, int64_t n) {
      term_gradient(student_, g_s_, stats[kGs], k, start, n);
      term_gradient(teacher_, g_t_, stats[kGt], k, start, n);
    });
  }
  void term_gradient(Side& x, const float* derivatives, float sum, int64_t k, int64_t start,
                     int64_t n) {
    if (!x.d && !learn_temperature_) return;
    float* g = x.gradient_tile(start, n, buffer_[2]);
    const float scale = static_cast<float>(kd_ * x.scale);
    if (job_.logits())
      project(derivatives + start, x.e + start, padded(n), scale,
              sum * x.run.to_probability(x.top[k]), g);
    else
      multiply(derivatives + start, padded(n), scale, g);
    finish(x, k, start, n, g);
  }

  // The hard-label term's value.
  double hard_sums(float* stats) {
    if (hard_.e != student_.e)
      exponential_row(hard_);
    else
      hard_.run = student_.run;
    const double eps = job_.scalars[kSmoothing], lse = hard_.run.ref + hard_.run.log_z();
    const double score = load_one(student_.x, student_.type, job_.labels[r_]);
    double value =
        (1.0 - eps) * job_.label_weight(r_) * ((hard_.run.ref - score) + hard_.run.log_z());
    if (eps != 0.0)
      value += eps / static_cast<double>(job_.classes) *
               (lse * job_.class_weight_sum - weighted_scores());
    stats[kZ1] = static_cast<float>(hard_.run.z);
    return value;
  }

  // sum_v cw_v s_v
  double weighted_scores() const {
    double sum = 0.0;
    for_tiles(job_.classes, [&](int64_t, int64_t start, int64_t n) {
      const float* s = student_.tile(start, n, buffer_[0]);
      const float* cw = job_.class_weight ? job_.class_weight + start : nullptr;
      for (int64_t i = 0; i < n; ++i) sum += cw ? double(cw[i]) * s[i] : s[i];
    });
    return sum;
  }

  void set_label(int64_t start, int64_t n, float* g, float value) const {
    const int64_t y = job_.labels[r_] - start;
    if (y >= 0 && y < n) g[y] = value;
  }

  // The hard-label gradient of a tile: p less the targets, in pairs that cancel exactly where p
  // is 1.
  void add_hard_gradient(int64_t k, int64_t start, int64_t n, float* g) const {
    const float eps = job_.scalars[kSmoothing], own = ce_ * (1.f - eps) * job_.label_weight(r_);
    const float to_p = hard_.run.to_probability(hard_.top[k]), share = own * to_p;
    const float* e = hard_.e + start;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) g[i] += share * e[i];
    const int64_t y = job_.labels[r_] - start;
    if (y >= 0 && y < n) g[y] -= own;
    if (eps == 0.f) return;
    const float smooth = ce_ * eps / static_cast<float>(job_.classes);
    const float to_mass = to_p * static_cast<float>(job_.class_weight_sum);
    const float* cw = job_.class_weight ? job_.class_weight + start : nullptr;
    for (int64_t i = 0; i < n; ++i) g[i] += smooth * (to_mass * e[i] - (cw ? cw[i] : 1.f));
  }

  // A tile of the divergence's gradient: what the temperature learns from it, the hard-label term's
  // part of the student's, and the way to memory.
  void finish(Side& x, int64_t k, int64_t start, int64_t n, float* g) {
    if (learn_temperature_) x.dot += dot(x.tile(start, n, buffer_[4]), g, n);
    if (job_.hard && &x == &student_) add_hard_gradient(k, start, n, g);
    x.store(start, n, g);
  }

  const Job& job_;
  const int64_t r_;
  const float weight_;
  float kd_ = 0.f, ce_ = 0.f;
  bool learn_temperature_ = false;
  Binary binary_{0.f, 0.f, 0.f};
  Side student_, teacher_, hard_;  // hard_: the student at temperature 1
  float *g_s_, *g_t_;
  float* buffer_[kBuffers];
};

}  // namespace
}  // namespace KDK_NAMESPACE
