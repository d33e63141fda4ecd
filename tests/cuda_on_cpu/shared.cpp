// Shared memory: one arena per block, the same layout in all, poison between its arrays; and
// asynchronous copies into it.
#include <cstdlib>
#include <cstring>
#include <new>

#include "machine.h"

#ifdef KDK_ASAN
#include <sanitizer/asan_interface.h>
#define KDK_POISON(p, n) __asan_poison_memory_region(p, n)
#define KDK_UNPOISON(p, n) __asan_unpoison_memory_region(p, n)
#else
#define KDK_POISON(p, n) (void)(p), (void)(n)
#define KDK_UNPOISON(p, n) (void)(p), (void)(n)
#endif
#ifdef KDK_TSAN
extern "C" void __tsan_read_range(void* p, unsigned long size);
extern "C" void __tsan_write_range(void* p, unsigned long size);
#endif

namespace cuda_on_cpu {

namespace {

// Static arrays lie in the front of the arena, dynamic memory behind them.
constexpr size_t kStaticSpace = kStaticLimit + kMaxStatics * (kGap + 16);
constexpr size_t kCarveSpace = kMaxCarves * kGap;

// 0xFF is NaN in every float type and -1 or the largest integer: who reads what was never written
// gets a wrong result. Not memset, which sanitizers watch: this is not an access of the kernel's.
#if defined(__clang__) || defined(__GNUC__)
__attribute__((no_sanitize("address"), noinline))
#endif
void fill(char* p, size_t bytes) {
  volatile char* v = p;
  size_t i = 0;
  for (; i + 8 <= bytes; i += 8) *reinterpret_cast<volatile uint64_t*>(v + i) = ~0ull;
  for (; i < bytes; ++i) v[i] = static_cast<char>(0xff);
}

Block& block() { return *machine.current->block_state; }
size_t dynamic_size() { return machine.launch.dynamic_smem; }

void reveal(Block& b) {
  for (const StaticArray& s : machine.statics) KDK_UNPOISON(b.arena + s.at, s.bytes);
  if (dynamic_size()) KDK_UNPOISON(b.arena + kStaticSpace, dynamic_size());
}

}  // namespace

size_t arena_size() {
  return kStaticSpace + dynamic_size() + (dynamic_size() ? kCarveSpace : 0) + kGap;
}

void open_arena(Block& b) {
  b.arena = static_cast<char*>(std::aligned_alloc(128, (arena_size() + 127) / 128 * 128));
  if (!b.arena) throw std::bad_alloc();
  for (const StaticArray& s : machine.statics) fill(b.arena + s.at, s.bytes);
  fill(b.arena + kStaticSpace, arena_size() - kStaticSpace);
  // A block that has not begun has no shared memory that another may touch.
  KDK_POISON(b.arena, arena_size());
  b.carves.reserve(kMaxCarves);
  release(&b.start_sync);
}

void start_arena(Block& b) {
  b.started = true;
  reveal(b);
}

void close_arena(Block& b) {
  b.ended = true;
#ifdef KDK_TSAN
  if (machine.current) {  // its end is like a write: a late reader in the cluster races with it
    for (const StaticArray& s : machine.statics) __tsan_write_range(b.arena + s.at, s.bytes);
    if (dynamic_size()) __tsan_write_range(b.arena + kStaticSpace, dynamic_size());
  }
  for (const StaticArray& s : machine.statics) fill(b.arena + s.at, s.bytes);
  fill(b.arena + kStaticSpace, dynamic_size());
#endif
  KDK_POISON(b.arena, arena_size());
}

void* shared_static(const void* key, size_t bytes, size_t align, const char* name) {
  char* const arena = block().arena;
  for (const StaticArray& s : machine.statics)
    if (s.key == key) return arena + s.at;
  machine.statics_counted = (machine.statics_counted + align - 1) / align * align + bytes;
  if (machine.statics_counted > kStaticLimit || machine.statics.size() == kMaxStatics)
    fail(std::string("static shared memory is more than 48 KB or 64 arrays at ") + name);
  if (align < 16) align = 16;
  const size_t at = (machine.statics_used + kGap + align - 1) / align * align;
  machine.statics_used = at + bytes;
  machine.statics.push_back({key, at, bytes});
  for (Cluster* c : machine.clusters)
    for (Block* b : c->blocks) {
      if (b->ended) continue;
      fill(b->arena + at, bytes);
      if (b->started) KDK_UNPOISON(b->arena + at, bytes);
    }
  return arena + at;
}

void* shared_dynamic() {
  if (!dynamic_size()) fail("the kernel uses dynamic shared memory and was launched without");
  return block().arena + kStaticSpace;
}

// Arrays cut from dynamic memory, with a gap behind each. All of a block's threads cut alike, so
// only the first one's call changes anything; another cut at the same place is a new layout.
void* carve(void* base, size_t at, size_t bytes, int index) {
  Block& b = block();
  char* const dynamic = b.arena + kStaticSpace;
  if (base != dynamic) return static_cast<char*>(base) + at;  // a carver on a part: no gaps
  if (at + bytes > dynamic_size())
    fail("SmemCarver takes " + std::to_string(at + bytes) +
         " bytes of shared memory, the launch gave " + std::to_string(dynamic_size()));
  const auto i = static_cast<size_t>(index);
  if (i >= kMaxCarves) fail("SmemCarver takes more than 32 arrays");
  char* const p = dynamic + at + i * kGap;
  if (b.carves.size() > i && b.carves[i].at == at && b.carves[i].bytes == bytes) return p;
  b.carves.resize(i);
  b.carves.push_back({at, bytes});
  KDK_UNPOISON(p, bytes);
  KDK_POISON(p + bytes, static_cast<size_t>(dynamic + dynamic_size() + kCarveSpace - (p + bytes)));
  return p;
}

void* cluster_map(const void* shared, unsigned rank) {
  Block& b = block();
  const auto at = static_cast<size_t>(static_cast<const char*>(shared) - b.arena);
  if (at >= arena_size())
    fail("map_shared_rank of an address that is not this block's shared memory");
  if (rank >= b.cluster->blocks.size())
    fail("map_shared_rank of rank " + std::to_string(rank) + " in a cluster of " +
         std::to_string(b.cluster->blocks.size()));
  return b.cluster->blocks[rank]->arena + at;
}

// ------------------------------------------------------------------------------------ cp.async

namespace {
void land(const AsyncCopy& c) {
#ifdef KDK_TSAN
  __tsan_write_range(c.to, 16);
#endif
  std::memcpy(c.to, c.data, 16);
}
}  // namespace

void cp_async(void* to, const void* from, int bytes, int valid) {
  Fiber& f = *machine.current;
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16)
    fail("cp.async of 16 bytes with an address that is not 16-byte aligned");
  if (valid < 0 || valid > bytes) fail("cp.async of " + std::to_string(valid) + " bytes out of 16");
  AsyncCopy c{static_cast<char*>(to), f.copy_group, {}};
#ifdef KDK_TSAN
  if (valid) __tsan_read_range(const_cast<void*>(from), static_cast<unsigned long>(valid));
#endif
  std::memcpy(c.data, from, static_cast<size_t>(valid));
#ifdef KDK_ASAN
  if (void* bad = __asan_region_is_poisoned(to, 16)) *static_cast<volatile char*>(bad) = 0;
#endif
  // Most land at the wait, which shows a missing wait; some at once, which shows a place that was
  // still being read.
#ifndef KDK_TSAN
  if (machine.random.below(4) == 0) return land(c);
#endif
  f.copies.push_back(c);
}

void cp_async_commit() { ++machine.current->copy_group; }

void land_copies(Fiber& f, int newest_group) {
  size_t kept = 0;
  for (const AsyncCopy& c : f.copies) {
    if (c.group <= newest_group) {
      land(c);
    } else {
      f.copies[kept++] = c;
    }
  }
  f.copies.resize(kept);
}

// Like the instruction, this waits for committed groups only.
void cp_async_wait(int pending) {
  Fiber& f = *machine.current;
  land_copies(f, f.copy_group - 1 - pending);
}

}  // namespace cuda_on_cpu
