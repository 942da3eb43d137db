// mapped_data_loader: how ExecuTorch reads a program that has to share its memory. Large parts of the file are mapped;
// XNNPACK copies weights when it packs them, and lets their mapping go. Of what stays mapped, `drop_pages` takes the
// pages out of the process: what is touched later is read again. Small parts, the program's description among them,
// are copied: a file that is overwritten while its program is loaded must not change what runs.
#pragma once

#include <executorch/runtime/core/data_loader.h>

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "csrc/base/status.h"

namespace edgerun {

class MappedDataLoader final : public executorch::runtime::DataLoader {
 public:
  // kNotFound, kCorrupt (another size than `bytes`, unless that is negative).
  static Status open(const std::string& path, int64_t bytes, std::unique_ptr<MappedDataLoader>* loader);
  ~MappedDataLoader() override;

  executorch::runtime::Result<executorch::runtime::FreeableBuffer> load(size_t offset, size_t size,
                                                                        const SegmentInfo& segment) const override;
  executorch::runtime::Error load_into(size_t offset, size_t size, const SegmentInfo& segment,
                                       void* buffer) const override;
  executorch::runtime::Result<size_t> size() const override { return bytes_; }

  void read_ahead() const;  // asks the system to have the file in its cache
  void drop_pages() const;
  int64_t mapped_bytes() const;  // of the mappings that live
  bool cut_short() const;        // whether the file has lost bytes since: reading a mapping of them would be a SIGBUS

 private:
  MappedDataLoader(int descriptor, size_t bytes) : descriptor_(descriptor), bytes_(bytes) {}
  static void release(void* loader, void* data, size_t size);
  bool inside(size_t offset, size_t size) const { return offset <= bytes_ && size <= bytes_ - offset; }

  const int descriptor_;
  const size_t bytes_;
  mutable std::mutex mutex_;
  mutable std::multimap<const void*, std::pair<void*, size_t>> mappings_;  // by what ExecuTorch was given
};

}  // namespace edgerun
