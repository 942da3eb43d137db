// block_file: whether a block's file is still the one that was checked. A bundle's programs are hashed when it is
// opened, and a chain then reads them again and again, for minutes or hours: other weights of the same size would give
// another clip and no error. A hash at every load would cost more than the load; what the system says of the file costs
// microseconds.
//
// Noticed: a file that was replaced (its inode), cut or grown (its size), written (the time of that), and written with
// that time put back (the time of change, which nobody can set; chmod, a rename and a hard link move it too).
// Not noticed: bytes that change and leave the times alone, as where a disk rots, and a write in the same tick of the
// file system's clock as the last one before the check: milliseconds, on FAT two seconds.
#pragma once

#include <cstdint>
#include <string>

#include "csrc/base/status.h"

namespace edgerun {

struct FileStamp {
  uint64_t inode = 0;
  int64_t bytes = -1;                       // -1: not taken yet
  int64_t modified_ns = 0, changed_ns = 0;  // since 1970
  bool taken() const { return bytes >= 0; }
  bool operator==(const FileStamp&) const = default;
};

// kNotFound: there is no such file, or it cannot be looked at.
Status read_stamp(const std::string& path, FileStamp* stamp);

}  // namespace edgerun
