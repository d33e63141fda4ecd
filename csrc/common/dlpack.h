// What is needed of DLPack's C exchange interface, version 1 (https://dmlc.github.io/dlpack): a
// table of functions that a tensor's Python type carries, of which one describes a tensor.
#pragma once
#include <Python.h>

#include <cstdint>

namespace dlpack {

enum Code { kInt = 0, kFloat = 2, kBfloat = 4 };

struct Tensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;  // owned by the tensor that was read
  uint64_t byte_offset;
};

struct Exchange {
  uint32_t major, minor;
  Exchange* older;
  void *allocate, *managed_from, *managed_to;
  int (*read)(void* py_object, Tensor* out);  // 0, or -1 with a Python error; may be null
  void* current_stream;
};

// The table of a type, or null where it has none that this header knows.
inline const Exchange* exchange_of(PyTypeObject* type) {
  PyObject* capsule =
      PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
  const Exchange* table = nullptr;
  if (capsule && PyCapsule_IsValid(capsule, "dlpack_exchange_api"))
    table = static_cast<Exchange*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  PyErr_Clear();
  Py_XDECREF(capsule);
  while (table && table->major > 1) table = table->older;
  return table && table->major == 1 && table->read ? table : nullptr;
}

}  // namespace dlpack
