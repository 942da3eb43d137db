// bundle_files: what the readers of all kinds of bundles do first: the manifest, its schema, and its files' paths, sizes
// and hashes, before any byte of a program reaches ExecuTorch.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <string>

#include "csrc/base/json.h"
#include "csrc/base/status.h"

namespace edgerun {

inline constexpr int64_t kBundleSchemaVersion = 4;  // edgerun/bundle.py has the same

Status corrupt(const std::string& message);  // kCorrupt

// kNotFound: no such folder or manifest. kCorrupt: it is not JSON.
Status read_manifest(const std::string& path, json::Value* manifest);
Status check_schema(const json::Value& manifest, const std::string& kind);

template <typename T>
Status require(const json::Value& manifest, const char* path, T* out) {
  if (manifest.get(path).as(out)) return Status();
  return corrupt(std::string("manifest.json has no usable '") + path + "': export the bundle again");
}

Status require_at_least(int64_t least, const json::Value& manifest, const char* path, int64_t* out);

struct BundleFile {
  std::string path;
  int64_t bytes = 0;
};

// Every file's path and size; with `verify` also the sha256 of those in `programs`, which must be listed.
Status check_files(const json::Value& manifest, const std::string& folder, const std::set<std::string>& programs,
                   bool verify, std::map<std::string, BundleFile>* found);

}  // namespace edgerun
