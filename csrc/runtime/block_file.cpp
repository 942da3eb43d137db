#include "csrc/runtime/block_file.h"

#include <sys/stat.h>

#include <cerrno>
#include <cstring>
#include <ctime>

namespace edgerun {

namespace {

int64_t nanoseconds(const timespec& time) { return int64_t{time.tv_sec} * 1'000'000'000 + time.tv_nsec; }

}  // namespace

Status read_stamp(const std::string& path, FileStamp* stamp) {
  struct stat facts = {};
  if (stat(path.c_str(), &facts) != 0) {
    return Status(StatusCode::kNotFound,
                  "'" + path + "' cannot be read (" + std::strerror(errno) + "): copy the whole bundle again");
  }
#if defined(__APPLE__)
  const timespec &modified = facts.st_mtimespec, &changed = facts.st_ctimespec;
#else
  const timespec &modified = facts.st_mtim, &changed = facts.st_ctim;
#endif
  *stamp = {static_cast<uint64_t>(facts.st_ino), static_cast<int64_t>(facts.st_size), nanoseconds(modified),
            nanoseconds(changed)};
  return Status();
}

}  // namespace edgerun
