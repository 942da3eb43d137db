#include "csrc/runtime/text_session.h"

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>

#include <algorithm>
#include <chrono>
#include <cstring>

#include "csrc/ops/dhsa_attention/counters.h"
#include "csrc/runtime/executorch_errors.h"
#include "csrc/runtime/executorch_log.h"
#include "csrc/runtime/process_memory.h"
#include "csrc/runtime/thread_pool.h"

namespace edgerun {

namespace {

using executorch::extension::Module;
using executorch::runtime::Error;

double now_ms() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double, std::milli>(now).count();
}

Status invalid(const std::string& message) { return Status(StatusCode::kInvalidArgument, message); }

struct AttentionScope {
  AttentionScope(dhsa::Counters* sink, int64_t expected_tokens) {
    set_attention_counters(sink);
    set_attention_expected_tokens(expected_tokens);
  }
  ~AttentionScope() {
    set_attention_counters(nullptr);
    set_attention_expected_tokens(0);
  }
};

}  // namespace

// What ExecuTorch needs for as long as the session lives. Order matters: the module goes before its memory.
struct TextSession::Program {
  ThreadPoolHold threads;
  std::vector<LazyMemory> memory;
  std::vector<executorch::runtime::Span<uint8_t>> spans;
  std::unique_ptr<executorch::runtime::HierarchicalAllocator> planned;
  std::unique_ptr<Module> module;
  dhsa::Counters counters;
};

TextSession::TextSession() = default;
TextSession::~TextSession() = default;

Status TextSession::open(const std::string& bundle, const SessionOptions& options,
                         std::unique_ptr<TextSession>* session) {
  std::unique_ptr<TextSession> opened(new TextSession());
  opened->stats_.model_load_start_ms = now_ms();
  if (Status status = read_bundle(bundle, options.verify, &opened->info_); !status.ok()) return status;
  if (Status status = opened->load(options); !status.ok()) return status;
  opened->stats_.model_load_end_ms = now_ms();
  *session = std::move(opened);
  return Status();
}

Status TextSession::load(const SessionOptions& options) {
  const ExecutorchLog log;
  if (Status status = check_operators(info_.operators); !status.ok()) return status;
  program_ = std::make_unique<Program>();
  if (Status status = program_->threads.acquire(options.threads); !status.ok()) return status;
  program_->module = std::make_unique<Module>(info_.program_path, Module::LoadMode::Mmap);
  Module& module = *program_->module;
  using Verification = executorch::runtime::Program::Verification;
  const std::string where = "'" + info_.program_path + "' cannot be loaded";
  const Error loaded = module.load(options.verify ? Verification::Minimal : Verification::InternalConsistency);
  if (loaded != Error::Ok) return executorch_failed(where, loaded, log);

  const auto build = module.execute("edgerun_build");
  if (!build.ok() || build->size() != 1 || !(*build)[0].isString() || (*build)[0].toString() != info_.build) {
    return Status(StatusCode::kCorrupt, "'" + info_.program_path + "' is not of the manifest's build " +
                                            info_.build.substr(0, 16) + "…: export the bundle again");
  }
  const auto meta = module.method_meta("forward");
  if (!meta.ok()) return executorch_failed(where, meta.error(), log);
  const auto tokens = meta->input_tensor_meta(0);
  if (!tokens.ok()) return executorch_failed(where, tokens.error(), log);
  if (tokens->sizes().size() != 2 || tokens->sizes()[1] < info_.prefill_slice) {
    return Status(StatusCode::kCorrupt, "'" + info_.program_path + "' takes fewer tokens a call than prefill_slice " +
                                            std::to_string(info_.prefill_slice) + ": export the bundle again");
  }
  const auto logits = meta->output_tensor_meta(0);
  if (!logits.ok()) return executorch_failed(where, logits.error(), log);
  const auto sizes = logits->sizes();
  if (sizes.empty() || sizes[sizes.size() - 1] != info_.vocab_size) {
    return Status(StatusCode::kCorrupt, "'" + info_.program_path + "' does not return the logits of the manifest's " +
                                            std::to_string(info_.vocab_size) + " tokens: export the bundle again");
  }
  for (size_t i = 0; i < meta->num_memory_planned_buffers(); ++i) {
    const auto bytes = meta->memory_planned_buffer_size(i);
    if (!bytes.ok()) return executorch_failed(where, bytes.error(), log);
    if (!program_->memory.emplace_back().allocate(static_cast<size_t>(*bytes))) {
      return Status(StatusCode::kOutOfMemory,
                    "the system refuses " + std::to_string(*bytes) + " bytes of address space for a context of " +
                        std::to_string(info_.max_context) + " tokens: export with a lower --max-context");
    }
  }
  for (const LazyMemory& memory : program_->memory) program_->spans.emplace_back(memory.data(), memory.size());
  program_->planned = std::make_unique<executorch::runtime::HierarchicalAllocator>(
      executorch::runtime::Span<executorch::runtime::Span<uint8_t>>(program_->spans.data(), program_->spans.size()));
  const Error ready = module.load_method("forward", program_->planned.get());
  return ready == Error::Ok ? Status() : executorch_failed(where, ready, log);
}

