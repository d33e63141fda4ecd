// Launches, the order of threads, and what is said when none can go on.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <numeric>
#include <stdexcept>

#include "machine.h"

#if defined(KDK_ASAN) || defined(KDK_TSAN)
extern "C" void __sanitizer_print_stack_trace();
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_on_cpu {

Machine machine;

namespace {

std::string text(uint3 v) {
  return "(" + std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z) + ")";
}

const char* base_name(const char* path) {
  const char* name = path ? path : "?";
  for (const char* p = name; *p; ++p)
    if (*p == '/') name = p + 1;
  return name;
}

void run_thread();

Fiber* pick() {
  auto& queue = machine.queue;
  while (!queue.empty()) {
    Warp& w = *queue.front().warp;
    if (!w.ready) {
      std::pop_heap(queue.begin(), queue.end());
      queue.pop_back();
      w.queued = false;
      continue;
    }
    const int turn = static_cast<int>(machine.random.next() & 31);
    const unsigned turned = turn ? w.ready >> turn | w.ready << (32 - turn) : w.ready;
    const int lane = (__builtin_ctz(turned) + turn) & 31;
    w.ready &= ~(1u << lane);
    return w.fiber[lane];
  }
  return nullptr;
}

void go_to(Fiber* next) {
  Fiber* me = machine.current;
  if (next == me) return;
  machine.current = next;
  if (next) {
    threadIdx = next->thread;
    blockIdx = next->block_state->index;
  }
  switch_context(me ? me->context : machine.host, next ? next->context : machine.host);
}

Fiber* take_fiber() {
  if (machine.idle.empty()) {
    const char* kb = std::getenv("KDK_CPU_STACK");
    auto* f = new Fiber;
    f->copies.reserve(64);
    make_context(f->context, static_cast<size_t>(kb ? std::atoi(kb) : 128) * 1024, run_thread);
    return f;
  }
  Fiber* f = machine.idle.back();
  machine.idle.pop_back();
  if (f->abandoned) reset_context(f->context, run_thread);
  return f;
}

// A fiber runs one thread after another, each time it is taken from the idle ones.
void run_thread() {
  entered_context();
  for (;;) {
    Fiber& f = *machine.current;
    Block& b = *f.block_state;
    acquire(&machine.start_sync);
    acquire(&b.start_sync);
    if (!b.started) start_arena(b);
    machine.body(machine.arguments);
    f.copies.clear();  // what it never waited for
    f.state = State::done;
    f.warp->done |= 1u << f.lane;
    release(&b.end_sync);
    release(&machine.end_sync);
    bool cluster_ended = false;
    if (--b.left == 0) {
      acquire(&b.end_sync);
      close_arena(b);
      release(&machine.end_sync);
      cluster_ended = --b.cluster->blocks_left == 0;
      if (cluster_ended) machine.finished.push_back(b.cluster);
    }
    go_to(cluster_ended ? nullptr : pick());
  }
}

uint3 index_of(uint64_t n, dim3 size) {
  return {static_cast<unsigned>(n % size.x), static_cast<unsigned>(n / size.x % size.y),
          static_cast<unsigned>(n / size.x / size.y)};
}

// Seeds come in pairs that draw alike and turn the order round, so that of any two blocks, or warps
// of a block, each goes first in one of them.
uint32_t drawn(uint64_t which, uint64_t part) {
  const uint32_t r = Random((machine.seed / 2 * 1000003 + which) * 1000003 + part).next();
  return machine.seed & 1 ? ~r : r;
}

void start_cluster(uint64_t number) {
  const LaunchParameters& p = machine.launch;
  const dim3 per{p.grid.x / p.cluster.x, p.grid.y / p.cluster.y, p.grid.z / p.cluster.z};
  const uint3 origin = index_of(number, per);
  const unsigned blocks = p.cluster.x * p.cluster.y * p.cluster.z;
  const unsigned threads = p.block.x * p.block.y * p.block.z;
  auto* c = new Cluster;
  c->threads = static_cast<int>(blocks * threads);
  c->blocks_left = static_cast<int>(blocks);
  for (unsigned r = 0; r < blocks; ++r) {
    auto* b = new Block;
    const uint3 in = index_of(r, p.cluster);
    b->cluster = c;
    b->rank = r;
    b->index = {origin.x * p.cluster.x + in.x, origin.y * p.cluster.y + in.y,
                origin.z * p.cluster.z + in.z};
    b->threads = b->left = static_cast<int>(threads);
    b->priority = drawn(number * 64 + r, 0);
    b->warps.resize((threads + kLanes - 1) / kLanes);
    c->blocks.push_back(b);
    open_arena(*b);
    for (unsigned t = 0; t < threads; ++t) {
      Fiber* f = take_fiber();
      Warp& w = b->warps[t / kLanes];
      f->thread = index_of(t, p.block);
      f->block_state = b;
      f->warp = &w;
      f->lane = static_cast<int>(t % kLanes);
      f->state = State::ready;
      f->abandoned = false;
      f->cluster_arrived = false;
      f->copy_group = 0;
      w.fiber[f->lane] = f;
      w.count = f->lane + 1;
    }
  }
  machine.clusters.push_back(c);
  for (Block* b : c->blocks)
    for (Warp& w : b->warps) {
      w.block = b;
      w.priority = drawn(b->rank, 1 + static_cast<uint64_t>(&w - b->warps.data()));
      make_ready(w, w.lanes());
    }
}

void end_cluster(Cluster* c, bool abandoned) {
  for (Block* b : c->blocks) {
    if (!b->ended) close_arena(*b);
    // Freed with the launch, not now: the next block would begin with what this one's threads know.
    machine.old_arenas.push_back(b->arena);
    for (Warp& w : b->warps)
      for (int i = 0; i < w.count; ++i) {
        w.fiber[i]->abandoned = abandoned && w.fiber[i]->state != State::done;
        w.fiber[i]->copies.clear();
        machine.idle.push_back(w.fiber[i]);
      }
  }
  auto& alive = machine.clusters;
  alive.erase(std::find(alive.begin(), alive.end(), c));
  auto& queue = machine.queue;  // a warp may stand there with nothing left to run
  queue.erase(std::remove_if(queue.begin(), queue.end(),
                             [c](auto& q) { return q.warp->block->cluster == c; }),
              queue.end());
  std::make_heap(queue.begin(), queue.end());
  for (Block* b : c->blocks) delete b;
  delete c;
}

void run_grid() {
  const LaunchParameters& p = machine.launch;
  const uint64_t clusters = static_cast<uint64_t>(p.grid.x) * p.grid.y * p.grid.z /
                            (p.cluster.x * p.cluster.y * p.cluster.z);
  const uint64_t threads = static_cast<uint64_t>(p.block.x) * p.block.y * p.block.z * p.cluster.x *
                           p.cluster.y * p.cluster.z;
  const uint64_t at_once = std::max<uint64_t>(1, 4096 / threads);
  std::vector<uint32_t> order(clusters);
  std::iota(order.begin(), order.end(), 0u);
  for (uint64_t i = clusters; i > 1; --i)
    std::swap(order[i - 1], order[machine.random.below(static_cast<uint32_t>(i))]);
  // Nothing that fibers fill may grow later: to ThreadSanitizer a free by one fiber of what
  // another allocated is a race.
  machine.queue.reserve((at_once * threads / kLanes + at_once * 16) * 2);
  machine.finished.reserve(at_once + 1);
  machine.statics.reserve(kMaxStatics);
  release(&machine.start_sync);
  uint64_t started = 0;
  for (;;) {
    while (started < clusters && machine.clusters.size() < at_once) start_cluster(order[started++]);
    Fiber* next = pick();
    if (!next) {
      if (machine.clusters.empty()) return;
      machine.error = deadlock_report();
      return;
    }
    go_to(next);
    if (!machine.error.empty()) return;
    for (Cluster* c : machine.finished) end_cluster(c, false);
    machine.finished.clear();
  }
}

// Function and line of the kernel's frames on the running stack, innermost first: a barrier may sit
// in a helper. Only the sanitizers' own printer knows inlined frames, and it prints to stderr.
std::string stack_here() {
  std::string out;
#if defined(KDK_ASAN) || defined(KDK_TSAN)
  std::FILE* file = std::tmpfile();
  if (!file) return out;
  const int kept = dup(2);
  dup2(fileno(file), 2);
  __sanitizer_print_stack_trace();
  dup2(kept, 2);
  close(kept);
  std::rewind(file);
  char buffer[4096];
  while (std::fgets(buffer, sizeof buffer, file)) {
    std::string line = buffer;
    const size_t number = line.find('#'), in = line.find(" in ");
    if (number == std::string::npos) continue;
    line = line.substr(in == std::string::npos || in > number + 30 ? number + 3 : in + 4);
    if (line.find("cudaLaunchKernelEx") != std::string::npos ||
        line.find("std::__") != std::string::npos)
      break;
    bool ours = false;
    for (const char* part : {"__sanitizer_", "cuda_on_cpu/include/", "/collectives.cpp",
                             "/shared.cpp", "/schedule.cpp"})
      ours |= line.find(part) != std::string::npos;
    if (!ours) out += "\n      " + line.substr(0, line.find_last_not_of("\n ") + 1);
  }
  std::fclose(file);
#endif
  return out;
}

// The same for a thread that waits: it is woken for this only.
std::string stack_of(Fiber& f) {
  machine.tracing = true;
  go_to(&f);
  machine.tracing = false;
  acquire(&machine.end_sync);
  return machine.trace;
}

}  // namespace

