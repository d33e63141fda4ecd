// The pybind11 module kdkernels._C, which hands every registered entry point to Python and nothing
// else: m.cpu and m.cuda map names to entries, and m.call runs one. An argument is None, a number,
// a tensor, or a tuple (tensor, shape, stride) that sees the tensor otherwise, from its own first
// element. No version of torch is built against: a tensor is read through DLPack's exchange table
// where its type has one, else by its Python attributes, which takes longer than some kernels.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <map>

#include "common/dlpack.h"
#include "common/registry.h"

namespace py = pybind11;
using kdk::Entry;
using kdk::Value;

namespace {

// torch.dtype -> kdk::DType; filled by kdkernels/native.py.
PyObject* dtypes = nullptr;

// A new reference, or the error there is instead.
py::object own(PyObject* x) {
  if (!x) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(x);
}

void read_sizes(PyObject* sizes, int64_t* out, int32_t* n) {
  if (!PyTuple_Check(sizes)) throw py::type_error("shapes and strides are tuples");
  const Py_ssize_t count = PyTuple_GET_SIZE(sizes);
  if (count > kdk::Tensor::kMaxDims) throw std::invalid_argument("tensor has too many dimensions");
  *n = static_cast<int32_t>(count);
  for (Py_ssize_t d = 0; d < count; ++d) out[d] = PyLong_AsLongLong(PyTuple_GET_ITEM(sizes, d));
}

kdk::DType code_of(PyObject* x) {
  static PyObject* const dtype = PyUnicode_InternFromString("dtype");
  PyObject* code = PyDict_GetItemWithError(dtypes, own(PyObject_GetAttr(x, dtype)).ptr());
  if (!code) throw py::type_error("the kernels have no such dtype");
  return static_cast<kdk::DType>(PyLong_AsLong(code));
}

// Data and dtype, and with `whole` the shape and the strides too.
kdk::Tensor read_attributes(PyObject* x, bool whole) {
  static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
  static PyObject* const shape = PyUnicode_InternFromString("shape");
  static PyObject* const stride = PyUnicode_InternFromString("stride");
  kdk::Tensor t;
  t.data = PyLong_AsVoidPtr(own(PyObject_CallMethodNoArgs(x, data_ptr)).ptr());
  t.dtype = code_of(x);
  if (!whole) return t;
  read_sizes(own(PyObject_GetAttr(x, shape)).ptr(), t.shape, &t.ndim);
  read_sizes(own(PyObject_CallMethodNoArgs(x, stride)).ptr(), t.stride, &t.ndim);
  return t;
}

// The same through the exchange table.
kdk::Tensor read_exchanged(const dlpack::Exchange& table, PyObject* x, bool whole) {
  dlpack::Tensor from{};
  if (table.read(x, &from) != 0) throw py::error_already_set();
  kdk::Tensor t;
  t.data = static_cast<char*>(from.data) + from.byte_offset;
  switch (from.code << 8 | from.bits) {
    case dlpack::kFloat << 8 | 32: t.dtype = kdk::DType::f32; break;
    case dlpack::kFloat << 8 | 16: t.dtype = kdk::DType::f16; break;
    case dlpack::kBfloat << 8 | 16: t.dtype = kdk::DType::bf16; break;
    case dlpack::kInt << 8 | 64: t.dtype = kdk::DType::i64; break;
    default: t.dtype = code_of(x);
  }
  if (!whole) return t;
  if (from.ndim > kdk::Tensor::kMaxDims)
    throw std::invalid_argument("tensor has too many dimensions");
  t.ndim = from.ndim;
  std::copy_n(from.shape, from.ndim, t.shape);
  std::copy_n(from.strides, from.ndim, t.stride);
  return t;
}

kdk::Tensor read_tensor(PyObject* x, bool whole) {
  // Tensors and parameters: two types, asked once each.
  static std::map<PyTypeObject*, const dlpack::Exchange*> tables;
  const auto found = tables.find(Py_TYPE(x));
  const dlpack::Exchange* table = found != tables.end()
                                      ? found->second
                                      : (tables[Py_TYPE(x)] = dlpack::exchange_of(Py_TYPE(x)));
  return table ? read_exchanged(*table, x, whole) : read_attributes(x, whole);
}

kdk::Tensor to_view(PyObject* x, PyObject* shape, PyObject* stride) {
  kdk::Tensor t = read_tensor(x, false);
  int32_t strides = 0;
  read_sizes(shape, t.shape, &t.ndim);
  read_sizes(stride, t.stride, &strides);
  if (strides != t.ndim) throw std::invalid_argument("a shape and a stride differ in length");
  return t;
}

Value to_value(PyObject* x) {
  Value v;
  if (x == Py_None) return v;
  if (PyLong_Check(x)) {
    v.kind = Value::Kind::integer;
    v.integer = PyLong_AsLongLong(x);
  } else if (PyFloat_Check(x)) {
    v.kind = Value::Kind::real;
    v.real = PyFloat_AS_DOUBLE(x);
  } else if (PyTuple_Check(x)) {
    if (PyTuple_GET_SIZE(x) != 3) throw std::invalid_argument("a view is a tuple of three");
    v.kind = Value::Kind::tensor;
    v.tensor = to_view(PyTuple_GET_ITEM(x, 0), PyTuple_GET_ITEM(x, 1), PyTuple_GET_ITEM(x, 2));
  } else {
    v.kind = Value::Kind::tensor;
    v.tensor = read_tensor(x, true);
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

constexpr const char* kEntry = "kdkernels.entry";

// body's result, or null with the Python error that its exception is.
template <typename Body>
PyObject* with_errors(const Body& body) {
  try {
    return body();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::out_of_range& error) {
    PyErr_SetString(PyExc_IndexError, error.what());
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// The arguments as they lie on Python's stack: pybind11's own way of taking any number of them
// costs half a microsecond.
PyObject* call_entry(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return with_errors([&]() -> PyObject* {
    if (count < 2 || !PyDict_Check(args[0]))
      throw py::type_error("call takes entries, a name, and that entry's arguments");
    PyObject* capsule = PyDict_GetItemWithError(args[0], args[1]);
    if (!capsule) {
      if (!PyErr_Occurred()) PyErr_SetObject(PyExc_KeyError, args[1]);
      return nullptr;
    }
    const auto* entry = static_cast<const Entry*>(PyCapsule_GetPointer(capsule, kEntry));
    if (!entry) return nullptr;
    std::vector<Value> values;
    values.reserve(static_cast<size_t>(count));
    for (Py_ssize_t i = 2; i < count; ++i) values.push_back(to_value(args[i]));
    {
      py::gil_scoped_release nogil;
      kdk::call(*entry, values);
    }
    Py_RETURN_NONE;
  });
}

PyObject* is_one(PyObject*, PyObject* x) {
  return with_errors([&] {
    const kdk::Tensor t = read_tensor(x, true);
    const bool wide = t.dtype == kdk::DType::f64;
    if ((!wide && t.dtype != kdk::DType::f32) || t.numel() != 1)
      throw std::invalid_argument("is_one takes a float32 or float64 tensor with one element");
    return PyBool_FromLong(wide ? *t.as<double>() == 1.0 : *t.as<float>() == 1.f);
  });
}

PyMethodDef functions[] = {
    {"call", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call_entry)), METH_FASTCALL,
     "call(entries, name, ...): runs one of m.cpu or m.cuda."},
    {"is_one", is_one, METH_O,
     "Whether a CPU tensor's one element is 1, in float32 or float64; x.item() takes 2 us in a "
     "backward pass."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of kdkernels: call(cpu, name, ...) or call(cuda, name, ...) runs one.";
  PyModule_AddFunctions(m.ptr(), functions);
  // Entries live as long as the process.
  auto handle = [](const Entry& entry) { return py::capsule(&entry, kEntry); };
  std::map<std::string, const Entry*> best;
  py::dict cpu, cuda;
  const int limit = cpu_level();
  for (const Entry& e : kdk::entries()) {
    const int level = level_of(e.target);
    if (level < 0) {
      cuda[e.name.c_str()] = handle(e);
    } else if (level <= limit) {
      const Entry*& slot = best[e.name];
      if (!slot || level_of(slot->target) < level) slot = &e;
    }
  }
  std::string target;
  for (const auto& [name, entry] : best) {
    cpu[name.c_str()] = handle(*entry);
    target = entry->target;
  }
  py::dict codes;
  dtypes = codes.inc_ref().ptr();
  m.attr("dtypes") = codes;
  m.attr("cpu") = cpu;
  m.attr("cuda") = cuda;
  m.attr("cpu_target") = target;
}
