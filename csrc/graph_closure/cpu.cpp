// Soft shortest paths between all pairs of vertices, and their gradient.
// See kdkernels/ops/graph_closure/README.md.
#include <cmath>

#include "common/lanes.h"
#include "common/parallel.h"
#include "common/registry.h"
#include "graph_closure/math.h"

namespace KDK_NAMESPACE {
namespace {

constexpr int64_t kBlock = 16;     // vertices let into the walks' interior at a time
constexpr int64_t kColumns = 128;  // pairs of a row whose running sums stay in the nearest cache

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// d_j <- -log(e^-d_j + sum over k of e^-(a_k + via_kj)); without d's own term if it is `fresh`.
KDK_ONE_COPY void add_walks(const double* a, const double* via, int64_t stride, int64_t count,
                            int64_t n, bool fresh, double* d) {
  for (int64_t j0 = 0; j0 < n; j0 += kColumns) {
    const int64_t m = least(kColumns, n - j0);
    double shortest[kColumns];
    float sum[kColumns];
    double* const out = d + j0;
#pragma omp simd
    for (int64_t j = 0; j < m; ++j) shortest[j] = fresh ? kNoEdge : out[j];
    for (int64_t k = 0; k < count; ++k) {
      const double* const onward = via + k * stride + j0;
      const double to = a[k];
#pragma omp simd
      for (int64_t j = 0; j < m; ++j) {
        const double x = to + onward[j];
        shortest[j] = x < shortest[j] ? x : shortest[j];
      }
    }
#pragma omp simd
    for (int64_t j = 0; j < m; ++j) sum[j] = fresh ? 0.f : weight(shortest[j] - out[j]);
    for (int64_t k = 0; k < count; ++k) {
      const double* const onward = via + k * stride + j0;
      const double to = a[k];
#pragma omp simd
      for (int64_t j = 0; j < m; ++j) sum[j] += weight(shortest[j] - (to + onward[j]));
    }
#pragma omp simd
    for (int64_t j = 0; j < m; ++j) out[j] = shortest[j] - static_cast<double>(vlog(sum[j]));
  }
}

// -log of all walks within a block, none included, from those of one edge.
void star(double* p, int64_t count) {
  for (int64_t k = 0; k < count; ++k) {
    double to[kBlock], onward[kBlock];
    const double returns = std::log(-std::expm1(-p[k * kBlock + k]));
    for (int64_t i = 0; i < count; ++i) {
      to[i] = p[i * kBlock + k] + returns;
      onward[i] = p[k * kBlock + i];
    }
    for (int64_t i = 0; i < count; ++i)
      add_walks(to + i, onward, kBlock, 1, count, false, p + i * kBlock);
  }
  for (int64_t k = 0; k < count; ++k) p[k * kBlock + k] = -std::log1p(std::exp(-p[k * kBlock + k]));
}

void closure(const float* costs, int64_t n, int64_t threads, double* d, float* visits) {
  const int64_t pairs = n * n;
  for (int64_t i = 0; i < pairs; ++i) d[i] = i % (n + 1) ? static_cast<double>(costs[i]) : kNoEdge;
  Scratch memory;
  double* const onward = reinterpret_cast<double*>(memory.floats(2 * kBlock * (n + kBlock)));
  double* const within = onward + kBlock * n;
  for (int64_t k0 = 0; k0 < n; k0 += kBlock) {
    const int64_t count = least(kBlock, n - k0);
    for (int64_t k = 0; k < count; ++k) {
      for (int64_t j = 0; j < n; ++j) onward[k * n + j] = d[(k0 + k) * n + j];
      for (int64_t j = 0; j < count; ++j) within[k * kBlock + j] = onward[k * n + k0 + j];
    }
    star(within, count);
    parallel_for(n, 4 * pairs * count, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        double to[kBlock];
        add_walks(d + i * n + k0, within, kBlock, count, count, true, to);
        add_walks(to, onward, n, count, n, false, d + i * n);
      }
    });
  }
  for (int64_t j = 0; j < n; ++j) {
    const double log_visits = std::log1p(std::exp(-d[j * n + j]));
    visits[j] = static_cast<float>(std::exp(log_visits));
    for (int64_t i = 0; i < n; ++i) d[i * n + j] = i == j ? 0.0 : d[i * n + j] + log_visits;
  }
}