void make_ready(Warp& w, unsigned lanes) {
  w.ready |= lanes;
  if (w.queued) return;
  // Three seeds of four run one block as far as it can go before the next; the fourth mixes them.
  const uint64_t block = machine.seed % 4 == 3 ? machine.random.next() : w.block->priority;
  machine.queue.push_back({block << 32 | w.priority, &w});
  std::push_heap(machine.queue.begin(), machine.queue.end());
  w.queued = true;
}

void suspend(State why, Where where) {
  Fiber& f = *machine.current;
  f.state = why;
  f.where = where;
  go_to(pick());
  while (machine.tracing) {
    {
      Unwatched unwatched;
      machine.trace = stack_here();
    }
    release(&machine.end_sync);
    go_to(nullptr);
  }
  f.state = State::ready;
}

std::string describe_thread(const Fiber& f) {
  return "block " + text(f.block_state->index) + " thread " + text(f.thread);
}

void fail(const std::string& message) {
  Fiber* f = machine.current;
  if (!f) throw std::runtime_error(message);
  {
    Unwatched unwatched;
    machine.error = message + " [" + describe_thread(*f) + "]" + stack_here();
  }
  release(&machine.end_sync);
  for (;;) go_to(nullptr);
}

void trap(const char* what, Where where) {
  fail(std::string(what) + " at " + base_name(where.file) + ":" + std::to_string(where.line));
}

