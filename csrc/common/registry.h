// Native entry points register themselves: a kernel file ends with KDK_EXPORT(function), and both
// the Python module and the CUDA-on-CPU test runner find it by name. No list is edited by hand.
//
// An entry point is any function whose parameters are Tensor, int64_t, double or bool:
//
//   void row_sum(Tensor x, Tensor out, int64_t threads);
//   KDK_EXPORT(row_sum)
//
// The build names the target in KDK_TARGET: "cpu" plus the instruction set, or "cuda".
#pragma once
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "tensor.h"

namespace kdk {

struct Value {
  enum class Kind { none, integer, real, tensor } kind = Kind::none;
  int64_t integer = 0;
  double real = 0;
  Tensor tensor;
};

template <typename T>
T unpack(const Value& v, int index) {
  auto fail = [&](const char* wanted) -> void {
    throw std::invalid_argument("argument " + std::to_string(index) + " must be " + wanted);
  };
  if constexpr (std::is_same_v<T, Tensor>) {
    if (v.kind != Value::Kind::tensor && v.kind != Value::Kind::none) fail("a tensor or None");
    return v.tensor;
  } else if constexpr (std::is_floating_point_v<T>) {
    if (v.kind == Value::Kind::integer) return static_cast<T>(v.integer);
    if (v.kind != Value::Kind::real) fail("a number");
    return static_cast<T>(v.real);
  } else {
    static_assert(std::is_integral_v<T>, "entry points take Tensor, integers, bool and double");
    if (v.kind != Value::Kind::integer) fail("an integer");
    return static_cast<T>(v.integer);
  }
}

struct Entry {
  std::string name;
  std::string target;
  int arity;
  std::function<void(const std::vector<Value>&)> call;
};

inline std::vector<Entry>& entries() {
  static std::vector<Entry> all;
  return all;
}

template <typename... A, size_t... I>
Entry make_entry(const char* name, const char* target, void (*fn)(A...),
                 std::index_sequence<I...>) {
  return {name, target, static_cast<int>(sizeof...(A)), [fn](const std::vector<Value>& args) {
            fn(unpack<std::decay_t<A>>(args[I], static_cast<int>(I))...);
          }};
}

template <typename... A>
bool register_entry(const char* name, const char* target, void (*fn)(A...)) {
  entries().push_back(make_entry(name, target, fn, std::index_sequence_for<A...>{}));
  return true;
}

inline void call(const Entry& entry, const std::vector<Value>& args) {
  if (static_cast<int>(args.size()) != entry.arity)
    throw std::invalid_argument(entry.name + " takes " + std::to_string(entry.arity) +
                                " arguments, got " + std::to_string(args.size()));
  entry.call(args);
}

}  // namespace kdk

#define KDK_EXPORT(fn)                                     \
  [[maybe_unused]] static const bool kdk_registered_##fn = \
      ::kdk::register_entry(#fn, KDK_TARGET, &fn);