// One call at a time: taken at its start, given back at its end however it ends.
class TextSession::Turn {
 public:
  explicit Turn(TextSession* session) : session_(session) {
    Run idle = Run::kIdle;
    taken_ = session_->run_.compare_exchange_strong(idle, Run::kRunning);
  }
  ~Turn() {
    if (taken_) session_->run_ = Run::kIdle;
  }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;
  Status status() const {
    return taken_ ? Status() : invalid("the session is running another call: wait for it, or cancel it");
  }

 private:
  TextSession* session_;
  bool taken_ = false;
};

Status TextSession::check_ids(std::span<const int64_t> ids, const char* what) const {
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= info_.vocab_size) {
      return invalid(std::string(what) + " " + std::to_string(i) + " is " + std::to_string(ids[i]) +
                     "; the vocabulary has ids 0 to " + std::to_string(info_.vocab_size - 1) +
                     ": use the bundle's own tokenizer");
    }
  }
  return Status();
}

Status TextSession::check_room(int64_t tokens, int64_t position) const {
  if (position + tokens <= info_.max_context) return Status();
  return invalid("the prompt has " + std::to_string(tokens) + " tokens" +
                 (position > 0 ? " after " + std::to_string(position) + " cached" : "") + "; the context holds " +
                 std::to_string(info_.max_context) + ": shorten it, " + (position > 0 ? "reset the session, " : "") +
                 "or export with a larger --max-context");
}

bool TextSession::stopped(const GenerateOptions& options) const {
  return run_.load(std::memory_order_relaxed) == Run::kCancelled || (options.keep_going && !options.keep_going());
}

Status TextSession::execute(std::span<const int64_t> ids, int64_t expected_tokens) {
  using executorch::aten::ScalarType;
  using executorch::extension::from_blob;
  const ExecutorchLog log;
  int64_t position = position_;
  const auto count = static_cast<executorch::aten::SizesType>(ids.size());
  const auto tokens = from_blob(const_cast<int64_t*>(ids.data()), {1, count}, ScalarType::Long);
  const auto input_pos = from_blob(&position, {1}, ScalarType::Long);
  program_->counters = {};
  const auto outputs = [&] {
    const AttentionScope scope(&program_->counters, expected_tokens);
    return program_->module->execute("forward", {tokens, input_pos});
  }();
  if (!outputs.ok()) {
    return executorch_failed("the program failed at position " + std::to_string(position_), outputs.error(), log);
  }
  stats_.attended_pairs += program_->counters.attended_pairs;
  stats_.causal_pairs += program_->counters.causal_pairs;
  if (outputs->size() != 1 || !(*outputs)[0].isTensor() ||
      (*outputs)[0].toTensor().scalar_type() != ScalarType::Float ||
      (*outputs)[0].toTensor().numel() != info_.vocab_size) {
    return Status(StatusCode::kCorrupt, "the program does not return one row of " + std::to_string(info_.vocab_size) +
                                            " float32 logits, as its manifest says: export the bundle again");
  }
  logits_ = (*outputs)[0].toTensor().const_data_ptr<float>();
  position_ += static_cast<int64_t>(ids.size());
  return Status();
}

Status TextSession::prefill(std::span<const int64_t> ids, const GenerateOptions& options) {
  const int64_t end = position_ + static_cast<int64_t>(ids.size());
  const int64_t tail = std::min<int64_t>(info_.dense_tail, static_cast<int64_t>(ids.size()));
  const int64_t first = position_;
  while (position_ < end) {
    if (stopped(options)) return Status(StatusCode::kCancelled, "cancelled");
    const int64_t part_end = position_ < end - tail ? end - tail : end;
    int64_t slice_end = std::min(position_ + info_.prefill_slice, part_end);
    if (slice_end < part_end) {
      const int64_t at_tile = slice_end / info_.tile * info_.tile;
      if (at_tile > position_) slice_end = at_tile;
    }
    const int64_t expected = position_ == first ? end : 0;  // said once
    const Status status = execute(ids.subspan(position_ - first, slice_end - position_), expected);
    if (!status.ok()) return status;
  }
  return Status();
}

Status TextSession::decode(const GenerateOptions& options, Finish* finish) {
  Sampler sampler(options.sampler);
  const std::vector<int64_t>& stops = options.stop_ids ? *options.stop_ids : info_.eos_ids;
  const auto contains = [](const std::vector<int64_t>& ids, int64_t id) {
    return std::find(ids.begin(), ids.end(), id) != ids.end();
  };
  *finish = Finish::kLength;
  while (stats_.generated_tokens < options.max_new_tokens) {
    if (pending_) {
      if (position_ == info_.max_context) return Status();
      if (stopped(options)) return Status(StatusCode::kCancelled, "cancelled");
      const int64_t token = *pending_;
      if (Status status = execute({&token, 1}); !status.ok()) return status;
      pending_.reset();
    }
    int64_t token = 0;
    const double begin_ms = now_ms();
    if (Status status = sampler.sample({logits_, static_cast<size_t>(info_.vocab_size)}, &token); !status.ok()) {
      return status;
    }
    const double end_ms = now_ms();
    stats_.aggregate_sampling_time_ms += end_ms - begin_ms;
    if (stats_.generated_tokens == 0) stats_.first_token_ms = end_ms;
    ++stats_.generated_tokens;
    pending_ = token;
    if (options.on_token && !options.on_token(token)) return Status(StatusCode::kCancelled, "cancelled");
    if (contains(stops, token)) {
      *finish = contains(info_.eos_ids, token) ? Finish::kEos : Finish::kStop;
      return Status();
    }
  }
  return Status();
}

