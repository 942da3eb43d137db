// What the runner does for bundles of every kind: reads options and files, writes files whole, and says what is wrong in
// one line. Functions that return bool have said it when they return false.
#pragma once

#include <charconv>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "csrc/base/json.h"

namespace edgerun::runner {

bool fail(const std::string& message);  // false
bool failed_call();                     // of the C boundary; false

template <typename Number>
bool parse_number(const std::string& option, std::string_view text, Number* number) {
  const auto parsed = std::from_chars(text.data(), text.data() + text.size(), *number);
  if (parsed.ec == std::errc() && parsed.ptr == text.data() + text.size()) return true;
  return fail(option + " is '" + std::string(text) + "'; it must be a number: see --help");
}

bool parse_ids(const std::string& option, std::string_view text, std::string_view separators,
               std::vector<int64_t>* ids);
bool parse_bytes(const std::string& option, std::string_view text, int64_t* bytes);  // 900MB, 1GiB, 1000000000
bool read_ids(const std::string& option, const char* path, std::vector<int64_t>* ids);
bool read_file(const std::string& option, const std::string& path, std::string* content);

// Writes beside the target and moves it there, so that nobody finds half of it.
bool write_file(const std::string& path, const void* data, size_t bytes);
bool write_report(const std::string& path, const std::string& json);  // no path: the standard output
void write_device(int64_t threads, json::Writer* json);               // the member "device"

}  // namespace edgerun::runner
