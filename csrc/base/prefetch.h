// Asks for memory before it is read. Worth it only where a read would miss every cache; never faults.
#pragma once

#include <cstdint>

namespace edgerun {

inline constexpr int64_t kCacheLine = 64;    // bytes; where lines are longer some requests are void
inline constexpr int64_t kSmallPage = 4096;  // bytes

// Every `stride`-th byte of [data, data + bytes), in order. Always inline, as must be what does only this: g++ takes a
// function without other effects for one without any, and drops its calls.
static inline __attribute__((always_inline)) void prefetch(const void* data, int64_t bytes,
                                                           int64_t stride = kCacheLine) {
  for (int64_t i = 0; i < bytes; i += stride) __builtin_prefetch(static_cast<const char*>(data) + i);
}

}  // namespace edgerun
