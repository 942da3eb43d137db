#include "csrc/runner/video.h"

#include <csignal>
#include <cstdio>
#include <cstring>
#include <memory>

#include "csrc/base/json.h"
#include "csrc/runner/support.h"

namespace edgerun::runner {

namespace {

volatile std::sig_atomic_t stopped = 0;

void stop(int) { stopped = 1; }
int32_t is_stopped(void*) { return stopped; }
// user: the VideoRequest.
int32_t is_stopped_at(const edgerun_video_progress* progress, void* user) {
  static constexpr const char* kStages[] = {"encode", "denoise", "decode"};
  const auto& request = *static_cast<const VideoRequest*>(user);
  if (progress->stage > request.stop_after) return 1;
  if (request.progress) {
    std::fprintf(stderr, "progress %s %lld %lld %lld %.9g %.3f\n", kStages[progress->stage],
                 static_cast<long long>(progress->done), static_cast<long long>(progress->total),
                 static_cast<long long>(progress->evaluations), progress->time, progress->elapsed_ms);
  }
  return stopped;
}

bool parse_leap(const std::string& option, const std::string& value, edgerun_video_generate_options* options) {
  const size_t colon = value.find(':');
  const std::string kind = value.substr(0, colon);
  const std::string rest = colon == std::string::npos ? "" : value.substr(colon + 1);
  if (value == "none") {
    options->leap = EDGERUN_VIDEO_LEAP_NONE;
    return true;
  }
  if (kind == "fixed" && !rest.empty()) {
    options->leap = EDGERUN_VIDEO_LEAP_FIXED;
    return parse_number(option, rest, &options->leap_evaluations);
  }
  const size_t first = rest.find(','), second = first == std::string::npos ? first : rest.find(',', first + 1);
  if (kind != "cosine" || second == std::string::npos) {
    return fail(option + " is '" + value +
                "'; it must be none, fixed:EVALUATIONS or "
                "cosine:LATEST_TIME,TOLERANCE,PATIENCE");
  }
  options->leap = EDGERUN_VIDEO_LEAP_COSINE;
  return parse_number(option, rest.substr(0, first), &options->leap_latest_time) &&
         parse_number(option, rest.substr(first + 1, second - first - 1), &options->leap_tolerance) &&
         parse_number(option, rest.substr(second + 1), &options->leap_patience);
}

bool parse_solver(const std::string& option, const std::string& value, edgerun_video_solver* solver) {
  if (value == "euler") return *solver = EDGERUN_VIDEO_SOLVER_EULER, true;
  if (value == "ab2") return *solver = EDGERUN_VIDEO_SOLVER_AB2, true;
  return fail(option + " is '" + value + "'; it must be euler or ab2");
}

bool parse_stage(const std::string& option, const std::string& value, int* stage) {
  if (value == "encode") return *stage = EDGERUN_VIDEO_ENCODE, true;
  if (value == "denoise") return *stage = EDGERUN_VIDEO_DENOISE, true;
  return fail(option + " is '" + value + "'; it must be encode or denoise");
}

// A run that stops early leaves its state, and nothing that a later stage makes.
bool check_stop(const VideoRequest& request) {
  if (request.stop_after == EDGERUN_VIDEO_DECODE) return true;
  if (request.state_out.empty()) return fail("--stop-after needs --state-out, where the run is saved");
  const bool encode = request.stop_after == EDGERUN_VIDEO_ENCODE;
  if (request.frames_path.empty() && (!encode || request.latent_path.empty())) return true;
  return fail(std::string("--stop-after ") + (encode ? "encode" : "denoise") + " ends before " +
              (request.frames_path.empty() ? "the latent is made: leave --latent-out out"
                                           : "frames are made: leave --frames-out out"));
}

bool parse_times(const std::string& option, std::string_view text, std::vector<double>* times) {
  while (!text.empty()) {
    const size_t comma = std::min(text.find(','), text.size());
    if (!parse_number(option, text.substr(0, comma), &times->emplace_back())) return false;
    text.remove_prefix(std::min(comma + 1, text.size()));
  }
  return true;
}

// *saved: there was a state, and a place for it.
bool save_state(edgerun_video_session* session, const VideoRequest& request, bool* saved) {
  const void* state = nullptr;
  size_t bytes = 0;
  if (edgerun_video_session_state(session, &state, &bytes) != EDGERUN_OK) return failed_call();
  *saved = !request.state_out.empty() && bytes > 0;
  return !*saved || write_file(request.state_out, state, bytes);
}

}  // namespace

bool parse_video(const std::string& option, const char* value, VideoRequest* request, bool* known) {
  edgerun_video_generate_options& generate = request->generate;
  if (option == "--frames-out") return request->frames_path = value, true;
  if (option == "--latent-out") return request->latent_path = value, true;
  if (option == "--noise-file") return request->noise_path = value, true;
  if (option == "--state-out") return request->state_out = value, true;
  if (option == "--stop-after") return parse_stage(option, value, &request->stop_after);
  if (option == "--state-in") return request->state_in = value, true;
  if (option == "--memory-limit") return parse_bytes(option, value, &request->session.memory_limit_bytes);
  if (option == "--prefetch") return parse_number(option, value, &request->session.prefetch);
  if (option == "--guidance") return parse_number(option, value, &generate.guidance);
  if (option == "--times") return parse_times(option, value, &request->times);
  if (option == "--solver") return parse_solver(option, value, &generate.solver);
  if (option == "--leap") return parse_leap(option, value, &generate);
  if (option == "--merge-steps") return parse_number(option, value, &generate.merge_steps);
  return *known = false;
}

bool run_video(const VideoRequest& request) {
  if (!check_stop(request)) return false;
  std::string noise, state;
  if (!request.noise_path.empty() && !read_file("--noise-file", request.noise_path, &noise)) return false;
  if (!request.state_in.empty() && !read_file("--state-in", request.state_in, &state)) return false;
  edgerun_video_session* session = nullptr;
  if (edgerun_video_session_open(request.bundle.c_str(), &request.session, &session) != EDGERUN_OK) {
    return failed_call();
  }
  const std::unique_ptr<edgerun_video_session, void (*)(edgerun_video_session*)> owner(session,
                                                                                       edgerun_video_session_close);
  edgerun_video_info info = {};
  info.struct_bytes = sizeof(info);
  if (edgerun_video_session_info(session, &info) != EDGERUN_OK) return failed_call();

  std::vector<float> noise_values(noise.size() / sizeof(float));
  std::memcpy(noise_values.data(), noise.data(), noise_values.size() * sizeof(float));
  std::vector<float> latent(
      static_cast<size_t>(info.channels * info.latent_frames * info.latent_height * info.latent_width));
  std::vector<uint8_t> frames;
  if (!request.frames_path.empty()) frames.resize(static_cast<size_t>(info.frames * info.height * info.width * 3));
  edgerun_video_generate_options options = request.generate;
  options.noise = noise_values.empty() ? nullptr : noise_values.data();
  options.noise_count = noise_values.size();
  options.times = request.times.empty() ? nullptr : request.times.data();
  options.time_count = request.times.size();
  options.state = state.empty() ? nullptr : state.data();
  options.state_bytes = state.size();
  options.latent_out = latent.data();
  options.frames_out = frames.empty() ? nullptr : frames.data();
  options.on_block = is_stopped;
  std::signal(SIGINT, stop);
  std::signal(SIGTERM, stop);
  edgerun_video_result result = {};
  result.struct_bytes = sizeof(result);
  if (edgerun_video_session_generate(session, request.tokens.data(), request.tokens.size(), &options, is_stopped_at,
                                     const_cast<VideoRequest*>(&request), &result) != EDGERUN_OK) {
    return failed_call();
  }
  if (result.cancelled != 0 || request.stop_after != EDGERUN_VIDEO_DECODE) {
    bool saved = false;
    if (!save_state(session, request, &saved)) return false;
    if (result.cancelled != 0 && stopped != 0) {
      return fail(saved ? "cancelled; go on with --state-in " + request.state_out : "cancelled; nothing was written");
    }
  }
  const char* run = nullptr;
  if (edgerun_video_session_report(session, &run) != EDGERUN_OK) return failed_call();
  json::Writer json;
  json.begin_object().key("schema_version").value(1).key("kind").value("video").key("bundle").value(request.bundle);
  json.key("build").value(info.build);
  write_device(info.threads, &json);
  json.key("frames").begin_array().value(info.frames).value(info.height).value(info.width).value(3).end_array();
  json.key("latent").begin_array().value(info.channels).value(info.latent_frames);
  json.value(info.latent_height).value(info.latent_width).end_array();
  json.key("fps").value(info.fps).key("run").raw(run).end_object();
  const auto wrote = [](const std::string& path, const void* data, size_t bytes) {
    return path.empty() || write_file(path, data, bytes);
  };
  return wrote(request.frames_path, frames.data(), frames.size()) &&
         wrote(request.latent_path, latent.data(), latent.size() * sizeof(float)) &&
         write_report(request.report_path, json.text());
}

}  // namespace edgerun::runner
