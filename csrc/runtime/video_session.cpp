#include "csrc/runtime/video_session.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <utility>

#include "csrc/base/json.h"
#include "csrc/runtime/executorch_log.h"
#include "csrc/runtime/process_memory.h"
#include "csrc/runtime/video_state.h"

namespace edgerun {

namespace {

// What a run's heap, the libraries' pages and the threads' stacks may grow by beyond what is counted.
constexpr int64_t kReserveBytes = int64_t{8} << 20;
constexpr const char* kStageNames[] = {"encode", "denoise", "decode"};

double now_ms() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double, std::milli>(now).count();
}

Status invalid(const std::string& message) { return Status(StatusCode::kInvalidArgument, message); }
Status cancelled_status() { return Status(StatusCode::kCancelled, "cancelled"); }

bool takes(const BlockLoader& loader, const std::string& name) {
  return std::any_of(loader.programs().begin(), loader.programs().end(), [&](const ChainProgram& program) {
    return std::find(program.inputs.begin(), program.inputs.end(), name) != program.inputs.end();
  });
}

Status set_floats(BlockLoader* loader, const std::string& name, std::vector<int64_t> sizes,
                  const std::vector<float>& values) {
  return loader->set(name, ElementType::kFloat32, std::move(sizes), values.data());
}

Status wrong_output(const std::string& name, const Value& value, const std::string& expected) {
  std::string sizes;
  for (const int64_t size : value.sizes) sizes += (sizes.empty() ? "" : ", ") + std::to_string(size);
  return Status(StatusCode::kCorrupt,
                "'" + name + "' came out as [" + sizes + "], not as " + expected + ": export the bundle again");
}

}  // namespace

// One run at a time: taken at its start, given back at its end however it ends.
class VideoSession::Turn {
 public:
  explicit Turn(VideoSession* session) : session_(session) {
    Run idle = Run::kIdle;
    taken_ = session_->run_.compare_exchange_strong(idle, Run::kRunning);
  }
  ~Turn() {
    if (taken_) session_->run_ = Run::kIdle;
  }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;
  bool taken() const { return taken_; }

 private:
  VideoSession* session_;
  bool taken_ = false;
};

Status VideoSession::open(const std::string& bundle, const VideoOptions& options,
                          std::unique_ptr<VideoSession>* session) {
  if (options.prefetch < 0 || options.memory_limit_bytes < 0) {
    return invalid("prefetch is " + std::to_string(options.prefetch) + " and the memory limit " +
                   std::to_string(options.memory_limit_bytes) + " bytes; both must be 0 or above");
  }
  std::unique_ptr<VideoSession> opened(new VideoSession());
  opened->options_ = options;
  opened->memory_limit_bytes_ = options.memory_limit_bytes;
  if (Status status = read_video_bundle(bundle, options.verify, &opened->bundle_); !status.ok()) return status;
  {
    const ExecutorchLog quiet;  // the pool is made or changed, which is no error to report
    if (Status status = opened->threads_.acquire(options.threads); !status.ok()) return status;
    (void)pool_threads();
  }
  // Everything that can be known now fails now, not after minutes: programs, operators, and a limit below a block.
  for (const Part& part : {opened->encoder(), opened->denoiser(), opened->time_decoder(), opened->frame_decoder()}) {
    std::unique_ptr<BlockLoader> loader;
    const int64_t decoding = opened->bundle_.frame_bytes() + opened->bundle_.picture_bytes();
    const int64_t denoising = part.stage == VideoStage::kDenoise ? opened->denoising_bytes() : 0;
    const int64_t reserve = part.stage == VideoStage::kDecode ? decoding : denoising;
    int64_t limit = 0;
    if (Status status = opened->open_chain(part, reserve, nullptr, &loader, &limit); !status.ok()) return status;
  }
  *session = std::move(opened);
  return Status();
}

// ---- chains

Status VideoSession::budget(int64_t reserve_bytes, int64_t* bytes) const {
  *bytes = kUnlimitedBytes;
  if (memory_limit_bytes_ == 0) return Status();
  release_free_memory();
  const ResidentBytes resident = resident_bytes();
  if (resident.anonymous < 0) {
    return invalid("this system does not tell how much memory the process has: leave the memory limit out");
  }
  const int64_t base = resident.anonymous + resident.file + kReserveBytes + reserve_bytes;
  *bytes = memory_limit_bytes_ - base;
  if (*bytes > 0) return Status();
  return Status(StatusCode::kOutOfMemory, "a memory limit of " + std::to_string(memory_limit_bytes_) +
                                              " bytes is below the " + std::to_string(base) +
                                              " that the process takes without a model: raise it");
}

