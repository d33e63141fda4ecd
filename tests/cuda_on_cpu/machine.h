// The state of a running kernel: fibers in warps in blocks in clusters, and who runs next.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "cuda_on_cpu/runtime.h"
#include "fibers.h"

namespace cuda_on_cpu {

constexpr int kLanes = 32;
constexpr size_t kStaticLimit = 48 * 1024;
constexpr size_t kMaxStatics = 64;
constexpr size_t kMaxCarves = 32;
constexpr size_t kGap = 64;  // poison between shared arrays

struct Block;
struct Warp;

enum class State : uint8_t { ready, warp, block, cluster, done };

struct AsyncCopy {
  char* to;
  int group;
  unsigned char data[16];
};

struct Fiber {
  uint3 thread{0, 0, 0};
  Context context;
  Block* block_state = nullptr;
  Warp* warp = nullptr;
  int lane = 0;
  State state = State::ready;
  bool abandoned = false;
  Where where{};
  // What it brings to a warp collective, and takes from it.
  WarpOp op{};
  unsigned mask = 0;
  int arg = 0;
  uint64_t value = 0, result = 0;
  char* join = nullptr;
  uint64_t cluster_phase = 0;
  bool cluster_arrived = false;
  std::vector<AsyncCopy> copies;
  int copy_group = 0;
};

struct Warp {
  Block* block = nullptr;
  int count = 0;            // lanes the block has
  unsigned ready = 0;       // may run
  unsigned waiting = 0;     // in a collective
  unsigned in_cluster = 0;  // at the cluster's barrier
  unsigned done = 0;
  bool queued = false;
  uint32_t priority = 0;
  unsigned joins = 0;
  Fiber* fiber[kLanes] = {};
  char lane_sync[kLanes];  // addresses for happens-before edges
  char join_sync[64];

  unsigned lanes() const { return count == kLanes ? ~0u : (1u << count) - 1; }
};

struct Cluster;

struct Block {
  Cluster* cluster = nullptr;
  unsigned rank = 0;
  uint3 index{};
  int threads = 0, arrived = 0, left = 0;
  bool started = false, ended = false;
  Vote vote{};
  int all = 1, any = 0, count = 0, result = 0;
  uint64_t phase = 0;
  Where where{};
  uint32_t priority = 0;
  std::vector<Warp> warps;
  char* arena = nullptr;
  char sync[2], start_sync, end_sync;

  struct Carve {
    size_t at = 0, bytes = 0;
  };
  std::vector<Carve> carves;
};

struct Cluster {
  std::vector<Block*> blocks;
  int threads = 0, arrived = 0, blocks_left = 0;
  uint64_t phase = 0;
  Where where{};
  char sync[2];
};

struct StaticArray {
  const void* key;
  size_t at, bytes;
};

struct QueuedWarp {
  uint64_t key;
  Warp* warp;
  bool operator<(const QueuedWarp& o) const { return key < o.key; }
};

class Random {
 public:
  explicit Random(uint64_t seed = 1) { reset(seed); }
  void reset(uint64_t seed) {
    state_ = seed * 0x9e3779b97f4a7c15ull + 0xd1b54a32d192ed03ull;
    next();
    next();
  }
  uint32_t next() {  // splitmix64
    uint64_t z = state_ += 0x9e3779b97f4a7c15ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return static_cast<uint32_t>(z >> 32 ^ z);
  }
  uint32_t below(uint32_t n) {
    return static_cast<uint32_t>(static_cast<uint64_t>(next()) * n >> 32);
  }

 private:
  uint64_t state_;
};

struct Machine {
  LaunchParameters launch;
  const char* name = "kernel";
  KernelBody body = nullptr;
  void* arguments = nullptr;
  uint64_t seed = 0;
  Random random;
  Context host;
  Fiber* current = nullptr;
  std::vector<Fiber*> idle;
  std::vector<QueuedWarp> queue;
  std::vector<Cluster*> clusters;  // alive
  std::vector<Cluster*> finished;  // to be taken away by the host
  std::vector<char*> old_arenas;
  std::vector<StaticArray> statics;
  size_t statics_used = 0, statics_counted = 0;
  std::string error;
  bool tracing = false;  // a waiting thread is to tell its stack
  std::string trace;
  char start_sync, end_sync;  // of the launch
};
extern Machine machine;

// schedule.cpp
void make_ready(Warp& w, unsigned lanes);
void suspend(State why, Where where);
[[noreturn]] void fail(const std::string& message);
std::string describe_thread(const Fiber& f);
std::string deadlock_report();
void execute(const LaunchParameters& p, KernelBody body, void* arguments);

// shared.cpp
size_t arena_size();
void open_arena(Block& b);   // at the cluster's start: filled, still poisoned
void start_arena(Block& b);  // when the block's first thread runs
void close_arena(Block& b);  // when its last thread has returned
void land_copies(Fiber& f, int newest_group);

}  // namespace cuda_on_cpu
