#include "csrc/runtime/bundle_files.h"

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <vector>

#include "csrc/base/sha256.h"

namespace edgerun {

namespace {

namespace fs = std::filesystem;

constexpr int64_t kMaxManifestBytes = int64_t{1} << 20;  // it has a few KiB; parsed, it may take 100 times as much

struct CloseFile {
  void operator()(std::FILE* file) const { std::fclose(file); }
};
using File = std::unique_ptr<std::FILE, CloseFile>;

Status open_file(const fs::path& path, File* file) {
  file->reset(std::fopen(path.c_str(), "rb"));
  if (*file) return Status();
  return Status(StatusCode::kNotFound, path.string() + " cannot be read: " + std::strerror(errno));
}

Status read_text(const fs::path& path, std::string* text) {
  File file;
  if (Status status = open_file(path, &file); !status.ok()) return status;
  char buffer[1 << 16];
  for (size_t got; (got = std::fread(buffer, 1, sizeof(buffer), file.get())) > 0;) {
    text->append(buffer, got);
    if (static_cast<int64_t>(text->size()) > kMaxManifestBytes) {
      return corrupt(path.string() + " is larger than " + std::to_string(kMaxManifestBytes) +
                     " bytes: this is not a manifest");
    }
  }
  if (std::ferror(file.get())) return corrupt(path.string() + " cannot be read: " + std::strerror(errno));
  return Status();
}

Status hash_file(const fs::path& path, std::string* digest) {
  File file;
  if (Status status = open_file(path, &file); !status.ok()) return status;
  Sha256 hash;
  std::vector<char> buffer(size_t{1} << 20);
  for (size_t got; (got = std::fread(buffer.data(), 1, buffer.size(), file.get())) > 0;) {
    hash.update(buffer.data(), got);
  }
  if (std::ferror(file.get())) return corrupt(path.string() + " cannot be read: " + std::strerror(errno));
  *digest = hash.hex_digest();
  return Status();
}

// A path of the manifest leads to a file inside the folder: no absolute path, no "..", no link that leaves it.
Status resolve(const fs::path& folder, const std::string& name, fs::path* file) {
  const fs::path relative(name);
  bool leaves = name.empty() || relative.is_absolute() || name.find('\\') != std::string::npos;
  for (const fs::path& part : relative) leaves = leaves || part == "..";
  if (leaves) {
    return corrupt("manifest.json names '" + name + "', which leaves the bundle folder: only relative paths inside " +
                   folder.string() + " are read; export the bundle again");
  }
  *file = folder / relative;
  std::error_code error;
  const fs::path real_folder = fs::canonical(folder, error);
  if (error) return Status(StatusCode::kNotFound, folder.string() + " cannot be read: " + error.message());
  const fs::path real_file = fs::canonical(*file, error);
  if (error) {
    return Status(StatusCode::kNotFound,
                  "'" + name + "' of manifest.json is not in " + folder.string() + ": copy the whole bundle again");
  }
  const fs::path inside = real_file.lexically_relative(real_folder);
  if (inside.empty() || *inside.begin() == "..") {
    return corrupt("'" + name + "' of manifest.json is a link that leaves the bundle folder " + folder.string() +
                   ": replace it by the file itself");
  }
  return Status();
}

}  // namespace

Status corrupt(const std::string& message) { return Status(StatusCode::kCorrupt, message); }

Status require_at_least(int64_t least, const json::Value& manifest, const char* path, int64_t* out) {
  if (Status status = require(manifest, path, out); !status.ok()) return status;
  if (*out >= least) return Status();
  return corrupt(std::string("manifest.json says ") + path + " = " + std::to_string(*out) + "; it must be at least " +
                 std::to_string(least) + ": export the bundle again");
}

Status check_schema(const json::Value& manifest, const std::string& kind) {
  int64_t version = 0;
  if (Status status = require(manifest, "schema_version", &version); !status.ok()) return status;
  if (version != kBundleSchemaVersion) {
    return corrupt("the bundle has schema version " + std::to_string(version) + "; this edgerun reads version " +
                   std::to_string(kBundleSchemaVersion) +
                   (version > kBundleSchemaVersion ? ": update edgerun" : ": export the bundle again"));
  }
  std::string found;
  if (Status status = require(manifest, "kind", &found); !status.ok()) return status;
  if (found == kind) return Status();
  return corrupt("the bundle is of kind '" + found + "'; a " + kind + " session runs kind '" + kind + "' only");
}

Status read_manifest(const std::string& path, json::Value* manifest) {
  const fs::path folder(path);
  std::error_code error;
  if (!fs::is_directory(folder, error)) {
    return Status(StatusCode::kNotFound, "'" + path + "' is not a bundle folder: give the path of a NAME.edgerun");
  }
  if (!fs::is_regular_file(folder / "manifest.json", error)) {
    return Status(StatusCode::kNotFound, "'" + path + "' has no manifest.json: it is not a bundle, or a partial copy");
  }
  std::string text;
  if (Status status = read_text(folder / "manifest.json", &text); !status.ok()) return status;
  if (Status status = json::parse(text, manifest); !status.ok()) {
    return corrupt("manifest.json of '" + path + "' is damaged (" + status.message() + "): export the bundle again");
  }
  return Status();
}

Status check_files(const json::Value& manifest, const std::string& folder, const std::set<std::string>& programs,
                   bool verify, std::map<std::string, BundleFile>* found) {
  for (const auto& [name, entry] : manifest.get("files").members()) {
    fs::path file;
    if (Status status = resolve(folder, name, &file); !status.ok()) return status;
    int64_t bytes = 0;
    if (Status status = require(entry, "bytes", &bytes); !status.ok()) return status;
    std::error_code error;
    const auto on_disk = static_cast<int64_t>(fs::file_size(file, error));
    if (error || on_disk != bytes) {
      return corrupt("'" + name + "' has " + (error ? "an unknown number of" : std::to_string(on_disk)) +
                     " bytes, the manifest says " + std::to_string(bytes) + ": copy or export the bundle again");
    }
    if (programs.count(name) == 0) continue;
    (*found)[name] = {file.string(), bytes};
    if (!verify) continue;
    std::string expected, actual;
    if (Status status = require(entry, "sha256", &expected); !status.ok()) return status;
    if (Status status = hash_file(file, &actual); !status.ok()) return status;
    if (actual != expected) {
      return corrupt("'" + name + "' is damaged: sha256 " + actual.substr(0, 16) + "…, the manifest says " +
                     expected.substr(0, 16) + "…: copy or export the bundle again");
    }
  }
  for (const std::string& name : programs) {
    if (found->count(name) == 0) {
      return corrupt("manifest.json lists no size and hash for '" + name + "': export the bundle again");
    }
  }
  return Status();
}

}  // namespace edgerun