// *limit_bytes: the memory limit that the chain's budget is of.
Status VideoSession::open_chain(const Part& part, int64_t reserve_bytes, const VideoRun* run,
                                std::unique_ptr<BlockLoader>* loader, int64_t* limit_bytes) {
  BlockLoaderOptions options;
  options.prefetch = options_.prefetch;
  options.value_bytes = part.chain->value_bytes;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    *limit_bytes = memory_limit_bytes_;
    if (Status status = budget(reserve_bytes, &options.budget_bytes); !status.ok()) return status;
  }
  if (run != nullptr) {
    options.keep_going = [this, run] {
      return run_.load(std::memory_order_relaxed) != Run::kCancelled && (!run->keep_going || run->keep_going());
    };
  }
  return of_limit(part, options.budget_bytes, BlockLoader::open(part.chain->programs, options, loader));
}

// What does not fit a budget is said of the memory limit, which is what the caller knows.
Status VideoSession::of_limit(const Part& part, int64_t budget_bytes, Status status) const {
  if (status.code() != StatusCode::kOutOfMemory || budget_bytes == kUnlimitedBytes) return status;
  const std::lock_guard<std::mutex> lock(mutex_);
  return Status(StatusCode::kOutOfMemory, "of a memory limit of " + std::to_string(memory_limit_bytes_) + " bytes, " +
                                              std::to_string(budget_bytes) + " are left for the " + part.name + ": " +
                                              status.message());
}

template <typename Body>
Status VideoSession::with_chain(const Part& part, int64_t reserve_bytes, const VideoRun& run, const Body& body) {
  const double begin_ms = now_ms();
  std::unique_ptr<BlockLoader> loader;
  for (bool current = false; !current;) {  // again where the limit was changed meanwhile
    loader.reset();
    int64_t limit_bytes = 0;
    const Status opened = open_chain(part, reserve_bytes, &run, &loader, &limit_bytes);
    const std::lock_guard<std::mutex> lock(mutex_);
    current = limit_bytes == memory_limit_bytes_;
    if (!current) continue;
    if (!opened.ok()) return opened;
    active_ = loader.get();
    if (limit_bytes > 0) active_base_bytes_ = limit_bytes - loader->schedule().budget_bytes();
  }
  Status status;
  {
    const ActiveScope scope(this);  // also where the body throws
    status = of_limit(part, loader->schedule().budget_bytes(), body(loader.get()));
  }
  Stage& stage = stages_[static_cast<int>(part.stage)];
  stage.chains.add(loader.get());
  loader.reset();
  release_free_memory();
  stage.wall_ms += now_ms() - begin_ms;
  return status;
}

void VideoSession::cancel() {
  Run running = Run::kRunning;
  if (!run_.compare_exchange_strong(running, Run::kCancelled)) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  if (active_ != nullptr) active_->cancel();
}

Status VideoSession::set_memory_limit(int64_t bytes) {
  if (bytes <= 0) return invalid("the memory limit is " + std::to_string(bytes) + " bytes; it must be above 0");
  const std::lock_guard<std::mutex> lock(mutex_);
  if (active_ != nullptr) {
    if (memory_limit_bytes_ == 0) {
      return invalid(
          "the run began without a memory limit, so it measured no block: give one when opening the session");
    }
    if (Status status = active_->set_budget(bytes - active_base_bytes_); !status.ok()) return status;
  }
  memory_limit_bytes_ = bytes;
  return Status();
}

// ---- a run

