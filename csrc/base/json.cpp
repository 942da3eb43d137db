#include "csrc/base/json.h"

#include <charconv>
#include <cmath>
#include <cstdio>
#include <set>

namespace edgerun::json {

namespace {

constexpr int kMaxDepth = 64;  // a manifest has 6 levels; a bound keeps hostile text from the end of the stack

void append_utf8(uint32_t code_point, std::string* out) {
  if (code_point < 0x80) {
    out->push_back(static_cast<char>(code_point));
  } else if (code_point < 0x800) {
    out->push_back(static_cast<char>(0xC0 | (code_point >> 6)));
    out->push_back(static_cast<char>(0x80 | (code_point & 0x3F)));
  } else if (code_point < 0x10000) {
    out->push_back(static_cast<char>(0xE0 | (code_point >> 12)));
    out->push_back(static_cast<char>(0x80 | ((code_point >> 6) & 0x3F)));
    out->push_back(static_cast<char>(0x80 | (code_point & 0x3F)));
  } else {
    out->push_back(static_cast<char>(0xF0 | (code_point >> 18)));
    out->push_back(static_cast<char>(0x80 | ((code_point >> 12) & 0x3F)));
    out->push_back(static_cast<char>(0x80 | ((code_point >> 6) & 0x3F)));
    out->push_back(static_cast<char>(0x80 | (code_point & 0x3F)));
  }
}

bool is_digit(char c) { return c >= '0' && c <= '9'; }

// Bytes of the UTF-8 character at the start of `text`; 0 when there is none (RFC 3629: no overlong form, no surrogate).
size_t utf8_length(std::string_view text) {
  const auto byte = [&](size_t i) { return i < text.size() ? static_cast<unsigned char>(text[i]) : 0u; };
  const auto continues = [&](size_t i) { return (byte(i) & 0xC0) == 0x80; };
  const unsigned first = byte(0), second = byte(1);
  if (first < 0x80) return 1;
  if (first < 0xC2 || first > 0xF4 || !continues(1)) return 0;
  if (first < 0xE0) return 2;
  if (!continues(2)) return 0;
  if (first < 0xF0) return (first == 0xE0 && second < 0xA0) || (first == 0xED && second >= 0xA0) ? 0 : 3;
  return !continues(3) || (first == 0xF0 && second < 0x90) || (first == 0xF4 && second >= 0x90) ? 0 : 4;
}

}  // namespace

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  Status parse(Value* value) {
    bool good = parse_value(value, 0);
    if (good) {
      skip_space();
      if (at_ != text_.size()) good = fail("text after the end of the value");
    }
    if (good) return Status();
    size_t line = 1, column = 1;
    for (size_t i = 0; i < at_ && i < text_.size(); ++i) {
      ++column;
      if (text_[i] == '\n') ++line, column = 1;
    }
    return Status(StatusCode::kCorrupt,
                  "not JSON at line " + std::to_string(line) + ", column " + std::to_string(column) + ": " + error_);
  }

 private:
  bool fail(const char* what) {
    error_ = what;
    return false;
  }

  void skip_space() {
    while (at_ < text_.size() &&
           (text_[at_] == ' ' || text_[at_] == '\t' || text_[at_] == '\n' || text_[at_] == '\r')) {
      ++at_;
    }
  }

  bool take(char c) {
    if (at_ >= text_.size() || text_[at_] != c) return false;
    ++at_;
    return true;
  }

  bool take_word(std::string_view word) {
    if (text_.substr(at_, word.size()) != word) return fail("a value was expected");
    at_ += word.size();
    return true;
  }

