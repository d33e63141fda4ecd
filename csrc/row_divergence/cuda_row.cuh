// One row, whoever works on it: the sums, the loss and the gradients. `Io` brings the classes of a
// row in chunks (on chip or not, contiguous or strided), `Group` is the set of threads that share
// the row and combines their sums; cuda_rows.cuh and cuda_columns.cuh provide both.
#pragma once
#include "row_divergence/cuda_sums.cuh"

namespace KDK_NAMESPACE {

// ---------------------------------------------------------------------------- a row's constants

// One side's probabilities from its logits: p = 2^u scale, log2 p = u - log2_z.
template <bool kExact>
struct Side {
  float offset, scale, log2_z;

  __device__ float u(float x, float c) const { return exponent<kExact>(x, c, offset); }
  __device__ void from_sums(float m, float c, float z) {
    offset = offset_of<kExact>(m, c);
    scale = 1.f / z;
    log2_z = log2f(z);
  }
  // Of no classes at all: no probability, and infinite odds for any class against them.
  __device__ void from_nothing() { offset = scale = 0.f, log2_z = -INFINITY; }
  // log p, of a class that need not be among those summed.
  __device__ float log_p(float x, float c) const { return kLn2 * (u(x, c) - log2_z); }
};

template <bool kExact>
struct RowState {
  Side<kExact> s, t, one;
  float divergence, g_s, g_t;
  float mean;        // of a KL's difference of exponents, in units of 1
  float kd_s, kd_t;  // upstream, weights and 1/T of the divergence's gradient
  float ce_label, ce_smoothing, class_weights;  // of the label, of each class weight, their sum
  int label;                                    // -1: none, or not needed
  // A decoupled KL: the label's entries of its gradients, and the weight of the other classes' KL.
  float label_s, label_t, rest;
};

// A chunk without a class.
template <int N, class Io>
__device__ inline void leave_out(const Io& io, int chunk, int v, float (&xs)[N], float (&xt)[N]) {
  if (!io.holds(chunk, v)) return;
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (io.index(chunk, i) == v) xs[i] = xt[i] = -INFINITY;
}

// Nine divergences in line, eight times a chunk, would be most of the binary: their loop is not
// unrolled, and registers have no index, so the chunk turns past its first place instead.
template <int N>
__device__ inline void turn(float (&x)[N], float last) {
#pragma unroll
  for (int i = 0; i + 1 < N; ++i) x[i] = x[i + 1];
  x[N - 1] = last;
}

template <bool kExact>
__device__ inline Terms any_terms(const Setup& q, int inputs, const RowState<kExact>& r, float xs,
                                  float xt, float& ps) {
  float a, b, pt;
  if (inputs == 0) {
    const float us = r.s.u(xs, q.c_s), ut = r.t.u(xt, q.c_t);
    a = kLn2 * (us - r.s.log2_z);
    b = kLn2 * (ut - r.t.log2_z);
    ps = fast_exp2(us) * r.s.scale;
    pt = fast_exp2(ut) * r.t.scale;
  } else {
    a = xs;
    ps = expf(xs);
    b = inputs == 2 ? logf(xt) : xt;
    pt = inputs == 2 ? xt : expf(xt);
  }
  Terms x = terms(q.kind, a, b, ps, pt, q.p0, q.p1);
  if (inputs == 0) x = behind_softmax(q.kind, x, ps, pt, q.p0);
  // Probabilities given by the user are not normalised here, so nothing else carries a NaN on.
  if (inputs && (xs != xs || xt != xt)) x.f = x.g_s = x.g_t = NAN;
  return x;
}

// For a temperature's gradient, of one side: sum u g, sum g, sum u p. The second is 0 but for
// rounding, and that is nearly a multiple of p: with the third it is taken out of the first.
struct ByTemperature {
  Sums s = {0.f, 0.f, 0.f}, t = {0.f, 0.f, 0.f};

