// text_session: a text bundle, loaded and running. It cuts a prompt into slices, decodes, samples, stops, and can be
// cancelled from another thread; the conversation's state is the program's own cache.
//
// Slices end at multiples of the recipe's tile, so that how a prompt arrives does not change what is computed
// (csrc/ops/dhsa_attention/dhsa_attention.h, Laws); with dense_tail > 0 the prompt's last tokens are a call of their own.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "csrc/base/status.h"
#include "csrc/runtime/bundle_reader.h"
#include "csrc/runtime/sampler.h"

namespace edgerun {

struct SessionOptions {
  bool verify = true;   // compare the program's sha256 with the manifest's
  int64_t threads = 0;  // of the process's pool; 0: as it is
};

// Under ExecuTorch's Stats names. Times in milliseconds of the monotonic clock; NaN: has not happened.
struct SessionStats {
  static constexpr double kNever = std::numeric_limits<double>::quiet_NaN();
  int64_t prompt_tokens = 0;
  int64_t generated_tokens = 0;
  double model_load_start_ms = kNever;
  double model_load_end_ms = kNever;
  double inference_start_ms = kNever;
  double inference_end_ms = kNever;
  double prompt_eval_end_ms = kNever;
  double first_token_ms = kNever;
  double aggregate_sampling_time_ms = 0.0;
  int64_t attended_pairs = 0;  // (query, key) pairs per KV head, summed over layers
  int64_t causal_pairs = 0;    // what dense attention would have attended
};

enum class Finish : int { kLength = 0, kEos = 1, kStop = 2, kCancelled = 3 };

struct GenerateOptions {
  int64_t max_new_tokens = 128;  // 0: only prefill
  SamplerOptions sampler;
  std::optional<std::vector<int64_t>> stop_ids;  // instead of the bundle's end tokens; the one met is still emitted
  std::span<const int64_t> forced;               // fed in turn instead of sampled tokens; max_new_tokens is ignored
  float* logits_out = nullptr;                   // [forced + 1, vocab]: after the prompt and after each forced token
  std::function<bool(int64_t)> on_token;         // false: cancel
  std::function<bool()> keep_going;              // asked before every call of the program; false: cancel
};

class TextSession {
 public:
  static Status open(const std::string& bundle, const SessionOptions& options, std::unique_ptr<TextSession>* session);
  ~TextSession();

  // Appends `prompt` after what is cached and generates. kInvalidArgument leaves the session as it was. A cancelled
  // or failed run leaves cached what was computed; the last token emitted is fed first by the next call.
  Status generate(std::span<const int64_t> prompt, const GenerateOptions& options, Finish* finish);

  // Drops what is cached from input_pos on, appends `ids`, and writes the logits after the last: [vocab] floats.
  Status forward(std::span<const int64_t> ids, int64_t input_pos, float* logits);

  Status reset();  // forgets the conversation
  void cancel();   // from any thread: the running call ends before its next slice or token; nothing runs: no effect

  const BundleInfo& info() const { return info_; }
  const SessionStats& stats() const { return stats_; }
  int64_t cached_tokens() const { return position_; }

 private:
  struct Program;
  class Turn;
  enum class Run : int { kIdle, kRunning, kCancelled };

  TextSession();
  Status load(const SessionOptions& options);
  Status check_ids(std::span<const int64_t> ids, const char* what) const;
  Status check_room(int64_t tokens, int64_t position) const;
  bool stopped(const GenerateOptions& options) const;
  Status prefill(std::span<const int64_t> ids, const GenerateOptions& options);
  Status execute(std::span<const int64_t> ids, int64_t expected_tokens = 0);  // of the text; 0: not known
  Status decode(const GenerateOptions& options, Finish* finish);
  Status feed_forced(const GenerateOptions& options);
  Status generate_running(std::span<const int64_t> prompt, const GenerateOptions& options, Finish* finish);

  BundleInfo info_;
  std::unique_ptr<Program> program_;
  std::atomic<Run> run_{Run::kIdle};
  SessionStats stats_;
  int64_t position_ = 0;            // tokens cached
  std::optional<int64_t> pending_;  // emitted, not yet fed
  const float* logits_ = nullptr;   // [vocab] of the last call, in the program's memory
};

}  // namespace edgerun
