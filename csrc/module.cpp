// The pybind11 module kdkernels._C: it hands every registered entry point to Python and nothing
// else. Tensors arrive as tuples (address, dtype code, shape, stride); see kdkernels/native.py.
#include <pybind11/pybind11.h>

#include <map>

#include "common/registry.h"

namespace py = pybind11;
using kdk::Entry;
using kdk::Value;

namespace {

Value to_value(py::handle h) {
  Value v;
  if (h.is_none()) return v;
  if (PyTuple_Check(h.ptr())) {
    v.kind = Value::Kind::tensor;
    PyObject* t = h.ptr();
    if (PyTuple_GET_SIZE(t) != 4) throw std::invalid_argument("a tensor is a tuple of four");
    v.tensor.data = PyLong_AsVoidPtr(PyTuple_GET_ITEM(t, 0));
    v.tensor.dtype = static_cast<kdk::DType>(PyLong_AsLong(PyTuple_GET_ITEM(t, 1)));
    PyObject* shape = PyTuple_GET_ITEM(t, 2);
    PyObject* stride = PyTuple_GET_ITEM(t, 3);
    const Py_ssize_t n = PyTuple_GET_SIZE(shape);
    if (n > kdk::Tensor::kMaxDims || n != PyTuple_GET_SIZE(stride))
      throw std::invalid_argument("tensor has too many dimensions");
    v.tensor.ndim = static_cast<int32_t>(n);
    for (Py_ssize_t d = 0; d < n; ++d) {
      v.tensor.shape[d] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape, d));
      v.tensor.stride[d] = PyLong_AsLongLong(PyTuple_GET_ITEM(stride, d));
    }
  } else if (PyFloat_Check(h.ptr())) {
    v.kind = Value::Kind::real;
    v.real = PyFloat_AS_DOUBLE(h.ptr());
  } else {
    v.kind = Value::Kind::integer;
    v.integer = PyLong_AsLongLong(h.ptr());
  }
  if (PyErr_Occurred()) throw py::error_already_set();
  return v;
}

// The widest instruction set this processor has, of those the build made.
int cpu_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // The bits of x86-64-v4 and v3 that our kernels can use; v2 is the baseline of the wheel.
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return 4;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    return 3;
  return 2;
#else
  return 0;
#endif
}

// "cpu.x86-64-v3" -> 3, "cpu.generic" -> 0; -1 for anything that is not a CPU target.
int level_of(const std::string& target) {
  if (target.rfind("cpu.", 0) != 0) return -1;
  return target.rfind("cpu.x86-64-v", 0) == 0 ? target.back() - '0' : 0;
}

py::object bind(const Entry& entry) {
  return py::cpp_function(
      [entry](const py::args& args) {
        std::vector<Value> values;
        values.reserve(args.size());
        for (py::handle a : args) values.push_back(to_value(a));
        py::gil_scoped_release nogil;
        kdk::call(entry, values);
      },
      py::name(entry.name.c_str()));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of kdkernels: m.cpu and m.cuda map names to functions.";
  std::map<std::string, const Entry*> best;
  py::dict cpu, cuda;
  const int limit = cpu_level();
  for (const Entry& e : kdk::entries()) {
    const int level = level_of(e.target);
    if (level < 0) {
      cuda[e.name.c_str()] = bind(e);
    } else if (level <= limit) {
      const Entry*& slot = best[e.name];
      if (!slot || level_of(slot->target) < level) slot = &e;
    }
  }
  std::string target;
  for (const auto& [name, entry] : best) {
    cpu[name.c_str()] = bind(*entry);
    target = entry->target;
  }
  m.attr("cpu") = cpu;
  m.attr("cuda") = cuda;
  m.attr("cpu_target") = target;
#ifdef KDK_CUDA_ARCHS
  m.attr("cuda_archs") = KDK_CUDA_ARCHS;
#else
  m.attr("cuda_archs") = "";
#endif
}
