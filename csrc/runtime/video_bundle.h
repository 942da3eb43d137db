// video_bundle: what manifest.json says of a video bundle.
//
//   "kind": "video", "build": …, "files": {…} as for text
//   "programs": [{"name", "file", "target", "operators": ["namespace::name"],
//                 "inputs": [{"name", "dtype", "shape": [1, "n"], "limits": {"n": [1, 300]}}], "outputs": [the same],
//                 "arena_bytes": most that XNNPACK takes while it executes, "table_bytes": what XNNPACK keeps of it
//                 from its first execution on (both optional)}]
//   "chains": {"text_encoder": [names of programs], "denoiser": […], "time_decoder": […], "frame_decoder": […]}
//   "video": {"frames", "height", "width", "fps", "latent": {"channels", "frames", "height", "width"},
//             "guidance", "times": [from 1 down], "solver": "euler" | "ab2" (optional), "rotary": {"frequencies": [head size / 2 numbers]} (with merging),
//             "leap": {"kind": "none" | "fixed" | "cosine", "evaluations", "latest_time", "tolerance", "patience"},
//             "merge": {"steps": merged ones, from the first, "matrix": T' × T, "unmerge": T × T', "positions": T'},
//             "decoder": {"latents_per_chunk", "frames_per_chunk", "frames_per_call"}}
//
// A chain's programs run one after another on named values. What a session gives, and what it takes:
//
//   text_encoder  tokens int64 [1, n]                                             → y [1, n, caption channels]
//   denoiser      x [2, C, T, h, w] (the latent, twice), time [2], fps [2], y;
//                 where a program names them: merge [T', T], unmerge [T, T'],
//                 cosines and sines [T', head size]                               → v [2, C, T, h, w]
//   time_decoder  z [1, C, t, h, w], t up to latents_per_chunk                    → chunk [f, c, h', w']
//   frame_decoder pictures [n, c, h', w'], n up to frames_per_call                → frames [3, n, H, W] in [-1, 1]
//
// The first of the two is the prompt's, the second that of no caption, whose features the denoiser holds itself. A step
// without merging has T' = T and identities. Of a chunk's f frames the last frames_per_chunk (or what the video still
// lacks) are kept: the others come from what a causal decoder was given in front. They are the pictures, from which a
// few frames at a time are decoded: so many decide how much memory that takes, and nothing else.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "csrc/base/status.h"
#include "csrc/runtime/block_program.h"

namespace edgerun {

enum class Solver : int { kEuler = 0, kAdamsBashforth2 = 1 };

enum class LeapKind : int { kNone = 0, kFixed = 1, kCosine = 2 };

struct LeapOptions {
  LeapKind kind = LeapKind::kNone;
  int64_t evaluations = 0;   // fixed: leap after so many
  double latest_time = 0.5;  // cosine: no leap while the time is above it
  double tolerance = 1e-3;   // cosine: what counts as an improvement
  int64_t patience = 3;      // cosine: leap after so many steps without one
};

// kInvalidArgument when an option is out of its range.
Status check(const LeapOptions& options);

struct MergeMatrices {
  int64_t merged = 0;            // T'
  std::vector<float> merge;      // [T', T]
  std::vector<float> unmerge;    // [T, T']
  std::vector<float> positions;  // [T']
};

struct Chain {
  std::vector<ChainProgram> programs;
  int64_t value_bytes = 0;                       // of all values at once, at their largest
  std::array<int64_t, 2> token_limits = {1, 0};  // of the input "tokens"
  int64_t head_size = 0;                         // of the input "cosines"; 0: there is none
  int64_t picture_bytes = 0;                     // of one of the input "pictures"; 0: there is none
};

struct VideoBundle {
  std::string path, build;
  Chain text_encoder, denoiser, time_decoder, frame_decoder;
  int64_t frames = 0, height = 0, width = 0;
  double fps = 0.0;
  int64_t channels = 0, latent_frames = 0, latent_height = 0, latent_width = 0;
  double guidance = 1.0;
  std::vector<double> times;
  Solver solver = Solver::kEuler;
  std::vector<float> rotary_frequencies;  // [head size / 2]
  LeapOptions leap;
  int64_t merge_steps = 0;
  MergeMatrices merge;  // empty: the bundle has none
  int64_t latents_per_chunk = 0, frames_per_chunk = 0, frames_per_call = 0;

  int64_t latent_elements() const { return channels * latent_frames * latent_height * latent_width; }
  int64_t frame_bytes() const { return 3 * frames * height * width; }
  int64_t picture_bytes() const { return frames * frame_decoder.picture_bytes; }  // of all of the clip
  int64_t chunks() const { return (latent_frames - 1) / latents_per_chunk + 1; }
  int64_t frame_calls() const { return (frames - 1) / frames_per_call + 1; }
};

// With `verify`, the programs' sha256 are compared too. kNotFound, kCorrupt as for a text bundle; kCorrupt also when
// a chain takes a value that nothing gives, or does not give what the session takes.
Status read_video_bundle(const std::string& path, bool verify, VideoBundle* bundle);

}  // namespace edgerun
