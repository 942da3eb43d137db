#include "csrc/base/huge_pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace edgerun {

void advise_huge_pages([[maybe_unused]] const void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // A huge page is what one table of 8-byte entries maps, on x86-64 and on arm64: 2 MiB with pages of 4 KiB.
  const auto page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  const uint64_t huge = page / 8 * page;
  const uint64_t address = reinterpret_cast<uint64_t>(data);
  const uint64_t first = (address + huge - 1) / huge * huge;
  const uint64_t end = (address + static_cast<uint64_t>(bytes)) / huge * huge;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

}  // namespace edgerun