Status VideoSession::settings(const VideoRun& run, Settings* settings) const {
  *settings = {run.guidance.value_or(bundle_.guidance), run.times.value_or(bundle_.times),
               run.solver.value_or(bundle_.solver), run.leap.value_or(bundle_.leap),
               run.merge_steps.value_or(bundle_.merge_steps)};
  if (!std::isfinite(settings->guidance)) return invalid("the guidance is not a finite number: give one, as 7");
  for (size_t i = 0; i < settings->times.size(); ++i) {
    const double time = settings->times[i];
    if (time > 0.0 && time <= 1.0 && (i == 0 || time < settings->times[i - 1])) continue;
    return invalid("time " + std::to_string(i) + " is " + std::to_string(time) +
                   "; times fall from at most 1 to above 0: give them in that order");
  }
  if (settings->times.empty()) return invalid("there are 0 times: give at least one");
  if (Status status = check(settings->leap); !status.ok()) return status;
  if (settings->merge_steps < 0 || (settings->merge_steps > 0 && bundle_.merge.merged == 0)) {
    return invalid("merge_steps is " + std::to_string(settings->merge_steps) + "; " +
                   (bundle_.merge.merged == 0 ? "the bundle was exported without merging: give 0, or export it with"
                                              : "it must be 0 or above"));
  }
  return Status();
}

Status VideoSession::check_tokens(std::span<const int64_t> tokens) const {
  const auto count = static_cast<int64_t>(tokens.size());
  const auto [least, most] = bundle_.text_encoder.token_limits;
  if (count < std::max<int64_t>(least, 1) || (most > 0 && count > most)) {
    return invalid("the prompt has " + std::to_string(count) + " tokens; the bundle takes " +
                   std::to_string(std::max<int64_t>(least, 1)) + " to " + std::to_string(most) +
                   (count < least ? ": give some text" : ": shorten it"));
  }
  for (const int64_t token : tokens) {
    if (token < 0) return invalid("token " + std::to_string(token) + " is below 0: use the bundle's own tokenizer");
  }
  return Status();
}

Status VideoSession::progress(const VideoRun& run, VideoStage stage, int64_t done, int64_t total, double time) const {
  const bool going = run_.load(std::memory_order_relaxed) != Run::kCancelled;
  if (!going) return cancelled_status();
  if (!run.on_progress) return Status();
  return run.on_progress({stage, done, total, evaluations_, time, now_ms() - begin_ms_}) ? Status()
                                                                                         : cancelled_status();
}

Status VideoSession::encode(std::span<const int64_t> tokens, const VideoRun& run) {
  if (Status status = progress(run, VideoStage::kEncode, 0, 1, 1.0); !status.ok()) return status;
  return with_chain(encoder(), 0, run, [&](BlockLoader* loader) -> Status {
    const std::vector<int64_t> sizes = {1, static_cast<int64_t>(tokens.size())};
    if (Status status = loader->set("tokens", ElementType::kInt64, sizes, tokens.data()); !status.ok()) return status;
    if (Status status = loader->run(false); !status.ok()) return status;
    y_ = std::move((*loader->values())["y"]);
    if (y_.type == ElementType::kFloat32 && y_.sizes.size() == 3 && y_.sizes[0] == 1) return Status();
    return wrong_output("y", y_, "[1, tokens, channels]");
  });
}

// The guided velocity at `time`, to velocity_.
Status VideoSession::evaluate(BlockLoader* loader, double time, bool merged, double guidance, bool more_follow) {
  const int64_t elements = bundle_.latent_elements(), frames = bundle_.latent_frames;
  const std::vector<int64_t> sizes = {2, bundle_.channels, frames, bundle_.latent_height, bundle_.latent_width};
  std::vector<float> twice(x_);
  twice.insert(twice.end(), x_.begin(), x_.end());
  if (Status status = set_floats(loader, "x", sizes, twice); !status.ok()) return status;
  twice.clear();
  twice.shrink_to_fit();
  const auto both = [&](const char* name, double value) {
    return set_floats(loader, name, {2}, std::vector<float>(2, static_cast<float>(value)));
  };
  if (Status status = both("time", time); !status.ok()) return status;
  if (Status status = both("fps", bundle_.fps); !status.ok()) return status;
  if (Status status = loader->set("y", y_.type, y_.sizes, y_.data.get()); !status.ok()) return status;
  if (takes(*loader, "merge") || takes(*loader, "unmerge") || takes(*loader, "cosines") || takes(*loader, "sines")) {
    MergeMatrices identity;
    if (!merged) {
      identity.merged = frames;
      identity.merge.assign(static_cast<size_t>(frames * frames), 0.0f);
      for (int64_t i = 0; i < frames; ++i) {
        identity.merge[static_cast<size_t>(i * frames + i)] = 1.0f;
        identity.positions.push_back(static_cast<float>(i));
      }
      identity.unmerge = identity.merge;
    }
    const MergeMatrices& matrices = merged ? bundle_.merge : identity;
    std::vector<float> cosines, sines;
    rotary_angles(matrices.positions, bundle_.rotary_frequencies, &cosines, &sines);
    const int64_t count = matrices.merged, head_size = bundle_.denoiser.head_size;
    Status status = set_floats(loader, "merge", {count, frames}, matrices.merge);
    if (status.ok()) status = set_floats(loader, "unmerge", {frames, count}, matrices.unmerge);
    if (status.ok()) status = set_floats(loader, "cosines", {count, head_size}, cosines);
    if (status.ok()) status = set_floats(loader, "sines", {count, head_size}, sines);
    if (!status.ok()) return status;
  }
  if (Status status = loader->run(more_follow); !status.ok()) return status;
  const Value& v = (*loader->values())["v"];
  if (v.type != ElementType::kFloat32 || v.sizes != sizes) return wrong_output("v", v, "two latents");
  velocity_.assign(v.floats(), v.floats() + elements);
  guide(velocity_, {v.floats() + elements, static_cast<size_t>(elements)}, static_cast<float>(guidance));
  ++evaluations_;
  for (const float value : velocity_) {
    if (!std::isfinite(value)) {
      return Status(StatusCode::kInternal, "the velocity at time " + std::to_string(time) +
                                               " is not finite: the program overflowed; validate the bundle");
    }
  }
  return Status();
}

