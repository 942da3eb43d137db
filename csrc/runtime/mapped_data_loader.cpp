#include "csrc/runtime/mapped_data_loader.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>

namespace edgerun {

using executorch::runtime::Error;
using executorch::runtime::FreeableBuffer;
using executorch::runtime::Result;

namespace {

constexpr size_t kCopiedBytes = size_t{1} << 20;

}  // namespace

Status MappedDataLoader::open(const std::string& path, int64_t bytes, std::unique_ptr<MappedDataLoader>* loader) {
  struct Closing {  // also where the thread ends, or memory does, before the loader is made
    int descriptor;
    ~Closing() {
      if (descriptor >= 0) close(descriptor);
    }
  } opened = {::open(path.c_str(), O_RDONLY | O_CLOEXEC)};
  struct stat facts = {};
  if (opened.descriptor < 0 || fstat(opened.descriptor, &facts) != 0) {
    const std::string reason = std::strerror(errno);
    return Status(StatusCode::kNotFound, "'" + path + "' cannot be read (" + reason + "): copy the whole bundle again");
  }
  if (bytes >= 0 && facts.st_size != bytes) {
    return Status(StatusCode::kCorrupt, "'" + path + "' has " + std::to_string(facts.st_size) + " bytes, not the " +
                                            std::to_string(bytes) + " that it must have: copy the bundle again");
  }
  loader->reset(new MappedDataLoader(opened.descriptor, static_cast<size_t>(facts.st_size)));
  opened.descriptor = -1;
  return Status();
}

MappedDataLoader::~MappedDataLoader() {
  for (const auto& [data, mapping] : mappings_) munmap(mapping.first, mapping.second);
  close(descriptor_);
}

Result<FreeableBuffer> MappedDataLoader::load(size_t offset, size_t size, const SegmentInfo& segment) const {
  if (!inside(offset, size)) return Error::InvalidProgram;
  if (size == 0) return FreeableBuffer(nullptr, 0, nullptr);
  if (size <= kCopiedBytes) {
    void* const copy = std::malloc(size);
    if (copy == nullptr) return Error::MemoryAllocationFailed;
    if (const Error error = load_into(offset, size, segment, copy); error != Error::Ok) {
      std::free(copy);
      return error;
    }
    return FreeableBuffer(copy, size, [](void*, void* data, size_t) { std::free(data); });
  }
  const size_t before = offset % static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* const start =
      mmap(nullptr, before + size, PROT_READ, MAP_PRIVATE, descriptor_, static_cast<off_t>(offset - before));
  if (start == MAP_FAILED) return Error::MemoryAllocationFailed;
  // Weights are read once, in order: the pages that follow come in larger steps.
  madvise(start, before + size, MADV_SEQUENTIAL);
  const void* const data = static_cast<const uint8_t*>(start) + before;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    mappings_.emplace(data, std::pair(start, before + size));
  }
  return FreeableBuffer(data, size, release, const_cast<MappedDataLoader*>(this));
}

void MappedDataLoader::release(void* self, void* data, size_t) {
  const auto* const loader = static_cast<const MappedDataLoader*>(self);
  const std::lock_guard<std::mutex> lock(loader->mutex_);
  const auto found = loader->mappings_.find(data);
  if (found == loader->mappings_.end()) return;
  munmap(found->second.first, found->second.second);
  loader->mappings_.erase(found);
}

Error MappedDataLoader::load_into(size_t offset, size_t size, const SegmentInfo&, void* buffer) const {
  if (!inside(offset, size)) return Error::InvalidProgram;
  for (size_t done = 0; done < size;) {
    const ssize_t got =
        pread(descriptor_, static_cast<uint8_t*>(buffer) + done, size - done, static_cast<off_t>(offset + done));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return Error::AccessFailed;
    done += static_cast<size_t>(got);
  }
  return Error::Ok;
}

void MappedDataLoader::read_ahead() const {
#if defined(POSIX_FADV_WILLNEED)
  posix_fadvise(descriptor_, 0, 0, POSIX_FADV_WILLNEED);
#endif
}

void MappedDataLoader::drop_pages() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& [data, mapping] : mappings_) madvise(mapping.first, mapping.second, MADV_DONTNEED);
}

int64_t MappedDataLoader::mapped_bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  int64_t bytes = 0;
  for (const auto& [data, mapping] : mappings_) bytes += static_cast<int64_t>(mapping.second);
  return bytes;
}

bool MappedDataLoader::cut_short() const {
  struct stat facts = {};
  return fstat(descriptor_, &facts) != 0 || facts.st_size < static_cast<off_t>(bytes_);
}

}  // namespace edgerun
