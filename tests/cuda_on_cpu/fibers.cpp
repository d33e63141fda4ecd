#include "fibers.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#ifdef KDK_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef KDK_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* addr);
void __tsan_release(void* addr);
void AnnotateIgnoreReadsBegin(const char* file, int line);  // writes too
void AnnotateIgnoreReadsEnd(const char* file, int line);
}
#endif

namespace cuda_on_cpu {

namespace {
Context* entering = nullptr;  // whom the switch under way leads to
Context* leaving = nullptr;
Context* host_context = nullptr;

size_t page() {
  static const size_t size = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return size;
}
}  // namespace

#ifdef KDK_FAST_SWITCH
// Saves what the System V ABI lets a callee keep, and nothing else: ucontext also makes a system
// call for the signal mask at each switch, which costs several times as much.
extern "C" void kdk_switch_stack(void** from, void* to);
asm(R"(
.text
.p2align 4
.globl kdk_switch_stack
.hidden kdk_switch_stack
.type kdk_switch_stack,@function
kdk_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size kdk_switch_stack,.-kdk_switch_stack
)");
#endif

static void prepare(Context& c, void (*entry)()) {
#ifdef KDK_FAST_SWITCH
  auto* top = reinterpret_cast<void**>(c.stack + c.stack_size);
  *--top = nullptr;  // where unwinders stop; also aligns as a call does
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  c.sp = top;
#else
  getcontext(&c.uc);
  c.uc.uc_stack.ss_sp = c.stack;
  c.uc.uc_stack.ss_size = c.stack_size;
  c.uc.uc_link = nullptr;
  makecontext(&c.uc, entry, 0);
#endif
  c.ending = false;
  c.fake_stack = nullptr;
}

void adopt_thread(Context& host) {
  host_context = &host;
#ifdef KDK_TSAN
  host.tsan = __tsan_get_current_fiber();
#endif
}

void make_context(Context& c, size_t stack_size, void (*entry)()) {
  stack_size = (stack_size + page() - 1) / page() * page();
  void* p = mmap(nullptr, stack_size + page(), PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  mprotect(p, page(), PROT_NONE);  // an overflow ends here and not in the next thread's stack
  c.stack = static_cast<char*>(p) + page();
  c.stack_size = stack_size;
#ifdef KDK_TSAN
  c.tsan = __tsan_create_fiber(0);
#endif
  prepare(c, entry);
}

void reset_context(Context& c, void (*entry)()) {
#ifdef KDK_ASAN
  __asan_unpoison_memory_region(c.stack, c.stack_size);  // frames that were never left
#endif
#ifdef KDK_TSAN
  __tsan_destroy_fiber(c.tsan);
  c.tsan = __tsan_create_fiber(0);
#endif
  prepare(c, entry);
}

void destroy_context(Context& c) {
#ifdef KDK_TSAN
  __tsan_destroy_fiber(c.tsan);
#endif
#ifdef KDK_ASAN
  __asan_unpoison_memory_region(c.stack, c.stack_size);
#endif
  munmap(c.stack - page(), c.stack_size + page());
  c.stack = nullptr;
}

// Called on the new stack right after each switch.
static void arrived() {
#ifdef KDK_ASAN
  const void* bottom = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(entering->fake_stack, &bottom, &size);
  if (leaving == host_context && !host_context->stack) {  // only now are its bounds known
    host_context->stack = static_cast<char*>(const_cast<void*>(bottom));
    host_context->stack_size = size;
  }
#endif
}

void entered_context() { arrived(); }

void switch_context(Context& from, Context& to) {
  leaving = &from;
  entering = &to;
#ifdef KDK_ASAN
  __sanitizer_start_switch_fiber(from.ending ? nullptr : &from.fake_stack, to.stack, to.stack_size);
#endif
#ifdef KDK_TSAN
  __tsan_switch_to_fiber(to.tsan, 1 /* no synchronisation */);
#endif
#ifdef KDK_FAST_SWITCH
  kdk_switch_stack(&from.sp, to.sp);
#else
  swapcontext(&from.uc, &to.uc);
#endif
  arrived();
}

#ifdef KDK_TSAN
void acquire(void* sync) { __tsan_acquire(sync); }
void release(void* sync) { __tsan_release(sync); }
Unwatched::Unwatched() { AnnotateIgnoreReadsBegin(__FILE__, __LINE__); }
Unwatched::~Unwatched() { AnnotateIgnoreReadsEnd(__FILE__, __LINE__); }
#else
void acquire(void*) {}
void release(void*) {}
Unwatched::Unwatched() {}
Unwatched::~Unwatched() {}
#endif

}  // namespace cuda_on_cpu