  __device__ static void add(Sums& sums, float u, float g, float p) {
    if (g != 0.f) sums.x = fmaf(u, g, sums.x);  // not 0 * inf
    sums.y += g;
    if (p > 0.f) sums.z = fmaf(u, p, sums.z);
  }
  // -sum x g / T, where x / T = ln 2 u and a constant.
  __device__ static float value(const Sums& sums) {
    return -kLn2 * fmaf(-sums.y, fabsf(sums.z) < INFINITY ? sums.z : 0.f, sums.x);
  }
};

// Adds the hard-label term's gradient, in pairs that cancel exactly where p is 1.
template <int N, class Io>
__device__ inline void add_hard(const Problem& p, const Setup& q, const RowState<Io::kExact>& r,
                                const Io& io, int chunk, const float (&xs)[N], float (&gs)[N]) {
  const float k = r.ce_label * r.one.scale;
#pragma unroll
  for (int i = 0; i < N; ++i) gs[i] = fmaf(fast_exp2(r.one.u(xs[i], kLog2e)), k, gs[i]);
  if (io.holds(chunk, r.label)) {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (io.index(chunk, i) == r.label) gs[i] -= r.ce_label;
  }
  if (q.smooth) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int v = io.index(chunk, i);
      if (v >= 0 && v < p.classes)
        gs[i] = fmaf(r.ce_smoothing,
                     fmaf(fast_exp2(r.one.u(xs[i], kLog2e)) * r.one.scale, r.class_weights,
                          -(p.class_weight ? __ldg(p.class_weight + v) : 1.f)),
                     gs[i]);
    }
  }
}

// A decoupled KL's gradients: a forward KL's among the other classes, less a multiple of their
// probabilities, which is the label's entry.
template <int N, class Io>
__device__ inline void decoupled_gradient(const Problem& p, const Setup& q,
                                          const RowState<Io::kExact>& r, const Io& io, int chunk,
                                          const float (&xs)[N], const float (&xt)[N],
                                          float (&gs)[N], float (&gt)[N],
                                          ByTemperature& temperatures) {
  const float k_s = r.kd_s * r.s.scale, k_t = r.kd_t * r.t.scale;
  const float t_to_s = r.s.scale > 0.f ? r.t.scale / r.s.scale : 0.f;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const bool label = io.index(chunk, i) == r.label;
    const float us = r.s.u(xs[i], q.c_s), ut = r.t.u(xt[i], q.c_t);
    const float es = label ? 0.f : fast_exp2(us), et = label ? 0.f : fast_exp2(ut);
    const float of_s = fmaf(r.rest, fmaf(-et, t_to_s, es), -r.label_s * es);
    const float of_t = fmaf(r.rest, fmaf(kLn2, ut - us, -r.mean), -r.label_t);
    gs[i] = label ? r.kd_s * r.label_s : k_s * of_s;
    gt[i] = label ? r.kd_t * r.label_t : k_t * (et > 0.f ? et * of_t : 0.f);
    if (p.temperature_grad) {
      ByTemperature::add(temperatures.s, us, gs[i], es * r.s.scale);
      ByTemperature::add(temperatures.t, ut, gt[i], et * r.t.scale);
    }
  }
  if (p.hard) add_hard(p, q, r, io, chunk, xs, gs);
}

