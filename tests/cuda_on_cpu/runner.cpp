// Serves calls to the entry points of one cuda.cu: requests on stdin, answers on what was stdout.
// harness.py is the other end; every number is little-endian and of the width named here.
//
//   request: u64 size | u32 n, n x (str name, str value)   environment for this request
//            | u32 seeds | u64 first seed | str entry ("" lists the entries)
//            | u32 n, n x (u64 bytes, u32 address mod 256, the bytes)      buffers
//            | u32 n, n x (u8 kind, ...)                                   arguments
//     kind 0 none | 1 i64 | 2 f64 | 3 u32 buffer, u64 byte offset, i32 dtype, i32 ndim,
//     ndim x i64 shape, ndim x i64 stride; buffer 0xffffffff: an empty tensor, without an address
//   answer:  u64 size | u8 ok | for each buffer u8 changed, the bytes if so
//            or u64 size | u8 0 | str type | str message
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/registry.h"
#include "cuda_on_cpu/runtime.h"

#if defined(KDK_WITH_ASAN) || defined(KDK_WITH_TSAN)
extern "C" void __sanitizer_set_death_callback(void (*callback)());
#endif

namespace cuda_on_cpu {
void print_position();
}

namespace {

using kdk::Value;

class NotDeterministic : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

bool read_all(int fd, void* to, size_t n) {
  auto* p = static_cast<char*>(to);
  while (n) {
    const ssize_t got = read(fd, p, n);
    if (got <= 0) return false;
    p += got;
    n -= static_cast<size_t>(got);
  }
  return true;
}

void write_all(int fd, const void* from, size_t n) {
  auto* p = static_cast<const char*>(from);
  while (n) {
    const ssize_t done = write(fd, p, n);
    if (done <= 0) std::_Exit(3);
    p += done;
    n -= static_cast<size_t>(done);
  }
}

class Reader {
 public:
  explicit Reader(const std::string& bytes) : p_(bytes.data()), end_(p_ + bytes.size()) {}
  template <typename T>
  T get() {
    T v;
    std::memcpy(&v, take(sizeof v), sizeof v);
    return v;
  }
  std::string text() {
    const auto n = get<uint32_t>();
    return std::string(take(n), n);
  }
  const char* take(size_t n) {
    if (static_cast<size_t>(end_ - p_) < n) throw std::logic_error("the request is cut short");
    const char* p = p_;
    p_ += n;
    return p;
  }

