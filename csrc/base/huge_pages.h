// Asks the system for huge pages under memory that is about to be filled: fewer faults while it is, and addresses that
// are found faster when it is read. Only advice: where there are none, nothing changes.
#pragma once

#include <cstdint>

namespace edgerun {

// For the whole huge pages of [data, data + bytes). What of them is never written takes RAM too.
void advise_huge_pages(const void* data, int64_t bytes);

}  // namespace edgerun