  bool parse_value(Value* value, int depth) {
    if (depth > kMaxDepth) return fail("nested too deeply (limit 64)");
    skip_space();
    if (at_ >= text_.size()) return fail("the text ends where a value was expected");
    switch (text_[at_]) {
      case '{':
        return parse_object(value, depth);
      case '[':
        return parse_array(value, depth);
      case '"':
        value->kind_ = Kind::kString;
        return parse_string(&value->string_);
      case 't':
      case 'f':
        value->kind_ = Kind::kBool;
        value->boolean_ = text_[at_] == 't';
        return take_word(value->boolean_ ? "true" : "false");
      case 'n':
        return take_word("null");
      default:
        return parse_number(value);
    }
  }

  bool parse_object(Value* value, int depth) {
    value->kind_ = Kind::kObject;
    ++at_;
    skip_space();
    if (take('}')) return true;
    std::set<std::string> names;
    do {
      skip_space();
      std::pair<std::string, Value> member;
      if (at_ >= text_.size() || text_[at_] != '"') return fail("a member name in quotes was expected");
      if (!parse_string(&member.first)) return false;
      if (!names.insert(member.first).second) return fail("the same member name twice");
      skip_space();
      if (!take(':')) return fail("':' was expected");
      if (!parse_value(&member.second, depth + 1)) return false;
      value->members_.push_back(std::move(member));
      skip_space();
    } while (take(','));
    return take('}') || fail("',' or '}' was expected");
  }

  bool parse_array(Value* value, int depth) {
    value->kind_ = Kind::kArray;
    ++at_;
    skip_space();
    if (take(']')) return true;
    do {
      value->items_.emplace_back();
      if (!parse_value(&value->items_.back(), depth + 1)) return false;
      skip_space();
    } while (take(','));
    return take(']') || fail("',' or ']' was expected");
  }

  bool parse_hex4(uint32_t* unit) {
    *unit = 0;
    for (int i = 0; i < 4; ++i, ++at_) {
      if (at_ >= text_.size()) return fail("four hexadecimal digits were expected");
      const char c = text_[at_];
      const int digit = is_digit(c)            ? c - '0'
                        : c >= 'a' && c <= 'f' ? c - 'a' + 10
                        : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                               : -1;
      if (digit < 0) return fail("four hexadecimal digits were expected");
      *unit = *unit * 16 + static_cast<uint32_t>(digit);
    }
    return true;
  }

  bool parse_escape(std::string* out) {
    if (at_ >= text_.size()) return fail("the text ends inside a string");
    const char c = text_[at_++];
    constexpr std::string_view kNames = "\"\\/bfnrt";
    constexpr std::string_view kMeanings = "\"\\/\b\f\n\r\t";
    if (const size_t index = kNames.find(c); index != std::string_view::npos) {
      out->push_back(kMeanings[index]);
      return true;
    }
    if (c != 'u') return fail("unknown escape");
    uint32_t unit = 0;
    if (!parse_hex4(&unit)) return false;
    if (unit >= 0xDC00 && unit < 0xE000) return fail("half of a surrogate pair");
    if (unit >= 0xD800 && unit < 0xDC00) {
      uint32_t low = 0;
      if (!take('\\') || !take('u') || !parse_hex4(&low) || low < 0xDC00 || low >= 0xE000) {
        return fail("half of a surrogate pair");
      }
      unit = 0x10000 + ((unit - 0xD800) << 10) + (low - 0xDC00);
    }
    append_utf8(unit, out);
    return true;
  }

  bool parse_string(std::string* out) {
    ++at_;
    out->clear();
    while (at_ < text_.size()) {
      const char c = text_[at_];
      if (static_cast<unsigned char>(c) < 0x20) return fail("a control character in a string");
      const size_t length = utf8_length(text_.substr(at_));
      if (length == 0) return fail("a string that is not UTF-8");
      at_ += length;
      if (c == '"') return true;
      if (c != '\\') {
        out->append(text_, at_ - length, length);
      } else if (!parse_escape(out)) {
        return false;
      }
    }
    return fail("the text ends inside a string");
  }

  bool take_digits() {
    const size_t begin = at_;
    while (at_ < text_.size() && is_digit(text_[at_])) ++at_;
    return at_ > begin;
  }

