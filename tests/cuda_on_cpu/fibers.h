// Stackful coroutines on one OS thread, known to AddressSanitizer and ThreadSanitizer.
#pragma once
#include <cstddef>

#if defined(__SANITIZE_ADDRESS__) || defined(KDK_WITH_ASAN)
#define KDK_ASAN 1
#endif
// The thread build defines this for the run time too, which itself is not instrumented: the order
// in which one OS thread runs the fibers says nothing about what the kernel has synchronised.
#if defined(KDK_WITH_TSAN)
#define KDK_TSAN 1
#endif

#if defined(__x86_64__) && !defined(KDK_UCONTEXT)
#define KDK_FAST_SWITCH 1
#else
#include <ucontext.h>
#endif

namespace cuda_on_cpu {

struct Context {
#ifdef KDK_FAST_SWITCH
  void* sp = nullptr;
#else
  ucontext_t uc;
#endif
  char* stack = nullptr;  // lowest address; null for the OS thread's own
  size_t stack_size = 0;
  void* tsan = nullptr;
  void* fake_stack = nullptr;
  bool ending = false;  // set before the last switch away from it
};

void adopt_thread(Context& host);                                   // the context that calls this
void make_context(Context& c, size_t stack_size, void (*entry)());  // entry must never return
void reset_context(Context& c, void (*entry)());  // forget where it was and start anew
void destroy_context(Context& c);
void switch_context(Context& from, Context& to);
void entered_context();  // first thing that an entry does

// Happens-before edges, for ThreadSanitizer; nothing otherwise.
void acquire(void* sync);
void release(void* sync);

// While one lives, ThreadSanitizer does not look at what the running context reads and writes.
class Unwatched {
 public:
  Unwatched();
  ~Unwatched();
  Unwatched(const Unwatched&) = delete;
  Unwatched& operator=(const Unwatched&) = delete;
};

}  // namespace cuda_on_cpu