// The chunk's gradients by s and t, and the temperatures' sums.
template <bool kAny, int N, class Io>
__device__ inline void gradient(const Problem& p, const Setup& q, const RowState<Io::kExact>& r,
                                const Io& io, int chunk, const float (&xs)[N], const float (&xt)[N],
                                float (&gs)[N], float (&gt)[N], ByTemperature& temperatures) {
  const float k_s = r.kd_s * r.s.scale, k_t = r.kd_t * r.t.scale;
  if constexpr (kAny) {
    if (q.kind == kDecoupledKL)
      return decoupled_gradient(p, q, r, io, chunk, xs, xt, gs, gt, temperatures);
#pragma unroll
    for (int i = 0; i < N; ++i) gs[i] = gt[i] = 0.f;
    if (p.hard) add_hard(p, q, r, io, chunk, xs, gs);
    float s[N], t[N];
#pragma unroll
    for (int i = 0; i < N; ++i) s[i] = xs[i], t[i] = xt[i];
#pragma unroll 1
    for (int i = 0; i < N; ++i) {
      float ps;
      const Terms x = any_terms(q, p.inputs, r, s[0], t[0], ps);
      const float ut = r.t.u(t[0], q.c_t), pt = fast_exp2(ut) * r.t.scale;
      const float g_s = r.kd_s * (p.inputs ? x.g_s : x.g_s - times(ps, r.g_s));
      const float g_t = r.kd_t * (p.inputs ? x.g_t : x.g_t - times(pt, r.g_t));
      if (p.temperature_grad) {
        ByTemperature::add(temperatures.s, r.s.u(s[0], q.c_s), g_s, ps);
        ByTemperature::add(temperatures.t, ut, g_t, pt);
      }
      turn(gs, gs[0] + g_s);
      turn(gt, g_t);
      turn(s, 0.f);
      turn(t, 0.f);
    }
    return;
  } else if (q.path == kFastForward) {
    // Equal rows give exactly 0.
    const float t_to_s = r.t.scale / r.s.scale;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float us = r.s.u(xs[i], q.c_s), ut = r.t.u(xt[i], q.c_t), et = fast_exp2(ut);
      gs[i] = k_s * fmaf(-et, t_to_s, fast_exp2(us));
      if (wants_teacher(p)) gt[i] = k_t * (et > 0.f ? et * fmaf(kLn2, ut - us, -r.mean) : 0.f);
    }
  } else if (q.path == kFastReverse) {
    const float s_to_t = r.s.scale / r.t.scale;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float us = r.s.u(xs[i], q.c_s), ut = r.t.u(xt[i], q.c_t), es = fast_exp2(us);
      gs[i] = k_s * (es > 0.f ? es * fmaf(kLn2, us - ut, -r.mean) : 0.f);
      if (wants_teacher(p)) gt[i] = k_t * fmaf(-es, s_to_t, fast_exp2(ut));
    }
  } else {
    const float w_t = q.p0 * r.t.scale, w_s = (1.f - q.p0) * r.s.scale;
    const float h_s = (1.f - q.p0) * kLn2, h_t = q.p0 * kLn2;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float us = r.s.u(xs[i], q.c_s), ut = r.t.u(xt[i], q.c_t);
      const float es = fast_exp2(us), et = fast_exp2(ut);
      const float mix = fast_log2(fmaxf(fmaf(es, w_s, et * w_t), kLog2Min));
      gs[i] = k_s * (es > 0.f ? es * fmaf(h_s, us - r.s.log2_z - mix, -r.g_s) : 0.f);
      if (wants_teacher(p))
        gt[i] = k_t * (et > 0.f ? et * fmaf(h_t, ut - r.t.log2_z - mix, -r.g_t) : 0.f);
    }
  }
  if (p.temperature_grad) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float us = r.s.u(xs[i], q.c_s), ut = r.t.u(xt[i], q.c_t);
      ByTemperature::add(temperatures.s, us, gs[i], fast_exp2(us) * r.s.scale);
      ByTemperature::add(temperatures.t, ut, gt[i], fast_exp2(ut) * r.t.scale);
    }
  }
  if (p.hard) add_hard(p, q, r, io, chunk, xs, gs);
}

// ---------------------------------------------------------------------------- a row

