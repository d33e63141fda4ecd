// The relations of a batch's samples to each other: the match of both models' distances, of their
// angles, or the weighted sum of both, and its gradients. One call, as in small batches most of the
// time would go into several.
#include "common/registry.h"
#include "pairwise_distance/cpu_distances.h"
#include "pairwise_distance/cpu_match.h"
#include "triplet_angle/cpu_triplets.h"

namespace KDK_NAMESPACE {
namespace {

// Places in the float32 tensor `scalars`.
enum Scalar : int { kDistanceWeight, kDistanceBeta, kDistanceEps, kAngleScale, kAngleBeta };

void sample_relations(Tensor student, Tensor teacher, Tensor mask, Tensor scalars, Tensor loss,
                      Tensor ds, Tensor dt, bool distance, bool squared, bool normalize,
                      int64_t reduction, bool angle, int64_t threads) {
  const float* const given = scalars.as<float>();
  const int64_t n = student.shape[0], pairs = up_to(n * n, 16);
  const Tensor *const x[2] = {&student, &teacher}, *const dx[2] = {&ds, &dt};
  Scratch memory;
  float* at = memory.floats(6 * pairs);
  float *hi[2], *lo[2] = {}, *slopes[2] = {};
  for (int m = 0; m < 2; ++m) {
    hi[m] = at, at += pairs;
    if (angle) lo[m] = at, at += pairs;
    if (*dx[m]) slopes[m] = at, at += pairs;
    squared_distances(*x[m], hi[m], lo[m], threads);
  }
  double total = 0.0;
  if (angle)
    total += triplets::match(n, {hi[0], hi[1]}, {lo[0], lo[1]}, given[kAngleBeta],
                             given[kAngleScale], {slopes[0], slopes[1]}, threads);
  if (distance) {
    const Match m{hi[0],
                  hi[1],
                  mask.as<float>(),
                  n,
                  given[kDistanceBeta],
                  given[kDistanceEps],
                  normalize,
                  reduction,
                  static_cast<double>(given[kDistanceWeight]),
                  angle,
                  threads};
    const auto run = squared ? (mask ? match<true, true> : match<true, false>)
                             : (mask ? match<false, true> : match<false, false>);
    total += run(m, slopes[0], slopes[1]);
  }
  *loss.as<float>() = static_cast<float>(total);
  for (int m = 0; m < 2; ++m)
    if (*dx[m]) distance_gradient(*x[m], slopes[m], *dx[m], threads);
}

KDK_EXPORT(sample_relations)

}  // namespace
}  // namespace KDK_NAMESPACE