// body(graph, threads): graphs side by side where there are enough of them.
template <typename Body>
void for_graphs(int64_t graphs, int64_t work, int64_t threads, const Body& body) {
  if (graphs < threads) {
    for (int64_t g = 0; g < graphs; ++g) body(g, threads);
    return;
  }
  parallel_for(graphs, graphs * work, threads, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) body(g, int64_t{1});
  });
}

void graph_closure_forward(Tensor costs, Tensor distances, Tensor visits, int64_t threads) {
  const int64_t n = costs.shape[1];
  for_graphs(costs.shape[0], n * n * n, threads, [&](int64_t g, int64_t own_threads) {
    closure(costs.as<float>() + g * n * n, n, own_threads, distances.as<double>() + g * n * n,
            visits.as<float>() + g * n);
  });
}

// ---- gradient ----

// expected_j = visits sum over i of upstream_ij (e^(f_ij - f_ia - f_aj) - e^(-f_ja - f_aj)).
KDK_ONE_COPY void visits_of(const double* f, const float* upstream, int64_t n, int64_t a,
                            float visits, double* to_a, float* passing, float* expected) {
  const double* const from_a = f + a * n;
  for (int64_t i = 0; i < n; ++i) to_a[i] = f[i * n + a];
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    passing[j] = weight(-to_a[j] - from_a[j]);
    expected[j] = 0.f;
  }
  for (int64_t i = 0; i < n; ++i) {
    const double* const f_i = f + i * n;
    const float* const g = upstream + i * n;
    const double to = to_a[i];
#pragma omp simd
    for (int64_t j = 0; j < n; ++j)
      expected[j] += g[j] * (weight((f_i[j] - to) - from_a[j]) - passing[j]);
  }
  for (int64_t j = 0; j < n; ++j) expected[j] *= visits;
}

// out_b = sum over j of expected_j e^(f_aj - f_bj - c_ab).
KDK_ONE_COPY void edges_of(const double* f, const float* costs, int64_t n, int64_t a,
                           const float* expected, float* out) {
  const double* const f_a = f + a * n;
  for (int64_t b = 0; b < n; ++b) {
    const double* const f_b = f + b * n;
    const double cost = static_cast<double>(costs[b]);
    float sum = 0.f;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; ++j) sum += expected[j] * weight((f_a[j] - f_b[j]) - cost);
    out[b] = sum;
  }
  out[a] = 0.f;
}

void graph_closure_backward(Tensor costs, Tensor distances, Tensor visits, Tensor upstream,
                            Tensor d_costs, int64_t threads) {
  const int64_t n = costs.shape[1], rows = costs.shape[0] * n;
  parallel_for(rows, 8 * rows * n * n, threads, [&](int64_t begin, int64_t end) {
    Scratch memory;
    double* const to_a = reinterpret_cast<double*>(memory.floats(4 * n));
    float *const passing = reinterpret_cast<float*>(to_a + n), *const expected = passing + n;
    for (int64_t r = begin; r < end; ++r) {
      const int64_t a = r % n, graph = r - a;
      const double* const f = distances.as<double>() + graph * n;
      visits_of(f, upstream.as<float>() + graph * n, n, a, visits.as<float>()[r], to_a, passing,
                expected);
      edges_of(f, costs.as<float>() + r * n, n, a, expected, d_costs.as<float>() + r * n);
    }
  });
}

KDK_EXPORT(graph_closure_forward)
KDK_EXPORT(graph_closure_backward)

}  // namespace
}  // namespace KDK_NAMESPACE
