// Whether the modules of a model hold what they held, and under the same names. Called through ctypes by structure.py, with Python's lock
// held. What is called of Python is handed in as addresses: no header and no symbol of Python is needed to compile or to load this.

#include <cstdint>

namespace {

// Of Python's stable interface.
struct Python {
  void* (*attribute)(void*, void*);  // PyObject_GenericGetAttr: runs no code of a class that looks attributes up in its own way
  int64_t (*size)(void*);            // PyDict_Size
  int (*next)(void*, int64_t*, void**, void**);  // PyDict_Next
  void (*release)(void*);            // Py_DecRef
  void (*forget_error)();            // PyErr_Clear
};

// A dictionary of a module as it was: the module, the name of the attribute, and how many pairs of key and value follow.
struct Held {
  void *module, *name;
  int64_t count;
};

}  // namespace

// Dictionaries of modules, in an order in which each module is one of the first `given`, which the caller holds, or a value of an earlier
// dictionary: so none is gone before it is asked. Compared are identities alone; of no value anything is read.
extern "C" int64_t paramwatch_is_there(const Python* python, const Held* held, int64_t count, void* const* pairs) {
  for (int64_t i = 0; i < count; i++) {
    void* const found = python->attribute(held[i].module, held[i].name);
    bool same = found && python->size(found) == held[i].count;
    int64_t at = 0;
    for (void *key, *value; same && python->next(found, &at, &key, &value); pairs += 2) same = key == pairs[0] && value == pairs[1];
    if (!same) python->forget_error();
    if (found) python->release(found);
    if (!same) return 0;
  }
  return 1;
}
