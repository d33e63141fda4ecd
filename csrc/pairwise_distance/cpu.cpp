// Squared distances of all pairs and their gradient, as operators. Their match is part of
// triplet_angle/cpu.cpp.
#include "common/registry.h"
#include "pairwise_distance/cpu_distances.h"

namespace KDK_NAMESPACE {
namespace {

void pairwise_distance_forward(Tensor x, Tensor hi, Tensor lo, int64_t threads) {
  squared_distances(x, hi.as<float>(), lo.as<float>(), threads);
}
void pairwise_distance_backward(Tensor x, Tensor weights, Tensor dx, int64_t threads) {
  distance_gradient(x, weights.as<float>(), dx, threads);
}

KDK_EXPORT(pairwise_distance_forward)
KDK_EXPORT(pairwise_distance_backward)

}  // namespace
}  // namespace KDK_NAMESPACE