// x_ from `time` to `following` along velocity_.
void VideoSession::advance(const Settings& settings, double time, double following, bool leaps) {
  const double step = time - following;
  const bool looks_back = settings.solver == Solver::kAdamsBashforth2;
  if (looks_back && !leaps && !previous_velocity_.empty()) {
    const auto turn = static_cast<float>(step / (2.0 * (previous_time_ - time)));
    adams_bashforth_step(x_, velocity_, previous_velocity_, turn, static_cast<float>(step));
  } else {
    euler_step(x_, velocity_, static_cast<float>(step));
  }
  previous_velocity_.clear();
  if (looks_back) previous_velocity_.swap(velocity_);
  previous_time_ = time;
  if (following == 0.0) {  // nothing looks back at them any more
    velocity_ = {};
    previous_velocity_ = {};
  }
}

Status VideoSession::denoise(const VideoRun& run, const Settings& settings) {
  const auto steps = static_cast<int64_t>(settings.times.size());
  if (next_step_ >= steps) return Status();
  return with_chain(denoiser(), denoising_bytes(), run, [&](BlockLoader* loader) -> Status {
    while (next_step_ < steps) {
      const auto index = static_cast<size_t>(next_step_);
      const double time = settings.times[index], begin_ms = now_ms();
      if (Status status = progress(run, VideoStage::kDenoise, next_step_, steps, time); !status.ok()) return status;
      const bool last = next_step_ + 1 == steps, merged = next_step_ < settings.merge_steps;
      const bool more_follow = !last && !rule_->leaps_next();
      if (Status status = evaluate(loader, time, merged, settings.guidance, more_follow); !status.ok()) return status;
      const bool leaps = rule_->observe(time, velocity_);
      const double following = last || leaps ? 0.0 : settings.times[index + 1];
      advance(settings, time, following, leaps);
      next_step_ = leaps ? steps : next_step_ + 1;
      steps_.push_back({time, now_ms() - begin_ms, merged});
    }
    return Status();
  });
}

Status VideoSession::decode(const VideoRun& run) {
  Value pictures;
  if (Status status = decode_time(run, &pictures); !status.ok()) return status;
  return decode_frames(run, pictures);
}

