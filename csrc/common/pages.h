// Memory that a kernel is about to fill for the first time.
#pragma once
#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "common/tensor.h"

namespace KDK_NAMESPACE {

// Asks for large pages under a large dense result. Fresh memory costs a fault a page, and with
// small ones these take longer than what is written there. A hint: nothing depends on it.
inline void prefer_large_pages(const Tensor& x) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(x.data);
  const uintptr_t end = begin + static_cast<uintptr_t>(x.numel() * size_of(x.dtype));
  const uintptr_t from = (begin + kPage - 1) / kPage * kPage, to = end / kPage * kPage;
  if (x.data && to > from) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#else
  (void)x;
#endif
}

}  // namespace KDK_NAMESPACE