  bool parse_number(Value* value) {
    const size_t begin = at_;
    take('-');
    const size_t first_digit = at_;
    if (!take_digits()) return fail("a value was expected");
    if (text_[first_digit] == '0' && at_ - first_digit > 1) return fail("a number with a leading zero");
    bool integral = true;
    if (take('.')) {
      integral = false;
      if (!take_digits()) return fail("a digit after the decimal point was expected");
    }
    if (take('e') || take('E')) {
      integral = false;
      if (!take('+')) take('-');
      if (!take_digits()) return fail("a digit in the exponent was expected");
    }
    value->kind_ = Kind::kNumber;
    const char* const first = text_.data() + begin;
    const char* const last = text_.data() + at_;
    const auto parsed = std::from_chars(first, last, value->number_);
    if (parsed.ec != std::errc()) return fail("a number out of range");
    value->integral_ = integral && std::from_chars(first, last, value->integer_).ec == std::errc();
    return true;
  }

  std::string_view text_;
  size_t at_ = 0;
  const char* error_ = "";
};

Status parse(std::string_view text, Value* value) {
  *value = Value();
  return Parser(text).parse(value);
}

bool Value::as(bool* out) const {
  if (kind_ != Kind::kBool) return false;
  *out = boolean_;
  return true;
}

bool Value::as(double* out) const {
  if (kind_ != Kind::kNumber) return false;
  *out = number_;
  return true;
}

bool Value::as(int64_t* out) const {
  if (kind_ != Kind::kNumber || !integral_) return false;
  *out = integer_;
  return true;
}

bool Value::as(std::string* out) const {
  if (kind_ != Kind::kString) return false;
  *out = string_;
  return true;
}

const Value& Value::get(std::string_view path) const {
  static const Value kNone;
  for (const auto& [name, member] : members_) {
    if (name == path) return member;
  }
  const size_t dot = path.find('.');
  return dot == std::string_view::npos ? kNone : get(path.substr(0, dot)).get(path.substr(dot + 1));
}

void Writer::separate() {
  if (needs_comma_) text_.push_back(',');
  needs_comma_ = true;
}

Writer& Writer::begin_object() {
  separate();
  text_.push_back('{');
  needs_comma_ = false;
  return *this;
}

Writer& Writer::end_object() {
  text_.push_back('}');
  needs_comma_ = true;
  return *this;
}

Writer& Writer::begin_array() {
  separate();
  text_.push_back('[');
  needs_comma_ = false;
  return *this;
}

Writer& Writer::end_array() {
  text_.push_back(']');
  needs_comma_ = true;
  return *this;
}

Writer& Writer::key(std::string_view name) {
  value(name);
  text_.push_back(':');
  needs_comma_ = false;
  return *this;
}

Writer& Writer::value(std::string_view text) {
  separate();
  text_.push_back('"');
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      text_.push_back('\\');
      text_.push_back(c);
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char escape[8];
      std::snprintf(escape, sizeof(escape), "\\u%04x", static_cast<unsigned>(c));
      text_ += escape;
    } else {
      text_.push_back(c);
    }
  }
  text_.push_back('"');
  return *this;
}

Writer& Writer::value(int64_t number) {
  separate();
  text_ += std::to_string(number);
  return *this;
}

Writer& Writer::value(double number) {
  if (!std::isfinite(number)) return null();
  separate();
  char digits[32];
  const auto written = std::to_chars(digits, digits + sizeof(digits), number);
  text_.append(digits, written.ptr);
  return *this;
}

Writer& Writer::value(bool boolean) {
  separate();
  text_ += boolean ? "true" : "false";
  return *this;
}

Writer& Writer::raw(std::string_view document) {
  separate();
  text_ += document;
  return *this;
}

Writer& Writer::null() {
  separate();
  text_ += "null";
  return *this;
}

}  // namespace edgerun::json
