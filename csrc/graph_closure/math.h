// Sums of weights held as costs, -log weight. See kdkernels/ops/graph_closure/README.md.
#pragma once
#include "common/elementary.h"

namespace KDK_NAMESPACE {

constexpr double kNoEdge = 1e30;  // finite, for the difference of two infinities is none

// e^x for x that is hardly above 0.
KDK_HD float weight(double x) { return vexp2_nonpositive(static_cast<float>(x) * kLog2E); }

}  // namespace KDK_NAMESPACE
