// video_session: a video bundle, running: the prompt is encoded, a latent denoised step by step, and the frames decoded.
// Each is a chain of programs that streams through what the memory limit leaves (block_loader.h), and is gone from
// memory before the next begins; decoding is two, over time and then on a few frames at a time.
//
// After step i the latent is x += v (t_i - t_{i+1}), or a second-order step that looks back at the velocity before; when
// the leap rule says so, x += v t_i ends the loop (video_bundle.h has the conventions). A run that was cancelled keeps
// its state, which can be saved and given to a later run.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "csrc/base/status.h"
#include "csrc/runtime/block_loader.h"
#include "csrc/runtime/block_report.h"
#include "csrc/runtime/thread_pool.h"
#include "csrc/runtime/video_bundle.h"
#include "csrc/runtime/video_sampling.h"

namespace edgerun {

struct VideoOptions {
  bool verify = true;              // compare the programs' sha256 with the manifest's
  int64_t threads = 0;             // of the process's pool; 0: as it is
  int64_t prefetch = 1;            // programs to load ahead; 0: none
  int64_t memory_limit_bytes = 0;  // for what the whole process has in RAM; 0: none
};

enum class VideoStage : int { kEncode = 0, kDenoise = 1, kDecode = 2 };

struct VideoProgress {
  VideoStage stage = VideoStage::kEncode;
  int64_t done = 0, total = 0;  // calls of the stage's chains: 1 prompt, steps, chunks of latents and calls for frames
  int64_t evaluations = 0;      // of the denoiser so far
  double time = 0.0;            // of the diffusion, 1 is noise
  double elapsed_ms = 0.0;      // since the run began
};

struct VideoRun {
  std::optional<double> guidance;  // instead of the bundle's, as the four below
  std::optional<std::vector<double>> times;
  std::optional<Solver> solver;
  std::optional<LeapOptions> leap;
  std::optional<int64_t> merge_steps;
  uint64_t seed = 0;               // of the noise
  std::span<const float> noise;    // [C, T, h, w], instead of the seed's; empty: none is given
  std::span<const uint8_t> state;  // of an earlier run, which goes on where that one stopped; empty: none
  float* latent_out = nullptr;     // [C, T, h, w]
  uint8_t* frames_out = nullptr;   // [frames, height, width, 3]; null: nothing is decoded
  std::function<bool(const VideoProgress&)> on_progress;  // before every call of a chain, and at the end; false: cancel
  std::function<bool()> keep_going;                       // before every program; false: cancel
};

class VideoSession {
 public:
  // kOutOfMemory when the memory limit is below what one program needs.
  static Status open(const std::string& bundle, const VideoOptions& options, std::unique_ptr<VideoSession>* session);

  // tokens: the prompt's. *cancelled: the run was cancelled, and state() goes on from there.
  Status generate(std::span<const int64_t> tokens, const VideoRun& run, bool* cancelled);

  void cancel();                           // from any thread: the run ends before its next program
  Status set_memory_limit(int64_t bytes);  // from any thread, as BlockSchedule::set_budget
  std::vector<uint8_t> state() const;      // of the last run; in this machine's byte order. Empty: there is none
  int64_t evaluations() const { return evaluations_; }  // of the denoiser, in the last run
  const VideoBundle& bundle() const { return bundle_; }
  std::string report() const;  // JSON: stages, steps, chains and their blocks, of the last run

 private:
  class Turn;
  enum class Run : int { kIdle, kRunning, kCancelled };
  struct Settings {
    double guidance;
    std::vector<double> times;
    Solver solver;
    LeapOptions leap;
    int64_t merge_steps;
  };
  struct Step {
    double time, wall_ms;
    bool merged;
  };
  struct Stage {
    double wall_ms = 0.0;
    ChainStats chains;  // without blocks: it did not run
  };
  struct ActiveScope {  // at its end no chain is the active one
    explicit ActiveScope(VideoSession* owner) : session(owner) {}
    ~ActiveScope() {
      const std::lock_guard<std::mutex> lock(session->mutex_);
      session->active_ = nullptr;
    }
    VideoSession* const session;
  };
  struct Part {  // of a bundle: a chain, and what it is called
    VideoStage stage;
    const char* name;
    const Chain* chain;
  };

  Status settings(const VideoRun& run, Settings* settings) const;
  Status check_tokens(std::span<const int64_t> tokens) const;
  Status open_chain(const Part& part, int64_t reserve_bytes, const VideoRun* run, std::unique_ptr<BlockLoader>* loader,
                    int64_t* limit_bytes);
  Status budget(int64_t reserve_bytes, int64_t* bytes) const;
  Status of_limit(const Part& part, int64_t budget_bytes, Status status) const;
  Status restore(std::span<const uint8_t> state, const Settings& settings);
  Status progress(const VideoRun& run, VideoStage stage, int64_t done, int64_t total, double time) const;
  Status encode(std::span<const int64_t> tokens, const VideoRun& run);
  Status denoise(const VideoRun& run, const Settings& settings);
  Status evaluate(BlockLoader* loader, double time, bool merged, double guidance, bool more_follow);
  void advance(const Settings& settings, double time, double following, bool leaps);
  Status decode(const VideoRun& run);
  Status decode_time(const VideoRun& run, Value* pictures);
  Status decode_frames(const VideoRun& run, const Value& pictures);
  Status generate_running(std::span<const int64_t> tokens, const VideoRun& run);
  template <typename Body>
  Status with_chain(const Part& part, int64_t reserve_bytes, const VideoRun& run, const Body& body);

  // The latent, its two copies, and the velocities of this step and of the one before.
  int64_t denoising_bytes() const { return 5 * int64_t{sizeof(float)} * bundle_.latent_elements(); }
  Part encoder() const { return {VideoStage::kEncode, "text_encoder", &bundle_.text_encoder}; }
  Part denoiser() const { return {VideoStage::kDenoise, "denoiser", &bundle_.denoiser}; }
  Part time_decoder() const { return {VideoStage::kDecode, "time_decoder", &bundle_.time_decoder}; }
  Part frame_decoder() const { return {VideoStage::kDecode, "frame_decoder", &bundle_.frame_decoder}; }

  VideoBundle bundle_;
  VideoOptions options_;
  ThreadPoolHold threads_;
  std::atomic<Run> run_{Run::kIdle};
  mutable std::mutex mutex_;  // of what other threads ask for: the three below
  BlockLoader* active_ = nullptr;
  int64_t active_base_bytes_ = 0;  // of the process, outside of the active chain's budget
  int64_t memory_limit_bytes_ = 0;

  std::vector<float> x_, velocity_, previous_velocity_;  // [C, T, h, w]; the last is empty where nothing looks back
  double previous_time_ = 0.0;
  Value y_;  // [1, n, caption channels]
  std::optional<LeapRule> rule_;
  int64_t next_step_ = 0, evaluations_ = 0;
  bool has_state_ = false;
  double begin_ms_ = 0.0;
  std::vector<Step> steps_;
  Stage stages_[3];
};

}  // namespace edgerun
