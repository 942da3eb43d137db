#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "csrc/bindings/c_api_support.h"
#include "csrc/runtime/thread_pool.h"
#include "csrc/runtime/video_session.h"

struct edgerun_video_session {
  std::unique_ptr<edgerun::VideoSession> session;
  std::vector<uint8_t> state;
  std::string report;
};

namespace {

using edgerun::LeapKind;
using edgerun::Status;
using edgerun::c_api::give;
using edgerun::c_api::guarded;
using edgerun::c_api::invalid;
using edgerun::c_api::take;

Status generate(edgerun_video_session* session, const int64_t* ids, size_t count,
                const edgerun_video_generate_options* given, edgerun_video_callback on_progress, void* user,
                edgerun_video_result* result) {
  if (session == nullptr || (ids == nullptr && count > 0)) return invalid("session or ids is null");
  edgerun_video_generate_options options = edgerun_video_generate_options_default();
  if (Status status = take(given, &options); !status.ok()) return status;
  if ((options.noise == nullptr && options.noise_count > 0) || (options.times == nullptr && options.time_count > 0) ||
      (options.state == nullptr && options.state_bytes > 0)) {
    return invalid("noise, times or state is null, but its count is not 0");
  }
  edgerun::VideoRun run;
  if (!std::isnan(options.guidance)) run.guidance = options.guidance;
  run.seed = options.seed;
  run.noise = {options.noise, options.noise_count};
  if (options.times != nullptr) run.times.emplace(options.times, options.times + options.time_count);
  if (options.solver != EDGERUN_VIDEO_SOLVER_BUNDLE) {
    if (options.solver < EDGERUN_VIDEO_SOLVER_EULER || options.solver > EDGERUN_VIDEO_SOLVER_AB2) {
      return invalid("solver is none of edgerun_video_solver");
    }
    run.solver = static_cast<edgerun::Solver>(options.solver);
  }
  if (options.leap != EDGERUN_VIDEO_LEAP_BUNDLE) {
    if (options.leap < EDGERUN_VIDEO_LEAP_NONE || options.leap > EDGERUN_VIDEO_LEAP_COSINE) {
      return invalid("leap is none of edgerun_video_leap");
    }
    run.leap = {static_cast<LeapKind>(options.leap), options.leap_evaluations, options.leap_latest_time,
                options.leap_tolerance, options.leap_patience};
  }
  if (options.merge_steps != -1) run.merge_steps = options.merge_steps;
  run.state = {static_cast<const uint8_t*>(options.state), options.state_bytes};
  run.latent_out = options.latent_out;
  run.frames_out = options.frames_out;
  if (on_progress != nullptr) {
    run.on_progress = [&](const edgerun::VideoProgress& progress) {
      const edgerun_video_progress passed = {static_cast<edgerun_video_stage>(progress.stage),
                                             progress.done,
                                             progress.total,
                                             progress.evaluations,
                                             progress.time,
                                             progress.elapsed_ms};
      return on_progress(&passed, user) == 0;
    };
  }
  if (options.on_block != nullptr) run.keep_going = [&] { return options.on_block(user) == 0; };
  bool cancelled = false;
  if (Status status = session->session->generate({ids, count}, run, &cancelled); !status.ok()) return status;
  return give(edgerun_video_result{0, cancelled, session->session->evaluations()}, result);
}

}  // namespace

edgerun_video_options edgerun_video_options_default(void) { return {sizeof(edgerun_video_options), 1, 0, 1, 0}; }

edgerun_video_generate_options edgerun_video_generate_options_default(void) {
  edgerun_video_generate_options options = {};
  options.struct_bytes = sizeof(options);
  options.guidance = std::numeric_limits<double>::quiet_NaN();
  options.leap = EDGERUN_VIDEO_LEAP_BUNDLE;
  const edgerun::LeapOptions leap;
  options.leap_latest_time = leap.latest_time;
  options.leap_tolerance = leap.tolerance;
  options.leap_patience = leap.patience;
  options.merge_steps = -1;
  options.solver = EDGERUN_VIDEO_SOLVER_BUNDLE;
  return options;
}

edgerun_status edgerun_video_session_open(const char* bundle_path, const edgerun_video_options* options,
                                          edgerun_video_session** session) {
  return guarded([&]() -> Status {
    if (bundle_path == nullptr || session == nullptr) return invalid("bundle_path or session is null");
    edgerun_video_options taken = edgerun_video_options_default();
    if (Status status = take(options, &taken); !status.ok()) return status;
    auto opened = std::make_unique<edgerun_video_session>();
    const edgerun::VideoOptions video = {taken.verify != 0, taken.threads, taken.prefetch, taken.memory_limit_bytes};
    Status status = edgerun::VideoSession::open(bundle_path, video, &opened->session);
    if (status.ok()) *session = opened.release();
    return status;
  });
}

void edgerun_video_session_close(edgerun_video_session* session) { delete session; }

edgerun_status edgerun_video_session_generate(edgerun_video_session* session, const int64_t* ids, size_t count,
                                              const edgerun_video_generate_options* options,
                                              edgerun_video_callback on_progress, void* user,
                                              edgerun_video_result* result) {
  return guarded([&] { return generate(session, ids, count, options, on_progress, user, result); });
}

void edgerun_video_session_cancel(edgerun_video_session* session) {
  if (session != nullptr) session->session->cancel();
}

edgerun_status edgerun_video_session_set_memory_limit(edgerun_video_session* session, int64_t bytes) {
  return guarded(
      [&] { return session == nullptr ? invalid("session is null") : session->session->set_memory_limit(bytes); });
}

edgerun_status edgerun_video_session_info(const edgerun_video_session* session, edgerun_video_info* info) {
  return guarded([&] {
    if (session == nullptr || info == nullptr) return invalid("session or info is null");
    const edgerun::VideoBundle& bundle = session->session->bundle();
    return give(edgerun_video_info{0, bundle.frames, bundle.height, bundle.width, bundle.fps, bundle.channels,
                                   bundle.latent_frames, bundle.latent_height, bundle.latent_width,
                                   static_cast<int64_t>(bundle.times.size()), bundle.guidance,
                                   bundle.text_encoder.token_limits[0], bundle.text_encoder.token_limits[1],
                                   edgerun::pool_threads(), bundle.build.c_str()},
                info);
  });
}

edgerun_status edgerun_video_session_state(edgerun_video_session* session, const void** state, size_t* bytes) {
  return guarded([&] {
    if (session == nullptr || state == nullptr || bytes == nullptr) return invalid("session, state or bytes is null");
    session->state = session->session->state();
    *state = session->state.data();
    *bytes = session->state.size();
    return Status();
  });
}

edgerun_status edgerun_video_session_report(edgerun_video_session* session, const char** json) {
  return guarded([&] {
    if (session == nullptr || json == nullptr) return invalid("session or json is null");
    session->report = session->session->report();
    *json = session->report.c_str();
    return Status();
  });
}
