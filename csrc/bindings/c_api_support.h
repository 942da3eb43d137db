// c_api_support: what every function of the C boundary does: no exception leaves it, a failure leaves its message for the
// thread, and a caller's struct may be of an older or a newer version than ours.
#pragma once

#include <algorithm>
#include <cstring>
#include <exception>
#include <new>
#include <string>

#include "csrc/base/status.h"
#include "csrc/bindings/c_api.h"

namespace edgerun::c_api {

inline thread_local std::string last_error;

// A message quotes names of a manifest; whatever stands in them, it stays one line.
inline edgerun_status report(const Status& status) {
  if (!status.ok()) {
    last_error = status.message();
    for (char& c : last_error) c = static_cast<unsigned char>(c) < 0x20 || c == 0x7f ? ' ' : c;
  }
  return static_cast<edgerun_status>(status.code());
}

inline Status invalid(const char* message) { return Status(StatusCode::kInvalidArgument, message); }

// Runs `body`, which returns a Status; an exception of the standard library ends here.
template <typename Body>
edgerun_status guarded(const Body& body) noexcept {
  try {
    try {
      return report(body());
    } catch (const std::bad_alloc&) {
      return report(Status(StatusCode::kOutOfMemory, "out of memory: close other sessions or use a shorter context"));
    } catch (const std::exception& error) {
      return report(Status(StatusCode::kInternal, std::string("unexpected: ") + error.what()));
    }
  } catch (...) {
    last_error.clear();
    return EDGERUN_OUT_OF_MEMORY;  // not even the message could be kept
  }
}

// Copies as much of a caller's struct as both sides know, over our defaults.
template <typename Struct>
Status take(const Struct* given, Struct* ours) {
  if (given == nullptr) return Status();
  if (given->struct_bytes < sizeof(size_t)) return invalid("struct_bytes is not set: start from the _default function");
  std::memcpy(ours, given, std::min(sizeof(Struct), given->struct_bytes));
  return Status();
}

template <typename Struct>
Status give(Struct ours, Struct* target) {
  if (target == nullptr) return Status();
  const size_t bytes = target->struct_bytes;
  if (bytes < sizeof(size_t)) return invalid("struct_bytes is not set: set it to sizeof of the struct");
  ours.struct_bytes = bytes;
  std::memcpy(target, &ours, std::min(sizeof(Struct), bytes));
  return Status();
}

}  // namespace edgerun::c_api