Status TextSession::feed_forced(const GenerateOptions& options) {
  const size_t row_bytes = static_cast<size_t>(info_.vocab_size) * sizeof(float);
  float* row = options.logits_out;
  const auto keep_row = [&] {
    if (row == nullptr) return;
    std::memcpy(row, logits_, row_bytes);
    row += info_.vocab_size;
  };
  keep_row();
  for (const int64_t token : options.forced) {
    if (stopped(options)) return Status(StatusCode::kCancelled, "cancelled");
    if (stats_.generated_tokens == 0) stats_.first_token_ms = now_ms();
    if (Status status = execute({&token, 1}); !status.ok()) return status;
    ++stats_.generated_tokens;
    keep_row();
    if (options.on_token && !options.on_token(token)) return Status(StatusCode::kCancelled, "cancelled");
  }
  return Status();
}

Status TextSession::generate_running(std::span<const int64_t> prompt, const GenerateOptions& options, Finish* finish) {
  if (prompt.empty()) return invalid("the prompt has 0 tokens; it must have at least 1: give some text");
  if (options.max_new_tokens < 0) {
    return invalid("max_new_tokens is " + std::to_string(options.max_new_tokens) + "; it must be 0 or above");
  }
  if (Status status = check(options.sampler); !status.ok()) return status;
  if (Status status = check_ids(prompt, "prompt token"); !status.ok()) return status;
  if (Status status = check_ids(options.forced, "forced token"); !status.ok()) return status;
  if (options.stop_ids) {
    if (Status status = check_ids(*options.stop_ids, "stop token"); !status.ok()) return status;
  }
  std::vector<int64_t> ids;
  if (pending_) ids.push_back(*pending_);
  ids.insert(ids.end(), prompt.begin(), prompt.end());
  const auto fed = static_cast<int64_t>(prompt.size() + options.forced.size());
  if (Status status = check_room(fed, position_ + (pending_ ? 1 : 0)); !status.ok()) return status;

  stats_.prompt_tokens = static_cast<int64_t>(prompt.size());
  stats_.generated_tokens = 0;
  stats_.aggregate_sampling_time_ms = 0.0;
  stats_.attended_pairs = stats_.causal_pairs = 0;
  stats_.prompt_eval_end_ms = stats_.first_token_ms = stats_.inference_end_ms = SessionStats::kNever;
  stats_.inference_start_ms = now_ms();
  const int64_t before = position_;
  Status status = prefill(ids, options);
  if (position_ > before) pending_.reset();
  if (status.ok()) {
    stats_.prompt_eval_end_ms = now_ms();
    const bool forced = !options.forced.empty() || options.logits_out != nullptr;
    *finish = Finish::kLength;
    status = forced ? feed_forced(options) : decode(options, finish);
  }
  stats_.inference_end_ms = now_ms();
  if (status.code() != StatusCode::kCancelled) return status;
  *finish = Finish::kCancelled;
  return Status();
}

Status TextSession::generate(std::span<const int64_t> prompt, const GenerateOptions& options, Finish* finish) {
  const Turn turn(this);
  if (!turn.status().ok()) return turn.status();
  return generate_running(prompt, options, finish);
}

Status TextSession::forward(std::span<const int64_t> ids, int64_t input_pos, float* logits) {
  if (logits == nullptr) return invalid("forward has nowhere to write: give room for vocab_size floats");
  const Turn turn(this);
  if (!turn.status().ok()) return turn.status();
  if (input_pos < 0 || input_pos > position_) {
    return invalid("input_pos is " + std::to_string(input_pos) + "; it must be 0 to " + std::to_string(position_) +
                   ", the tokens cached");
  }
  const int64_t position = position_;
  const std::optional<int64_t> pending = pending_;
  position_ = input_pos;
  pending_.reset();
  GenerateOptions options;
  options.logits_out = logits;
  Finish finish = Finish::kLength;
  Status status = generate_running(ids, options, &finish);
  if (status.code() == StatusCode::kInvalidArgument) {  // nothing was computed
    position_ = position;
    pending_ = pending;
  }
  if (status.ok() && finish == Finish::kCancelled) return Status(StatusCode::kCancelled, "the call was cancelled");
  return status;
}

Status TextSession::reset() {
  const Turn turn(this);
  if (!turn.status().ok()) return turn.status();
  position_ = 0;
  pending_.reset();
  return Status();
}

void TextSession::cancel() {
  Run running = Run::kRunning;
  run_.compare_exchange_strong(running, Run::kCancelled);
}

}  // namespace edgerun
