#include "csrc/runtime/video_state.h"

#include <cstring>

namespace edgerun {

namespace {

constexpr char kMagic[] = "EDGERUNV";
constexpr int64_t kVersion = 3;

class Packer {
 public:
  template <typename T>
  void number(T value) {
    append(&value, sizeof(value));
  }
  template <typename List>
  void list(const List& values) {
    number(static_cast<int64_t>(values.size()));
    append(values.data(), values.size() * sizeof(values[0]));
  }
  void append(const void* data, size_t bytes) {
    const auto* const start = static_cast<const uint8_t*>(data);
    packed.insert(packed.end(), start, start + bytes);
  }
  std::vector<uint8_t> packed;
};

class Unpacker {
 public:
  explicit Unpacker(std::span<const uint8_t> bytes) : left_(bytes) {}
  template <typename T>
  void number(T* value) {
    take(value, sizeof(*value));
  }
  template <typename List>
  void list(List* values) {
    int64_t count = 0;
    number(&count);
    // Checked before the memory is asked for.
    if (count < 0 || static_cast<uint64_t>(count) > left_.size() / sizeof((*values)[0])) good = false;
    if (!good) return;
    values->resize(static_cast<size_t>(count));
    take(values->data(), values->size() * sizeof((*values)[0]));
  }
  void take(void* target, size_t bytes) {
    good = good && bytes <= left_.size();
    if (!good) return;
    if (bytes > 0) std::memcpy(target, left_.data(), bytes);
    left_ = left_.subspan(bytes);
  }
  bool done() const { return good && left_.empty(); }
  bool good = true;

 private:
  std::span<const uint8_t> left_;
};

}  // namespace

std::vector<uint8_t> pack_state(const VideoState& state) {
  Packer packer;
  packer.append(kMagic, 8);
  packer.number(kVersion);
  packer.list(state.build);
  packer.number(state.next_step);
  packer.number(state.evaluations);
  packer.list(state.x);
  packer.list(state.y_sizes);
  packer.list(state.y);
  packer.number(state.previous_time);
  packer.list(state.previous_velocity);
  packer.number(state.leap.stale);
  packer.number(state.leap.best);
  packer.list(state.leap.previous);
  return std::move(packer.packed);
}

Status unpack_state(std::span<const uint8_t> bytes, VideoState* state) {
  Unpacker unpacker(bytes);
  char magic[8] = {};
  int64_t version = 0;
  unpacker.take(magic, sizeof(magic));
  unpacker.number(&version);
  if (!unpacker.good || std::memcmp(magic, kMagic, sizeof(magic)) != 0 || version != kVersion) {
    return Status(StatusCode::kInvalidArgument, "the saved state is not one of this version: start the run again");
  }
  unpacker.list(&state->build);
  unpacker.number(&state->next_step);
  unpacker.number(&state->evaluations);
  unpacker.list(&state->x);
  unpacker.list(&state->y_sizes);
  unpacker.list(&state->y);
  unpacker.number(&state->previous_time);
  unpacker.list(&state->previous_velocity);
  unpacker.number(&state->leap.stale);
  unpacker.number(&state->leap.best);
  unpacker.list(&state->leap.previous);
  const auto& sizes = state->y_sizes;
  const bool shaped = sizes.size() == 3 && sizes[0] == 1 && sizes[1] > 0 && sizes[2] > 0 &&
                      sizes[1] <= static_cast<int64_t>(state->y.size()) &&
                      static_cast<size_t>(sizes[1] * sizes[2]) == state->y.size() && sizes[2] <= (int64_t{1} << 32);
  const auto latent_or_nothing = [&](const std::vector<float>& values) {
    return values.empty() || values.size() == state->x.size();
  };
  const bool before = latent_or_nothing(state->leap.previous) && latent_or_nothing(state->previous_velocity);
  if (unpacker.done() && shaped && before && state->next_step >= 0 && state->evaluations >= 0) return Status();
  return Status(StatusCode::kInvalidArgument, "the saved state is damaged: start the run again");
}

}  // namespace edgerun
