// The JSON reader and writer for tests/runtime/test_runtime.py, whose truth is Python's json:
//   json_test FILE         writes what was read back as JSON; status 1 and the message when it is not JSON
//   json_test FILE PATH    the same for the value at PATH, or the word none
#include "csrc/base/json.h"

#include <cstdio>
#include <fstream>
#include <iterator>

namespace {

using edgerun::json::Kind;
using edgerun::json::Value;
using edgerun::json::Writer;

void write(const Value& value, Writer* writer) {
  bool boolean = false;
  int64_t integer = 0;
  double number = 0.0;
  std::string text;
  if (value.as(&boolean)) {
    writer->value(boolean);
  } else if (value.as(&integer)) {
    writer->value(integer);
  } else if (value.as(&number)) {
    writer->value(number);
  } else if (value.as(&text)) {
    writer->value(text);
  } else if (value.kind() == Kind::kArray) {
    writer->begin_array();
    for (const Value& item : value.items()) write(item, writer);
    writer->end_array();
  } else if (value.kind() == Kind::kObject) {
    writer->begin_object();
    for (const auto& [name, member] : value.members()) {
      writer->key(name);
      write(member, writer);
    }
    writer->end_object();
  } else {
    writer->null();
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::ifstream file(argv[1], std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  Value value;
  if (const edgerun::Status status = edgerun::json::parse(text, &value); !status.ok()) {
    std::puts(status.message().c_str());
    return 1;
  }
  Writer writer;
  write(argc > 2 ? value.get(argv[2]) : value, &writer);
  std::puts(writer.text().c_str());
  return 0;
}
