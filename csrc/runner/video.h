// The runner's part for video bundles: token ids in, raw frames and a JSON report out.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "csrc/bindings/c_api.h"

namespace edgerun::runner {

struct VideoRequest {
  std::string bundle, report_path, frames_path, latent_path, noise_path, state_in, state_out;
  std::vector<int64_t> tokens;
  std::vector<double> times;
  bool progress = false;
  int stop_after = EDGERUN_VIDEO_DECODE;  // the last stage to run
  edgerun_video_options session = edgerun_video_options_default();
  edgerun_video_generate_options generate = edgerun_video_generate_options_default();
};

// *known is set to false for an option that is not one of a video's.
bool parse_video(const std::string& option, const char* value, VideoRequest* request, bool* known);
bool run_video(const VideoRequest& request);

}  // namespace edgerun::runner
