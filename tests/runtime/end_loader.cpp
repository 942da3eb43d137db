// Preloaded into a process, this ends the block loader's thread in the middle of a load, as what a load calls might: at
// its n-th call of operator new, which C++ code makes, or of posix_memalign, which XNNPACK packs weights with.
#include <pthread.h>

#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <new>

extern "C" void* __libc_memalign(size_t alignment, size_t bytes);

namespace {

std::atomic<long> to_go{0}, passed{0}, smallest{0};

bool is_loader() {
  static __attribute__((tls_model("initial-exec"))) thread_local bool known = false;
  char name[16] = "";
  if (!known && pthread_getname_np(pthread_self(), name, sizeof(name)) == 0) {
    known = std::strcmp(name, "edgerun-loader") == 0;
  }
  return known;
}

void pass(size_t bytes) {
  if (static_cast<long>(bytes) < smallest || !is_loader()) return;
  ++passed;
  if (to_go > 0 && --to_go == 0) pthread_exit(nullptr);
}

}  // namespace

// n: 1 is the next call; 0: none. smallest_bytes: only allocations of at least so many count.
extern "C" void end_loader_at(long n, long smallest_bytes) {
  passed = 0;
  smallest = smallest_bytes;
  to_go = n;
}
extern "C" long loader_calls() { return passed; }  // since then
extern "C" int loader_is_to_end() { return to_go > 0; }

void* operator new(size_t bytes) {
  pass(bytes);
  if (void* const memory = std::malloc(bytes > 0 ? bytes : 1)) return memory;
  throw std::bad_alloc();
}

// By another name, since the header says that it does not throw.
extern "C" int aligned(void** memory, size_t alignment, size_t bytes) __asm__("posix_memalign");
extern "C" int aligned(void** memory, size_t alignment, size_t bytes) {
  pass(bytes);
  *memory = __libc_memalign(alignment, bytes);
  return *memory == nullptr ? 12 : 0;  // ENOMEM
}