std::string deadlock_report() {
  std::string out = "deadlock: no thread can go on";
  int reported = 0;
  for (Cluster* c : machine.clusters)
    for (Block* b : c->blocks) {
      struct Group {
        int count = 0;
        Fiber* first = nullptr;
      };
      std::map<std::string, Group> groups;
      bool waits = false;
      for (Warp& w : b->warps)
        for (int i = 0; i < w.count; ++i) {
          Fiber& f = *w.fiber[i];
          const std::string at =
              std::string(base_name(f.where.file)) + ":" + std::to_string(f.where.line);
          std::string what = "returned";
          char mask[16];
          std::snprintf(mask, sizeof mask, "%#010x", f.mask);
          if (f.state == State::warp)
            what = std::string("in a warp collective with mask ") + mask + " at " + at;
          if (f.state == State::block) what = "at the block's barrier " + at;
          if (f.state == State::cluster) what = "at the cluster's barrier " + at;
          waits |= f.state != State::done;
          Group& g = groups[what];
          if (!g.count++) g.first = &f;
        }
      if (!waits || ++reported > 4) continue;
      out += "\n  block " + text(b->index) + ":";
      for (auto& [what, g] : groups)
        out += "\n    " + std::to_string(g.count) + " threads " + what + ", first " +
               text(g.first->thread) + (g.first->state == State::done ? "" : stack_of(*g.first));
    }
  return out;
}

void name_next_kernel(const char* name) { machine.name = name; }
void set_seed(uint64_t seed) { machine.seed = seed; }

// What a sanitizer's report does not say.
void print_position() {
  const Fiber* f = machine.current;
  if (f)
    std::fprintf(stderr, "in kernel %s, %s (order of seed %llu)\n", machine.name,
                 describe_thread(*f).c_str(), static_cast<unsigned long long>(machine.seed));
}

// Runs a checked launch; `launch` in device.cpp.
void execute(const LaunchParameters& p, KernelBody body, void* arguments) {
  if (machine.current) throw std::logic_error("a kernel cannot launch a kernel");
  Unwatched unwatched;
  machine.launch = p;
  machine.body = body;
  machine.arguments = arguments;
  machine.random.reset(machine.seed);
  machine.error.clear();
  machine.statics.clear();
  machine.statics_used = machine.statics_counted = 0;
  blockDim = p.block;
  gridDim = p.grid;
  adopt_thread(machine.host);
  run_grid();
  acquire(&machine.end_sync);
  const std::string error = machine.error;
  machine.finished.clear();
  while (!machine.clusters.empty()) end_cluster(machine.clusters.back(), true);
  machine.queue.clear();
  for (char* a : machine.old_arenas) std::free(a);
  machine.old_arenas.clear();
  if (!error.empty())
    throw std::runtime_error(std::string(machine.name) + ": " + error + "\n  (order of seed " +
                             std::to_string(machine.seed) + ")");
}

}  // namespace cuda_on_cpu