// Chunks of latents, to the pictures [frames, c, h', w'] of all of them.
Status VideoSession::decode_time(const VideoRun& run, Value* pictures) {
  const int64_t plane = bundle_.latent_height * bundle_.latent_width;
  const int64_t chunks = bundle_.chunks(), calls = chunks + bundle_.frame_calls();
  const int64_t reserve = bundle_.frame_bytes() + bundle_.picture_bytes();  // the caller's may not be in RAM yet
  return with_chain(time_decoder(), reserve, run, [&](BlockLoader* loader) -> Status {
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      if (Status status = progress(run, VideoStage::kDecode, chunk, calls, 0.0); !status.ok()) return status;
      const int64_t first = chunk * bundle_.latents_per_chunk;
      const int64_t count = std::min(bundle_.latents_per_chunk, bundle_.latent_frames - first);
      std::vector<float> z;
      for (int64_t channel = 0; channel < bundle_.channels; ++channel) {
        const float* const start = x_.data() + (channel * bundle_.latent_frames + first) * plane;
        z.insert(z.end(), start, start + count * plane);
      }
      const std::vector<int64_t> sizes = {1, bundle_.channels, count, bundle_.latent_height, bundle_.latent_width};
      if (Status status = set_floats(loader, "z", sizes, z); !status.ok()) return status;
      if (Status status = loader->run(chunk + 1 < chunks); !status.ok()) return status;
      const Value& decoded = (*loader->values())["chunk"];
      const int64_t before = chunk * bundle_.frames_per_chunk;
      const int64_t wanted = std::min(bundle_.frames_per_chunk, bundle_.frames - before);
      // The memory limit counted pictures of the manifest's size.
      const bool fits = decoded.type == ElementType::kFloat32 && decoded.sizes.size() == 4 &&
                        decoded.sizes[0] >= wanted &&
                        decoded.bytes() / decoded.sizes[0] == bundle_.frame_decoder.picture_bytes;
      if (fits && chunk == 0) {
        pictures->resize(ElementType::kFloat32, {bundle_.frames, decoded.sizes[1], decoded.sizes[2], decoded.sizes[3]});
      }
      if (!fits || !std::equal(decoded.sizes.begin() + 1, decoded.sizes.end(), pictures->sizes.begin() + 1)) {
        return wrong_output("chunk", decoded,
                            "[" + std::to_string(wanted) + " or more, channels, height, width] of " +
                                std::to_string(bundle_.frame_decoder.picture_bytes) + " bytes a picture");
      }
      const int64_t bytes = pictures->bytes() / bundle_.frames;  // of one
      std::memcpy(pictures->data.get() + before * bytes, decoded.data.get() + (decoded.sizes[0] - wanted) * bytes,
                  static_cast<size_t>(wanted * bytes));
    }
    return Status();
  });
}

Status VideoSession::decode_frames(const VideoRun& run, const Value& pictures) {
  const int64_t chunks = bundle_.chunks(), calls = chunks + bundle_.frame_calls();
  return with_chain(frame_decoder(), bundle_.frame_bytes(), run, [&](BlockLoader* loader) -> Status {
    for (int64_t call = chunks; call < calls; ++call) {
      if (Status status = progress(run, VideoStage::kDecode, call, calls, 0.0); !status.ok()) return status;
      const int64_t first = (call - chunks) * bundle_.frames_per_call;
      const int64_t count = std::min(bundle_.frames_per_call, bundle_.frames - first);
      std::vector<int64_t> sizes = pictures.sizes;
      sizes[0] = count;
      const uint8_t* const start = pictures.data.get() + first * (pictures.bytes() / bundle_.frames);
      if (Status status = loader->set("pictures", pictures.type, sizes, start); !status.ok()) return status;
      if (Status status = loader->run(call + 1 < calls); !status.ok()) return status;
      const Value& frames = (*loader->values())["frames"];
      if (frames.type != ElementType::kFloat32 ||
          frames.sizes != std::vector<int64_t>{3, count, bundle_.height, bundle_.width}) {
        return wrong_output("frames", frames,
                            "[3, " + std::to_string(count) + ", " + std::to_string(bundle_.height) + ", " +
                                std::to_string(bundle_.width) + "]");
      }
      to_pixels({frames.floats(), static_cast<size_t>(frames.bytes() / 4)},
                run.frames_out + 3 * first * bundle_.height * bundle_.width);
    }
    return progress(run, VideoStage::kDecode, calls, calls, 0.0);
  });
}

