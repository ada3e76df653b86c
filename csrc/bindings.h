// How an operator's arguments come from Python: keywords, tensors as integers (data pointers).
#pragma once
#include <pybind11/pybind11.h>

#include <string>
#include <unordered_map>

#include "hebatron/types.h"

namespace py = pybind11;
using namespace hebatron;
using Ptr = uintptr_t;

static DType dtype_of(const std::string& name) {
  if (name == "float32") return DType::f32;
  if (name == "bfloat16") return DType::bf16;
  fail("dtype must be float32 or bfloat16, got " + name);
}

// The Python string of a literal, made once: kwargs keys are the same interned objects, so finding one compares pointers.
static PyObject* key_of(const char* key) {
  static std::unordered_map<const char*, PyObject*> made;  // guarded by the GIL
  PyObject*& found = made[key];
  if (!found) found = PyUnicode_InternFromString(key);
  return found;
}

static PyObject* find(const py::kwargs& kw, const char* key) { return PyDict_GetItemWithError(kw.ptr(), key_of(key)); }

static int64_t integer_of(PyObject* value) {
  const int64_t found = PyLong_AsLongLong(value);
  if (found == -1 && PyErr_Occurred()) throw py::error_already_set();
  return found;
}

static Exec exec_of(const py::kwargs& kw) {
  const auto integer = [&](const char* key, int64_t otherwise) {
    PyObject* value = find(kw, key);
    return value && value != Py_None ? integer_of(value) : otherwise;
  };
  Exec e;
  e.device = int(integer("device", -1));
  e.stream = (void*)integer("stream", 0);
  e.workspace = (void*)integer("workspace", 0);
  e.bytes_workspace = integer("bytes_workspace", 0);
  e.threads = int(integer("threads", 1));
  check(e.threads >= 1, "exec", "threads must be >= 1", e.threads);
  return e;
}

// Reads one operator's arguments from keywords; an unknown keyword is an error, a missing one names itself.
class Reader {
 public:
  explicit Reader(const py::kwargs& kw) : kw_(kw) {}
  int64_t integer(const char* key) { return integer_of(get(key)); }
  double real(const char* key) {
    const double found = PyFloat_AsDouble(get(key));
    if (found == -1.0 && PyErr_Occurred()) throw py::error_already_set();
    return found;
  }
  DType dtype(const char* key) {
    const char* name = PyUnicode_AsUTF8(get(key));
    if (!name) throw py::error_already_set();
    return dtype_of(name);
  }
  void* pointer(const char* key) {
    PyObject* value = get(key);
    return value == Py_None ? nullptr : (void*)integer_of(value);
  }
  void finish() const {
    static const char* const exec_keys[] = {"device", "stream", "workspace", "bytes_workspace", "threads"};
    size_t known = seen_;
    for (const char* key : exec_keys) known += find(kw_, key) != nullptr;
    if (known != kw_.size()) fail("unexpected keyword among: " + std::string(py::str(py::list(kw_))));
  }

 private:
  PyObject* get(const char* key) {
    PyObject* value = find(kw_, key);
    if (!value) fail(std::string("missing keyword ") + key);
    seen_++;
    return value;
  }
  const py::kwargs& kw_;
  size_t seen_ = 0;
};
