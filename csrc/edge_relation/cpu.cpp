// What relates the two nodes of each edge, and its gradient to the nodes' features.
// See kdkernels/ops/edge_relation/README.md.
#include <stdexcept>
#include <string>

#include "common/lanes.h"
#include "common/parallel.h"
#include "common/registry.h"

namespace KDK_NAMESPACE {
namespace {

void check(const int64_t* nodes, int64_t edges, int64_t count) {
  for (int64_t e = 0; e < edges; ++e)
    if (nodes[e] < 0 || nodes[e] >= count)
      throw std::out_of_range("edge_index holds " + std::to_string(nodes[e]) + ", outside 0 to " +
                              std::to_string(count - 1));
}

KDK_ONE_COPY float product(const float* a, const float* b, int64_t n) {
  float sum = 0.f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

KDK_ONE_COPY float squared_distance(const float* a, const float* b, int64_t n) {
  float sum = 0.f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += (a[i] - b[i]) * (a[i] - b[i]);
  return sum;
}

void edge_values(Tensor x, Tensor source, Tensor target, Tensor out, bool products,
                 int64_t threads) {
  const int64_t edges = out.shape[0], features = x.shape[1];
  const int64_t *const from = source.as<int64_t>(), *const to = target.as<int64_t>();
  check(from, edges, x.shape[0]);
  check(to, edges, x.shape[0]);
  parallel_for(edges, edges * features, threads, [&](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; ++e) {
      const float* const a = x.as<float>() + from[e] * features;
      const float* const b = x.as<float>() + to[e] * features;
      out.as<float>()[e] = products ? product(a, b, features) : squared_distance(a, b, features);
    }
  });
}

KDK_ONE_COPY void add_neighbour(const float* own, const float* other, float weight, int64_t n,
                                bool products, float* out) {
  if (products) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] += weight * other[i];
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] += weight * (own[i] - other[i]);
  }
}

// Every node gathers from its edges: those that lead to it, in their order, then those from it.
void edge_gradient(Tensor x, Tensor weights, Tensor source, Tensor target, Tensor arriving,
                   Tensor leaving, Tensor by_source, Tensor dx, bool products, int64_t threads) {
  const int64_t nodes = x.shape[0], features = x.shape[1];
  const float factor = products ? 1.f : 2.f;
  parallel_for(
      nodes, (2 * weights.shape[0] + nodes) * features, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const float* const own = x.as<float>() + i * features;
          float* const out = dx.as<float>() + i * features;
          for (int64_t f = 0; f < features; ++f) out[f] = 0.f;
          auto add = [&](int64_t e, const Tensor& other) {
            add_neighbour(own, x.as<float>() + other.as<int64_t>()[e] * features,
                          factor * weights.as<float>()[e], features, products, out);
          };
          const int64_t *const in = arriving.as<int64_t>() + i, *const away =
                                                                    leaving.as<int64_t>() + i;
          for (int64_t e = in[0]; e < in[1]; ++e) add(e, source);
          for (int64_t k = away[0]; k < away[1]; ++k) add(by_source.as<int64_t>()[k], target);
        }
      });
}

KDK_EXPORT(edge_values)
KDK_EXPORT(edge_gradient)

}  // namespace
}  // namespace KDK_NAMESPACE