Status VideoSession::generate_running(std::span<const int64_t> tokens, const VideoRun& run) {
  Settings chosen;
  if (Status status = settings(run, &chosen); !status.ok()) return status;
  const auto elements = static_cast<size_t>(bundle_.latent_elements());
  if (!run.noise.empty() && run.noise.size() != elements) {
    return invalid("the noise has " + std::to_string(run.noise.size()) + " numbers; the latent has " +
                   std::to_string(elements) + ": give as many");
  }
  if (run.state.empty()) {
    if (Status status = check_tokens(tokens); !status.ok()) return status;
  }
  begin_ms_ = now_ms();
  steps_.clear();
  for (Stage& stage : stages_) stage = Stage();
  has_state_ = false;
  next_step_ = evaluations_ = 0;
  previous_velocity_.clear();
  if (!run.state.empty()) {
    if (Status status = restore(run.state, chosen); !status.ok()) return status;
  } else {
    rule_.emplace(chosen.leap);
    if (Status status = encode(tokens, run); !status.ok()) return status;
    x_.resize(elements);
    run.noise.empty() ? fill_noise(run.seed, x_) : (void)std::copy(run.noise.begin(), run.noise.end(), x_.begin());
  }
  has_state_ = true;
  if (Status status = denoise(run, chosen); !status.ok()) return status;
  if (run.latent_out != nullptr) std::copy(x_.begin(), x_.end(), run.latent_out);
  return run.frames_out == nullptr ? Status() : decode(run);
}

Status VideoSession::generate(std::span<const int64_t> tokens, const VideoRun& run, bool* cancelled) {
  const Turn turn(this);
  if (!turn.taken()) return invalid("the session is running another call: wait for it, or cancel it");
  *cancelled = false;
  Status status = generate_running(tokens, run);
  if (status.code() != StatusCode::kCancelled) return status;
  *cancelled = true;
  return Status();
}

// ---- what is left of it

std::vector<uint8_t> VideoSession::state() const {
  if (!has_state_) return {};
  return pack_state({bundle_.build, next_step_, evaluations_, x_, y_.sizes,
                     std::vector<float>(y_.floats(), y_.floats() + y_.bytes() / 4), previous_time_, previous_velocity_,
                     rule_->state()});
}

Status VideoSession::restore(std::span<const uint8_t> bytes, const Settings& settings) {
  const size_t steps = settings.times.size();
  VideoState state;
  if (Status status = unpack_state(bytes, &state); !status.ok()) return status;
  if (state.build != bundle_.build || state.x.size() != static_cast<size_t>(bundle_.latent_elements())) {
    return invalid("the saved state is of build " + state.build.substr(0, 16) + "…, this bundle is of " +
                   bundle_.build.substr(0, 16) + "…: go on with the bundle that it was made with");
  }
  if (state.next_step > static_cast<int64_t>(steps)) {
    return invalid("the saved state is after step " + std::to_string(state.next_step) + ", this run has " +
                   std::to_string(steps) + ": give the times that it was made with");
  }
  const auto next = static_cast<size_t>(state.next_step);
  if (!state.previous_velocity.empty() && next < steps && !(state.previous_time > settings.times[next])) {
    return invalid("the saved state is after a step at time " + std::to_string(state.previous_time) +
                   ", this run goes on at " + std::to_string(settings.times[next]) +
                   ": give the times that it was made with");
  }
  next_step_ = state.next_step;
  evaluations_ = state.evaluations;
  x_ = std::move(state.x);
  y_.resize(ElementType::kFloat32, state.y_sizes);
  std::memcpy(y_.data.get(), state.y.data(), state.y.size() * sizeof(float));
  previous_time_ = state.previous_time;
  previous_velocity_ = std::move(state.previous_velocity);
  rule_.emplace(settings.leap, evaluations_);
  rule_->set_state(std::move(state.leap));
  return Status();
}

std::string VideoSession::report() const {
  json::Writer json;
  json.begin_object().key("evaluations").value(evaluations_);
  json.key("memory_limit_bytes");
  memory_limit_bytes_ == 0 ? json.null() : json.value(memory_limit_bytes_);
  json.key("peak_rss_bytes");
  const int64_t peak = peak_rss_bytes();
  peak < 0 ? json.null() : json.value(peak);
  json.key("steps").begin_array();
  for (const Step& step : steps_) {
    json.begin_object().key("time").value(step.time).key("wall_ms").value(step.wall_ms);
    json.key("merged").value(step.merged).end_object();
  }
  json.end_array().key("stages").begin_object();
  for (int i = 0; i < 3; ++i) {
    json.key(kStageNames[i]);
    if (stages_[i].chains.blocks.empty()) {
      json.null();
      continue;
    }
    json.begin_object().key("wall_ms").value(stages_[i].wall_ms).key("chain");
    write_chains(stages_[i].chains, &json);
    json.end_object();
  }
  return json.end_object().end_object().text();
}

}  // namespace edgerun
