// bundle_reader: what a session may believe about a text bundle's folder. Schema, paths, sizes and hashes are checked
// here, before any byte of a program reaches ExecuTorch.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "csrc/base/status.h"

namespace edgerun {

struct BundleInfo {
  std::string path;                    // the bundle folder
  std::string build;                   // the recipe's hash: the identity of this build
  std::string program_path;            // the text program's file, inside the folder
  std::vector<std::string> operators;  // that the program needs, as "namespace::name"
  int64_t max_context = 0;             // tokens
  int64_t prefill_slice = 0;           // most tokens per call
  int64_t vocab_size = 0;
  std::vector<int64_t> eos_ids;
  int64_t tile = 1;        // queries that share one selection: slices are cut at its multiples
  int64_t dense_tail = 0;  // the last tokens of a prompt get a call of their own; 0: they do not
};

// Reads manifest.json of a text bundle. With `verify`, the program's sha256 is compared too; sizes always are.
// kNotFound: no such folder, manifest or file. kCorrupt: schema, path, size or hash is not as it must be.
Status read_bundle(const std::string& path, bool verify, BundleInfo* info);

}  // namespace edgerun
