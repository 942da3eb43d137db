#include "csrc/runtime/bundle_reader.h"

#include <map>

#include "csrc/runtime/bundle_files.h"

namespace edgerun {

namespace {

Status read_program(const json::Value& manifest, BundleInfo* info, std::string* file) {
  for (const json::Value& program : manifest.get("programs").items()) {
    std::string name;
    if (Status status = require(program, "name", &name); !status.ok()) return status;
    if (name != "text") continue;
    for (const json::Value& item : program.get("operators").items()) {
      std::string op;
      if (!item.as(&op)) return corrupt("manifest.json lists an operator that is not a string: export again");
      info->operators.push_back(op);
    }
    return require(program, "file", file);
  }
  return corrupt("manifest.json has no program named 'text': export the bundle again");
}

}  // namespace

Status read_bundle(const std::string& path, bool verify, BundleInfo* info) {
  *info = BundleInfo();
  info->path = path;
  json::Value manifest;
  if (Status status = read_manifest(path, &manifest); !status.ok()) return status;
  if (Status status = check_schema(manifest, "text"); !status.ok()) return status;
  if (Status status = require(manifest, "build", &info->build); !status.ok()) return status;
  const std::pair<const char*, int64_t*> limits[] = {{"context.max_context", &info->max_context},
                                                     {"context.prefill_slice", &info->prefill_slice},
                                                     {"tokens.vocab_size", &info->vocab_size},
                                                     {"recipe.dhsa.tile", &info->tile}};
  for (const auto& [name, target] : limits) {
    if (Status status = require_at_least(1, manifest, name, target); !status.ok()) return status;
  }
  std::string attention;
  if (Status status = require(manifest, "recipe.attention", &attention); !status.ok()) return status;
  if (attention == "dhsa") {
    Status status = require_at_least(0, manifest, "recipe.dhsa.dense_tail", &info->dense_tail);
    if (!status.ok()) return status;
  }
  for (const json::Value& item : manifest.get("tokens.eos_ids").items()) {
    int64_t id = 0;
    if (!item.as(&id)) return corrupt("manifest.json lists an end token that is not an integer: export again");
    info->eos_ids.push_back(id);
  }
  std::string program;
  if (Status status = read_program(manifest, info, &program); !status.ok()) return status;
  std::map<std::string, BundleFile> files;
  if (Status status = check_files(manifest, path, {program}, verify, &files); !status.ok()) return status;
  info->program_path = files[program].path;
  return Status();
}

}  // namespace edgerun
