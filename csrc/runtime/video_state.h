// video_state: a run that stopped, as bytes: "EDGERUNV", a version, then fields in this machine's byte order.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "csrc/base/status.h"
#include "csrc/runtime/video_sampling.h"

namespace edgerun {

struct VideoState {
  std::string build;  // of the bundle
  int64_t next_step = 0, evaluations = 0;
  std::vector<float> x;  // the latent before that step
  std::vector<int64_t> y_sizes;
  std::vector<float> y;                  // text features
  double previous_time = 0.0;            // of the last evaluation, with the next one; only where a solver looks back
  std::vector<float> previous_velocity;  // as x, or empty
  LeapRule::State leap;
};

std::vector<uint8_t> pack_state(const VideoState& state);
// kInvalidArgument for anything that pack_state did not write.
Status unpack_state(std::span<const uint8_t> bytes, VideoState* state);

}  // namespace edgerun
