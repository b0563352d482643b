// Addresses from Python.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace lift_fast {

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

template <class T>
T* pointer(const pybind11::handle& address) {
  return pointer<T>(address.cast<std::uintptr_t>());
}

}  // namespace lift_fast