 private:
  const char *p_, *end_;
};

struct Buffer {
  const char* initial;
  size_t bytes;
  uint32_t misalignment;
};

// One run's own copies, each in an allocation that ends where the tensor ends, at an address that
// is aligned just as the caller's was.
struct Copies {
  std::vector<void*> memory;
  std::vector<char*> data;
  explicit Copies(const std::vector<Buffer>& buffers) {
    for (const Buffer& b : buffers) {
      void* p = nullptr;
      if (posix_memalign(&p, 256, b.misalignment + b.bytes)) throw std::bad_alloc();
      memory.push_back(p);
      data.push_back(static_cast<char*>(p) + b.misalignment);
      std::memcpy(data.back(), b.initial, b.bytes);
    }
  }
  ~Copies() {
    for (void* p : memory) std::free(p);
  }
  Copies(const Copies&) = delete;
  Copies& operator=(const Copies&) = delete;
};

struct Argument {
  Value value;
  uint32_t buffer = ~0u;
  uint64_t offset = 0;
};

struct Request {
  uint32_t seeds;
  uint64_t first_seed;
  std::string entry;
  std::vector<Buffer> buffers;
  std::vector<Argument> arguments;
};

Request parse(Reader r) {
  static std::vector<std::string> set;
  for (const std::string& name : set) unsetenv(name.c_str());
  set.clear();
  for (auto n = r.get<uint32_t>(); n; --n) {
    const std::string name = r.text(), value = r.text();
    setenv(name.c_str(), value.c_str(), 1);
    set.push_back(name);
  }
  Request q;
  q.seeds = r.get<uint32_t>();
  q.first_seed = r.get<uint64_t>();
  q.entry = r.text();
  for (auto n = r.get<uint32_t>(); n; --n) {
    Buffer b;
    b.bytes = r.get<uint64_t>();
    b.misalignment = r.get<uint32_t>();
    b.initial = r.take(b.bytes);
    q.buffers.push_back(b);
  }
  for (auto n = r.get<uint32_t>(); n; --n) {
    Argument a;
    switch (r.get<uint8_t>()) {
      case 0: break;
      case 1:
        a.value.kind = Value::Kind::integer;
        a.value.integer = r.get<int64_t>();
        break;
      case 2:
        a.value.kind = Value::Kind::real;
        a.value.real = r.get<double>();
        break;
      default:
        a.value.kind = Value::Kind::tensor;
        a.buffer = r.get<uint32_t>();
        a.offset = r.get<uint64_t>();
        kdk::Tensor& t = a.value.tensor;
        t.dtype = static_cast<kdk::DType>(r.get<int32_t>());
        t.ndim = r.get<int32_t>();
        if (t.ndim > kdk::Tensor::kMaxDims)
          throw std::invalid_argument("tensor has too many dimensions");
        for (int d = 0; d < t.ndim; ++d) t.shape[d] = r.get<int64_t>();
        for (int d = 0; d < t.ndim; ++d) t.stride[d] = r.get<int64_t>();
    }
    q.arguments.push_back(a);
  }
  return q;
}

const kdk::Entry& find(const std::string& name) {
  for (const kdk::Entry& e : kdk::entries())
    if (e.name == name) return e;
  throw std::out_of_range("no entry point is called " + name);
}

std::unique_ptr<Copies> run(const Request& q, uint64_t seed) {
  auto copies = std::make_unique<Copies>(q.buffers);
  std::vector<Value> values;
  for (const Argument& a : q.arguments) {
    values.push_back(a.value);
    if (a.buffer != ~0u) values.back().tensor.data = copies->data.at(a.buffer) + a.offset;
  }
  cuda_on_cpu::set_seed(seed);
  cuda_on_cpu::name_next_kernel(find(q.entry).name.c_str());
  kdk::call(find(q.entry), values);
  return copies;
}

std::string call(const Request& q) {
  std::unique_ptr<Copies> first;
  for (uint32_t s = 0; s < q.seeds; ++s) {
    auto result = run(q, q.first_seed + s);
    for (size_t b = 0; first && b < q.buffers.size(); ++b) {
      const char *x = first->data[b], *y = result->data[b];
      size_t i = 0;
      if (std::memcmp(x, y, q.buffers[b].bytes) == 0) continue;
      while (x[i] == y[i]) ++i;
      std::string where;
      for (size_t a = 0; a < q.arguments.size(); ++a)
        if (q.arguments[a].buffer == b)
          where += (where.empty() ? "argument " : ", ") + std::to_string(a);
      throw NotDeterministic(q.entry + ": results depend on the order of threads: " + where +
                             ", byte " + std::to_string(i) + " (seeds " +
                             std::to_string(q.first_seed) + " and " +
                             std::to_string(q.first_seed + s) + ")");
    }
    if (!first) first = std::move(result);
  }
  std::string out;
  for (size_t b = 0; first && b < q.buffers.size(); ++b) {
    const bool changed = std::memcmp(first->data[b], q.buffers[b].initial, q.buffers[b].bytes) != 0;
    out += static_cast<char>(changed);
    if (changed) out.append(first->data[b], q.buffers[b].bytes);
  }
  return out;
}

void append(std::string& out, const std::string& text) {
  const auto n = static_cast<uint32_t>(text.size());
  out.append(reinterpret_cast<const char*>(&n), sizeof n);
  out += text;
}

std::string failure(const char* type, const std::exception& e) {
  std::string out(1, '\0');
  append(out, type);
  append(out, e.what());
  return out;
}

std::string answer(const std::string& request) {
  try {
    const Request q = parse(Reader(request));
    if (!q.entry.empty()) return '\1' + call(q);
    std::string out(1, '\1');
    for (const kdk::Entry& e : kdk::entries()) append(out, e.name);
    return out;
  } catch (const std::invalid_argument& e) {
    return failure("invalid_argument", e);
  } catch (const std::out_of_range& e) {
    return failure("out_of_range", e);
  } catch (const NotDeterministic& e) {
    return failure("not_deterministic", e);
  } catch (const std::exception& e) {
    return failure("runtime_error", e);
  }
}

}  // namespace

int main() {
#if defined(KDK_WITH_ASAN) || defined(KDK_WITH_TSAN)
  __sanitizer_set_death_callback(cuda_on_cpu::print_position);
#endif
  const int out = dup(1);
  dup2(2, 1);  // a kernel's printf must not end up between the answers
  uint64_t size = 0;
  while (read_all(0, &size, sizeof size)) {
    std::string request(size, '\0');
    if (!read_all(0, request.data(), size)) return 2;
    const std::string reply = answer(request);
    std::fflush(stdout);
    size = reply.size();
    write_all(out, &size, sizeof size);
    write_all(out, reply.data(), reply.size());
  }
  return 0;
}
