// JSON: a small strict reader and a writer, because a board has no library for it and a manifest needs little.
// The reader takes RFC 8259 and nothing more: UTF-8 text, no comments, no trailing commas, no duplicate keys.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "csrc/base/status.h"

namespace edgerun::json {

enum class Kind { kNull, kBool, kNumber, kString, kArray, kObject };

// One JSON value. The `as` functions return false, and leave *out alone, when the value is of another kind.
class Value {
 public:
  Kind kind() const { return kind_; }
  bool is_null() const { return kind_ == Kind::kNull; }
  bool as(bool* out) const;
  bool as(double* out) const;
  bool as(int64_t* out) const;  // a number that is written as an integer and fits
  bool as(std::string* out) const;
  const std::vector<Value>& items() const { return items_; }                              // of an array, else empty
  const std::vector<std::pair<std::string, Value>>& members() const { return members_; }  // of an object, else empty
  // The member of that name, or of that path ("context.max_context"); a null value where there is none.
  const Value& get(std::string_view path) const;

 private:
  friend class Parser;
  Kind kind_ = Kind::kNull;
  bool boolean_ = false;
  bool integral_ = false;
  int64_t integer_ = 0;
  double number_ = 0.0;
  std::string string_;
  std::vector<Value> items_;
  std::vector<std::pair<std::string, Value>> members_;
};

// Fills *value from the whole of `text`. kCorrupt with line and column when it is not JSON.
Status parse(std::string_view text, Value* value);

// Writes one document. Commas come by themselves; the caller keeps begin and end in pairs.
class Writer {
 public:
  Writer& begin_object();
  Writer& end_object();
  Writer& begin_array();
  Writer& end_array();
  Writer& key(std::string_view name);
  Writer& value(std::string_view text);
  Writer& value(const char* text) { return value(std::string_view(text)); }
  Writer& value(int64_t number);
  Writer& value(int number) { return value(static_cast<int64_t>(number)); }
  Writer& value(double number);  // not finite: null
  Writer& value(bool boolean);
  Writer& null();
  Writer& raw(std::string_view document);  // one that another Writer made
  const std::string& text() const { return text_; }

 private:
  void separate();
  std::string text_;
  bool needs_comma_ = false;
};

}  // namespace edgerun::json
