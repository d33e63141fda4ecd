// Row divergences on the CPU: rows are shared among threads; cpu_row.h works on one at a time and
// cpu_lanes.h on sixteen.
#include <algorithm>
#include <vector>

#include "common/convert.h"
#include "common/parallel.h"
#include "common/registry.h"
#include "row_divergence/cpu_block.h"
#include "row_divergence/cpu_job.h"
#include "row_divergence/cpu_lanes.h"
#include "row_divergence/cpu_row.h"

namespace KDK_NAMESPACE {
namespace {

constexpr int64_t kColumnClasses = 1024;  // strided rows up to here go sixteen at a time,
constexpr int64_t kShortClasses = 128;    // and rows of neighbouring classes up to here

// What a call writes beside gradients, and what multiplies those.
struct Output {
  float *losses, *stats;  // null in a backward pass; statistics also where nobody wants them
  const float* upstream;
  bool per_row;
  float* by_temperature;  // two a row; null where no temperature learns
};

template <typename Visit>  // visit(first row, number of rows, memory)
void for_groups(const Job& job, int64_t floats, const Visit& visit) {
  const int64_t groups = (job.rows + kRowLanes - 1) / kRowLanes;
  parallel_for(groups, job.rows * job.classes, job.threads, [&](int64_t begin, int64_t end) {
    float* memory = thread_scratch().floats(floats);
    for (int64_t g = begin; g < end; ++g)
      visit(g * kRowLanes, std::min<int64_t>(kRowLanes, job.rows - g * kRowLanes), memory);
  });
}

void run_lanes(const Job& job, const Output& out) {
  const int64_t blocks = Blocks::memory(job.classes);
  for_groups(job, blocks + LaneKernel::memory(job.classes),
             [&](int64_t first, int64_t lanes, float* memory) {
               // Lanes that are no row compute something too.
               if (lanes < kRowLanes) std::fill(memory, memory + blocks, 0.f);
               const Blocks x(job, first, lanes, memory, kRowLanes, 1);
               LaneKernel kernel(job, x.s.with_gradient(x.ds), x.t.with_gradient(x.dt), first,
                                 static_cast<int>(lanes), memory + blocks);
               kernel.run(out.losses ? out.losses + first : nullptr,
                          out.stats ? out.stats + first * kStats : nullptr,
                          out.upstream + (out.per_row ? first : 0), out.per_row,
                          out.by_temperature ? out.by_temperature + 2 * first : nullptr);
               x.save();
             });
}

void run_row(const Job& job, const Output& out, int64_t r, const Scores& student,
             const Scores& teacher, float* memory) {
  RowKernel row(job, student, teacher, r, memory);
  float unread[kStats];
  const float loss =
      row.run(out.stats ? out.stats + r * kStats : unread, out.upstream[out.per_row ? r : 0],
              out.by_temperature ? out.by_temperature + 2 * r : nullptr);
  if (out.losses) out.losses[r] = loss;
}

// Where the class axis is strided, sixteen neighbouring rows at a time are copied together first.
void run_strided_rows(const Job& job, const Output& out) {
  const int64_t blocks = Blocks::memory(job.classes);
  for_groups(job, blocks + RowKernel::memory(job.classes),
             [&](int64_t first, int64_t lanes, float* memory) {
               const Blocks x(job, first, lanes, memory, 1, job.classes);
               auto scores = [&](const Block& b, const Block& d, int64_t l) -> Scores {
                 const int64_t at = l * job.classes;
                 return {b.block + at, DType::f32, d.x ? d.block + at : nullptr, DType::f32};
               };
               for (int64_t l = 0; l < lanes; ++l)
                 run_row(job, out, first + l, scores(x.s, x.ds, l), scores(x.t, x.dt, l),
                         memory + blocks);
               x.save();
             });
}

void run_rows(const Job& job, const Output& out) {
  parallel_for(job.rows, job.rows * job.classes, job.threads, [&](int64_t begin, int64_t end) {
    float* memory = thread_scratch().floats(RowKernel::memory(job.classes));
    auto scores = [&](const Tensor& x, const Tensor& d, int64_t r) -> Scores {
      return {address(x, r, job.inner), x.dtype,          address(d, r, job.inner), d.dtype,
              d && exceeds_caches(d),   exceeds_caches(x)};
    };
    for (int64_t r = begin; r < end; ++r)
      run_row(job, out, r, scores(job.student, job.ds, r), scores(job.teacher, job.dt, r), memory);
    streams_done();
  });
}

void run(const Job& job, const Output& out) {
  auto dense = [](const Tensor& x) { return !x || x.stride[1] == 1 || x.shape[1] == 1; };
  const bool rows = dense(job.student) && dense(job.teacher) && dense(job.ds) && dense(job.dt);
  if (job.logits() && job.classes <= (rows ? kShortClasses : kColumnClasses))
    run_lanes(job, out);
  else if (rows)
    run_rows(job, out);
  else
    run_strided_rows(job, out);
}

void row_divergence_forward(Tensor student, Tensor teacher, Tensor labels, Tensor weight,
                            Tensor class_weight, Tensor scalars, Tensor divisors, Tensor losses,
                            Tensor total, Tensor stats, Tensor ds, Tensor dt, int64_t kind,
                            int64_t inputs, bool hard, int64_t count, int64_t ignore_index,
                            int64_t threads) {
  Job job = make_job(student, teacher, labels, weight, class_weight, scalars, ds, dt, kind, inputs,
                     hard, ignore_index, threads);
  float counted[2] = {1.f, 1.f};  // where nobody wants to know them
  float* divisor = divisors ? divisors.as<float>() : counted;
  if (count) {
    double kd = 0.0, ce = 0.0;
    for (int64_t r = 0; r < job.rows; ++r) {
      const double w = job.row_weight(r);
      kd += w;
      if (w != 0.0 && (count & 2)) ce += w * job.label_weight(r);
    }
    if (count & 1) divisor[0] = static_cast<float>(kd);
    if (count & 2) divisor[1] = static_cast<float>(ce);
  }
  set_factors(job, divisor);
  std::vector<float> unasked(losses ? 0 : job.rows);
  float* out = losses ? losses.as<float>() : unasked.data();
  const float one = 1.f;
  run(job, {out, stats.as<float>(), &one, false, nullptr});
  if (!total) return;
  double sum = 0.0;
  for (int64_t r = 0; r < job.rows; ++r) sum += out[r];
  *total.as<float>() = static_cast<float>(sum);
}

void row_divergence_backward(Tensor student, Tensor teacher, Tensor labels, Tensor weight,
                             Tensor class_weight, Tensor scalars, Tensor divisors, Tensor,
                             Tensor upstream, Tensor ds, Tensor dt, Tensor temperature_grad,
                             int64_t kind, int64_t inputs, bool hard, int64_t ignore_index,
                             int64_t threads) {
  Job job = make_job(student, teacher, labels, weight, class_weight, scalars, ds, dt, kind, inputs,
                     hard, ignore_index, threads);
  const float none[2] = {1.f, 1.f};
  set_factors(job, divisors ? divisors.as<float>() : none);
  run(job, {nullptr, nullptr, upstream.as<float>(), upstream.numel() != 1,
            temperature_grad.as<float>()});
}

KDK_EXPORT(row_divergence_forward)
KDK_EXPORT(row_divergence_backward)

}  // namespace
}  // namespace KDK_NAMESPACE
