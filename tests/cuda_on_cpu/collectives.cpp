// Barriers of blocks and clusters, and the collectives of a warp.
#include "machine.h"

namespace cuda_on_cpu {

namespace {

std::string text(Where w) {
  const char* name = w.file;
  for (const char* p = w.file; *p; ++p)
    if (*p == '/') name = p + 1;
  return std::string(name) + ":" + std::to_string(w.line);
}

std::string hex(unsigned v) {
  const char* digits = "0123456789abcdef";
  std::string s = "0x";
  for (int i = 28; i >= 0; i -= 4) s += digits[v >> i & 15];
  return s;
}

bool same(Where a, Where b) { return a.line == b.line && (a.file == b.file || text(a) == text(b)); }

}  // namespace

int block_barrier(Vote vote, int predicate, Where where) {
  Fiber& f = *machine.current;
  Block& b = *f.block_state;
  if (b.arrived == 0) {
    b.where = where;
    b.vote = vote;
    b.all = 1;
    b.any = b.count = 0;
  } else if (b.vote != vote || !same(b.where, where)) {
    fail("threads of one block at different barriers: " + text(b.where) + " and " + text(where));
  }
  b.all &= predicate != 0;
  b.any |= predicate != 0;
  b.count += predicate != 0;
  char* const sync = &b.sync[b.phase & 1];  // two, since some are at the next before all left this
  release(sync);
  if (++b.arrived == b.threads) {
    b.arrived = 0;
    ++b.phase;
    b.result = vote == Vote::any ? b.any : vote == Vote::all ? b.all : b.count;
    for (Warp& w : b.warps) {
      if (!w.queued && machine.random.below(8) == 0) w.priority = machine.random.next();
      make_ready(w, w.lanes());
    }
  }
  suspend(State::block, where);
  acquire(sync);
  return b.result;
}

// ------------------------------------------------------------------------------------ clusters

unsigned cluster_rank() { return machine.current->block_state->rank; }
unsigned cluster_blocks() {
  return static_cast<unsigned>(machine.current->block_state->cluster->blocks.size());
}

void cluster_arrive(Where where) {
  Fiber& f = *machine.current;
  Cluster& c = *f.block_state->cluster;
  if (f.cluster_arrived) fail("arrives twice at the cluster's barrier, at " + text(where));
  f.cluster_arrived = true;
  f.cluster_phase = c.phase;
  if (c.arrived == 0) {
    c.where = where;
  } else if (!same(c.where, where)) {
    fail("threads of one cluster at different barriers: " + text(c.where) + " and " + text(where));
  }
  release(&c.sync[c.phase & 1]);
  if (++c.arrived == c.threads) {
    c.arrived = 0;
    ++c.phase;
    for (Block* b : c.blocks)
      for (Warp& w : b->warps)
        if (w.in_cluster) {
          make_ready(w, w.in_cluster);
          w.in_cluster = 0;
        }
  }
}

void cluster_wait(Where where) {
  Fiber& f = *machine.current;
  Cluster& c = *f.block_state->cluster;
  if (!f.cluster_arrived)
    fail("waits at the cluster's barrier without arriving, at " + text(where));
  f.cluster_arrived = false;
  if (c.phase == f.cluster_phase) {
    f.warp->in_cluster |= 1u << f.lane;
  } else {
    make_ready(*f.warp, 1u << f.lane);  // all are there: let the order decide who goes on
  }
  suspend(State::cluster, where);
  acquire(&c.sync[f.cluster_phase & 1]);
}

// ------------------------------------------------------------------------------------ warps

unsigned lane_id() { return static_cast<unsigned>(machine.current->lane); }
unsigned active_lanes() { return machine.current->warp->lanes() & ~machine.current->warp->done; }

namespace {

uint64_t reduce(WarpOp op, const Warp& w, unsigned mask) {
  bool first = true;
  unsigned r = 0;
  for (int i = 0; i < w.count; ++i) {
    if (!(mask >> i & 1)) continue;
    const auto v = static_cast<unsigned>(w.fiber[i]->value);
    const auto sv = static_cast<int>(v), sr = static_cast<int>(r);
    switch (op) {
      case WarpOp::ballot: r |= v << i; break;
      case WarpOp::add: r += v; break;
      case WarpOp::min: r = first || sv < sr ? v : r; break;
      case WarpOp::max: r = first || sv > sr ? v : r; break;
      case WarpOp::umin: r = first || v < r ? v : r; break;
      case WarpOp::umax: r = first || v > r ? v : r; break;
      case WarpOp::bit_and: r = first ? v : r & v; break;
      case WarpOp::bit_or: r |= v; break;
      case WarpOp::bit_xor: r ^= v; break;
      default: break;
    }
    first = false;
  }
  return r;
}

// All lanes of the mask are here: gives each its result.
void complete(Warp& w, WarpOp op, unsigned mask) {
  if (op == WarpOp::sync) {
    // The last one takes over what all know and hands it on, at an address of this meeting's own,
    // so that a lane which is already at the next meeting adds nothing to this one.
    for (int i = 0; i < w.count; ++i)
      if (mask >> i & 1) acquire(&w.lane_sync[i]);
    char* const join = &w.join_sync[w.joins++ % sizeof w.join_sync];
    release(join);
    for (int i = 0; i < w.count; ++i)
      if (mask >> i & 1) w.fiber[i]->join = join;
    return;
  }
  const uint64_t all = op == WarpOp::shuffle || op == WarpOp::match_any ? 0 : reduce(op, w, mask);
  for (int i = 0; i < w.count; ++i) {
    if (!(mask >> i & 1)) continue;
    Fiber& f = *w.fiber[i];
    if (op == WarpOp::shuffle) {
      // What a lane outside the mask would give is undefined: here NaN, or -1.
      f.result = f.arg >= 0 && mask >> f.arg & 1 ? w.fiber[f.arg]->value : ~0ull;
    } else if (op == WarpOp::match_any) {
      f.result = 0;
      for (int j = 0; j < w.count; ++j)
        if (mask >> j & 1 && w.fiber[j]->value == f.value) f.result |= 1ull << j;
    } else {
      f.result = all;
    }
  }
}

}  // namespace

uint64_t warp_collective(WarpOp op, unsigned mask, uint64_t value, int arg, Where where) {
  Fiber& f = *machine.current;
  Warp& w = *f.warp;
  const unsigned me = 1u << f.lane;
  if (op == WarpOp::sync && mask == ~0u) mask = w.lanes();  // its default; the warp may be partial
  if (!(mask & me))
    fail("warp collective at " + text(where) + ": mask " + hex(mask) + " lacks the caller");
  if (mask & ~w.lanes())
    fail("warp collective at " + text(where) + ": mask " + hex(mask) +
         " names lanes the block does not have");
  if (mask & w.done)
    fail("warp collective at " + text(where) + ": mask " + hex(mask) +
         " names lanes that returned: " + hex(mask & w.done));
  f.op = op;
  f.mask = mask;
  f.value = value;
  f.arg = arg;
  if (op == WarpOp::sync) release(&w.lane_sync[f.lane]);
  w.waiting |= me;
  bool here = (w.waiting & mask) == mask;
  for (int i = 0; here && i < w.count; ++i) {
    if (!(mask >> i & 1)) continue;
    const Fiber& other = *w.fiber[i];
    if (other.mask == mask && other.op != op)
      fail("lanes of one warp in different collectives with mask " + hex(mask) + ": " +
           text(other.where) + " and " + text(where));
    here = other.mask == mask;  // one that waits elsewhere may still come
  }
  if (here) {
    complete(w, op, mask);
    w.waiting &= ~mask;
    if (mask & ~me) make_ready(w, mask & ~me);
  } else {
    suspend(State::warp, where);
  }
  if (op == WarpOp::sync && f.join) acquire(f.join);
  return f.result;
}

void thread_fence() {
  // Two fences with an atomic between them order what lies before the one and behind the other.
  // This takes the atomic for granted, so it may miss a race but never makes one up.
  static char sync;
  acquire(&sync);
  release(&sync);
}

}  // namespace cuda_on_cpu
