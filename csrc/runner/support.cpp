#include "csrc/runner/support.h"

#include <sys/utsname.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <utility>

#include "csrc/base/cpu_features.h"
#include "csrc/bindings/c_api.h"

namespace edgerun::runner {

bool fail(const std::string& message) {
  std::fprintf(stderr, "edgerun-runner: %s\n", message.c_str());
  return false;
}

bool parse_ids(const std::string& option, std::string_view text, std::string_view separators,
               std::vector<int64_t>* ids) {
  for (size_t at = 0; (at = text.find_first_not_of(separators, at)) != std::string_view::npos;) {
    const size_t end = std::min(text.find_first_of(separators, at), text.size());
    if (!parse_number(option, text.substr(at, end - at), &ids->emplace_back())) return false;
    at = end;
  }
  return true;
}

bool read_ids(const std::string& option, const char* path, std::vector<int64_t>* ids) {
  std::ifstream file(path, std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (!file.is_open() || file.bad()) {
    return fail(option + ": " + path + " cannot be read: " + std::strerror(errno) + "; give a file of token ids");
  }
  return parse_ids(option, text, " \t\r\n", ids);
}

bool write_file(const std::string& path, const void* data, size_t bytes) {
  const std::string partial = path + ".partial";
  std::FILE* const file = std::fopen(partial.c_str(), "wb");
  bool good = file != nullptr && std::fwrite(data, 1, bytes, file) == bytes;
  if (file != nullptr) good = std::fclose(file) == 0 && good;
  good = good && std::rename(partial.c_str(), path.c_str()) == 0;
  if (good) return true;
  const std::string reason = std::strerror(errno);
  if (file != nullptr) std::remove(partial.c_str());
  return fail(path + " cannot be written: " + reason + "; choose another place");
}

bool failed_call() { return fail(edgerun_last_error()); }

void write_device(int64_t threads, json::Writer* json) {
  utsname names = {};
  uname(&names);
  std::string cpu, line;
  for (std::ifstream file("/proc/cpuinfo"); cpu.empty() && std::getline(file, line);) {
    if (line.rfind("model name", 0) == 0) cpu = line.substr(std::min(line.find(": ") + 2, line.size()));
  }
  json->key("device").begin_object();
  json->key("system").value(names.sysname).key("machine").value(names.machine).key("cpu");
  cpu.empty() ? json->null() : json->value(cpu);
  const CpuFeatures& features = cpu_features();
  const std::pair<const char*, bool> named[] = {{"avx2", features.avx2},
                                                {"avx512", features.avx512},
                                                {"fp16", features.fp16},
                                                {"dotprod", features.dotprod},
                                                {"i8mm", features.i8mm}};
  json->key("features").begin_array();
  for (const auto& [name, present] : named) {
    if (present) json->value(name);
  }
  json->end_array().key("threads").value(threads).end_object();
}

bool write_report(const std::string& path, const std::string& json) {
  const std::string text = json + "\n";
  if (!path.empty()) return write_file(path, text.data(), text.size());
  const bool printed = std::fwrite(text.data(), 1, text.size(), stdout) == text.size() && std::fflush(stdout) == 0;
  return printed || fail("the report cannot be written to the standard output");
}

bool read_file(const std::string& option, const std::string& path, std::string* content) {
  std::ifstream file(path, std::ios::binary);
  content->assign(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  if (file.is_open() && !file.bad()) return true;
  return fail(option + ": " + path + " cannot be read: " + std::strerror(errno));
}

bool parse_bytes(const std::string& option, std::string_view text, int64_t* bytes) {
  static constexpr std::pair<std::string_view, int64_t> kUnits[] = {{"KiB", int64_t{1} << 10},
                                                                    {"MiB", int64_t{1} << 20},
                                                                    {"GiB", int64_t{1} << 30},
                                                                    {"KB", 1000},
                                                                    {"MB", 1000000},
                                                                    {"GB", 1000000000},
                                                                    {"B", 1},
                                                                    {"", 1}};
  const std::string_view number = text.substr(0, text.find_first_not_of("0123456789."));
  for (const auto& [unit, factor] : kUnits) {
    double count = 0.0;
    if (text.substr(number.size()) != unit || number.empty()) continue;
    if (!parse_number(option, number, &count)) return false;
    if (count <= 0.0 || count * static_cast<double>(factor) > 9e18) break;
    *bytes = static_cast<int64_t>(count * static_cast<double>(factor));
    return true;
  }
  return fail(option + " is '" + std::string(text) + "'; it must be a size above 0, as 900MB or 1GiB");
}

}  // namespace edgerun::runner