// All threads of the group call this, for a row or (with `valid` false) for none; returns the
// row's loss. Barriers are outside every condition that differs between threads.
template <bool kAny, class Io, class Group>
__device__ inline float run_row(const Problem& p, const Setup& q, Io& io, const Group& group,
                                int64_t row, bool valid) {
  constexpr int N = Io::kChunk;
  constexpr bool kExact = Io::kExact;
  const float w = valid ? row_weight(p, row) : 0.f;
  const bool active = w != 0.f;
  if (valid) io.open(row);

  const bool decoupled = kAny && q.kind == kDecoupledKL, needs_label = p.hard || decoupled;
  RowState<kExact> r;
  r.label = -1;
  if (needs_label && active) {
    const int64_t y = p.labels[row];
    if (y >= 0 && y < p.classes) r.label = static_cast<int>(y);
  }

  // First sweep: the sums that can be taken as the row arrives.
  bool first = true;
  float z_1 = 1.f, ce = 0.f, class_weights = static_cast<float>(p.classes);
  Online o = {};
  // The smoothing term is summed relative to the label's logit, so that a large common offset
  // costs no digits.
  float reference = q.smooth && r.label >= 0 ? io.student(r.label) : 0.f;
  if (!(fabsf(reference) < INFINITY)) reference = 0.f;
  Sums smooth = {0.f, 0.f, 0.f};
  if (!p.backward && (!kAny || p.inputs == 0 || p.hard)) {
    const OnlineOp<kExact> op{q.c_s, q.c_t, !kAny && q.path == kFastReverse, q.separate_z1};
    o = op.start();
    if (active) {
      io.sweep(first, [&](int chunk, const float (&xs)[N], const float (&xt)[N]) {
        if constexpr (kAny) {
          float s[N], t[N];
#pragma unroll
          for (int i = 0; i < N; ++i) s[i] = xs[i], t[i] = xt[i];
          if (decoupled) leave_out(io, chunk, r.label, s, t);
          op.add(o, s, t);
        } else {
          op.add(o, xs, xt);
        }
        if (q.smooth) {
          for (int i = 0; i < N; ++i) {
            const int v = io.index(chunk, i);
            if (v < 0 || v >= p.classes) continue;
            const float cw = p.class_weight ? __ldg(p.class_weight + v) : 1.f;
            smooth.x = fmaf(cw, xs[i] - reference, smooth.x);
            smooth.y += cw;
          }
        }
      });
    }
    o = reduce(group, o, op);
    first = false;
    z_1 = q.separate_z1 ? o.z_1 : o.z_s;
  } else if (p.backward && q.smooth && p.class_weight && active) {
    for (int c = io.begin(); c < io.end(); c += io.step())
      for (int i = 0; i < N; ++i) {
        const int v = io.index(c, i);
        if (v >= 0 && v < p.classes) smooth.y += __ldg(p.class_weight + v);
      }
  }
  if (q.smooth && p.class_weight) {
    smooth = reduce<1>(group, smooth);
    class_weights = smooth.y;
  } else if (q.smooth && !p.backward) {
    smooth = reduce<1>(group, smooth);
  }

  float label_weight = 1.f, label_logit = 0.f;
  if (r.label >= 0) {
    label_logit = io.student(r.label);
    if (p.class_weight) label_weight = p.class_weight[r.label];
  }
  const bool bad_label = needs_label && active && r.label < 0;
  float* const stats = p.stats + (valid ? row : 0) * kStats;
  r.divergence = r.g_s = r.g_t = r.mean = 0.f;
  if (p.backward && active) {
    o.m_s = stats[kTopS], o.m_t = stats[kTopT];
    o.z_s = stats[kZs], o.z_t = stats[kZt], z_1 = stats[kZ1];
    r.g_s = stats[kGs], r.g_t = stats[kGt], r.divergence = stats[kDiv];
  }
  // The hard-label term sees all classes, also where the sums have left one out.
  const float m_1 = decoupled && p.hard ? fmaxf(o.m_s, label_logit) : o.m_s;
  if (decoupled && p.hard && !p.backward)
    z_1 = z_1 * fast_exp2(OnlineOp<kExact>::distance(o.m_s, m_1, kLog2e)) +
          fast_exp2(exponent<kExact>(label_logit, kLog2e, offset_of<kExact>(m_1, kLog2e)));
  r.s.from_sums(o.m_s, q.c_s, o.z_s);
  r.t.from_sums(o.m_t, q.c_t, o.z_t);
  r.one.from_sums(m_1, kLog2e, z_1);
  if (p.backward) {
    const float z_ratio = r.t.log2_z - r.s.log2_z;
    r.mean =
        fmaf(kLn2, q.path == kFastReverse ? -z_ratio : z_ratio, decoupled ? r.g_s : r.divergence);
  }
  if (decoupled && o.z_s == 0.f) r.s.from_nothing();
  if (decoupled && o.z_t == 0.f) r.t.from_nothing();
  const float inv_classes = 1.f / static_cast<float>(p.classes);
  Binary binary = {0.f, 0.f, 0.f};
  if (decoupled && active) {
    const float odds_s = r.s.log_p(label_logit, q.c_s);
    const float odds_t = r.t.log_p(r.label >= 0 ? io.teacher(r.label) : 0.f, q.c_t);
    binary = binary_kl(odds_s, odds_t);
    // A weight of 0 must not hide what is no number.
    if (odds_s != odds_s || odds_t != odds_t) binary.value = binary.by_s = binary.by_t = NAN;
    r.label_s = times(q.p0, binary.by_s), r.label_t = times(q.p0, binary.by_t);
    r.rest = r.t.scale == 0.f ? 0.f : q.p1;
  }

  // The divergence, in a second sweep where it needs both log-sum-exps first.
  if (!p.backward) {
    if (!kAny && q.path == kFastForward) {
      r.mean = kLn2 * (o.ratio / o.z_t);
      r.divergence = r.mean + logf(o.z_s / o.z_t);
      r.g_s = -1.f, r.g_t = r.divergence + 1.f;
    } else if (!kAny && q.path == kFastReverse) {
      r.mean = -kLn2 * (o.ratio / o.z_s);
      r.divergence = r.mean + logf(o.z_t / o.z_s);
      r.g_s = r.divergence + 1.f, r.g_t = -1.f;
    } else if (decoupled) {
      r.g_t = binary.value;
      if (r.t.scale != 0.f) {
        r.mean = kLn2 * (o.ratio / o.z_t);
        r.g_s = r.mean + logf((r.s.scale == 0.f ? 1.f : o.z_s) / o.z_t);
      }
      r.divergence = times(q.p0, r.g_t) + times(q.p1, r.g_s);
      if (bad_label || r.g_t != r.g_t) r.divergence = NAN;
    } else {
      Sums d = {0.f, 0.f, 0.f};  // f, g_s, g_t
      if (active) {
        const float w_t = q.p0 * r.t.scale, w_s = (1.f - q.p0) * r.s.scale;
        io.sweep(first, [&](int, const float (&xs)[N], const float (&xt)[N]) {
          if constexpr (!kAny) {
#pragma unroll
            for (int i = 0; i < N; ++i) {
              const float us = r.s.u(xs[i], q.c_s), ut = r.t.u(xt[i], q.c_t);
              const float ps = fast_exp2(us) * w_s, pt = fast_exp2(ut) * w_t;
              // A mixture that underflows has no mass to contribute; its logarithm stays finite.
              const float mix = fast_log2(fmaxf(ps + pt, kLog2Min));
              if (ps > 0.f) d.y = fmaf(ps, us - r.s.log2_z - mix, d.y);
              if (pt > 0.f) d.z = fmaf(pt, ut - r.t.log2_z - mix, d.z);
            }
          } else {
            float s[N], t[N], ps;
#pragma unroll
            for (int i = 0; i < N; ++i) s[i] = xs[i], t[i] = xt[i];
#pragma unroll 1
            for (int i = 0; i < N; ++i) {
              const Terms x = any_terms(q, p.inputs, r, s[0], t[0], ps);
              d.x += x.f, d.y += x.g_s, d.z += x.g_t;
              turn(s, 0.f);
              turn(t, 0.f);
            }
          }
        });
      }
      d = reduce<2>(group, d);
      first = false;
      if (!kAny) d = {kLn2 * (d.y + d.z), kLn2 * d.y, kLn2 * d.z};
      // Terms without mass are dropped, also where the mass is NaN: its row must still say so.
      const float poison = p.inputs ? 0.f : 0.f * (r.s.scale + r.t.scale);
      r.divergence = d.x + poison, r.g_s = d.y + poison, r.g_t = d.z + poison;
    }
    if (p.hard) {
      // log Z, and in m c - round(m c) what the exponents had too much.
      const float to_lse = logf(z_1) + (kExact ? 0.f : -kLn2 * fmaf(m_1, kLog2e, -r.one.offset));
      const float nll = (m_1 - label_logit) + to_lse;
      ce = (1.f - q.smoothing) * label_weight * nll;
      if (q.smooth)
        ce +=
            q.smoothing * inv_classes * fmaf((m_1 - reference) + to_lse, class_weights, -smooth.x);
      if (bad_label) ce = NAN;
    }
  }

  float loss = 0.f;
  if (!p.backward && valid && group.leads()) {
    if (active) {
      loss = q.kd * w * r.divergence;
      if (p.hard) loss += q.ce * w * ce;
    }
    p.losses[row] = loss;
    const bool sums = active && !p.inputs;
    const float out[kStats] = {sums ? o.m_s : 0.f,
                               sums ? o.m_t : 0.f,
                               sums ? o.z_s : 0.f,
                               sums ? o.z_t : 0.f,
                               p.hard ? z_1 : 0.f,
                               r.g_s,
                               r.g_t,
                               r.divergence};
#pragma unroll
    for (int i = 0; i < kStats; i += 4) {
      Vec<float> half;
#pragma unroll
      for (int j = 0; j < 4; ++j) half[j] = active ? out[i + j] : 0.f;
      store_vec(stats + i, half);
    }
  }

  if (!wants_gradient(p)) return loss;
  const float upstream = !p.upstream ? 1.f : p.upstream[p.upstream_per_row && valid ? row : 0];
  const float kd = r.divergence != r.divergence || bad_label ? NAN : q.kd * w * upstream;
  const float ck = bad_label ? NAN : q.ce * w * upstream;
  r.kd_s = kd * q.inv_ts, r.kd_t = kd * q.inv_tt;
  r.ce_label = ck * (1.f - q.smoothing) * label_weight;
  r.ce_smoothing = ck * q.smoothing * inv_classes;
  r.class_weights = class_weights;
  ByTemperature temperatures;
  if (valid) io.open_gradient(row);
  if (active) {
    io.sweep(first, [&](int chunk, const float (&xs)[N], const float (&xt)[N]) {
      float gs[N], gt[N];
      gradient<kAny>(p, q, r, io, chunk, xs, xt, gs, gt, temperatures);
      if (p.ds.data) io.store_student(chunk, gs);
      if (p.dt.data) io.store_teacher(chunk, gt);
    });
  } else if (valid) {
    const float zero[N] = {};
    for (int c = io.begin(); c < io.end(); c += io.step()) {
      if (p.ds.data) io.store_student(c, zero);
      if (p.dt.data) io.store_teacher(c, zero);
    }
  }
  if (p.temperature_grad) {
    temperatures.s = reduce<3>(group, temperatures.s);
    temperatures.t = reduce<4>(group, temperatures.t);
    if (valid && group.leads()) {
      const bool any = active && !p.inputs;
      p.temperature_grad[2 * row] = any ? ByTemperature::value(temperatures.s) : 0.f;
      p.temperature_grad[2 * row + 1] = any ? ByTemperature::value(temperatures.t) : 0.f;
    }
  }
  return loss;
}

}  // namespace KDK_NAMESPACE
