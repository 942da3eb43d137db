#include "csrc/bindings/c_api.h"

#include <memory>
#include <string>

#include "csrc/bindings/c_api_support.h"
#include "csrc/runtime/executorch_log.h"
#include "csrc/runtime/process_memory.h"
#include "csrc/runtime/text_session.h"
#include "csrc/runtime/thread_pool.h"

#ifndef EDGERUN_VERSION
#define EDGERUN_VERSION "unknown"
#endif

struct edgerun_text_session {
  std::unique_ptr<edgerun::TextSession> session;
};

namespace {

using edgerun::Status;

using edgerun::c_api::give;
using edgerun::c_api::guarded;
using edgerun::c_api::invalid;
using edgerun::c_api::take;

edgerun_stats stats_of(const edgerun::TextSession& session) {
  const edgerun::SessionStats& stats = session.stats();
  return {sizeof(edgerun_stats),     stats.prompt_tokens,
          stats.generated_tokens,    stats.model_load_start_ms,
          stats.model_load_end_ms,   stats.inference_start_ms,
          stats.inference_end_ms,    stats.prompt_eval_end_ms,
          stats.first_token_ms,      stats.aggregate_sampling_time_ms,
          edgerun::peak_rss_bytes(), stats.attended_pairs,
          stats.causal_pairs};
}

Status generate(edgerun_text_session* session, const int64_t* ids, size_t count, const edgerun_generate_options* given,
                edgerun_token_callback on_token, void* user, edgerun_generate_result* result) {
  if (session == nullptr || (ids == nullptr && count > 0)) return invalid("session or ids is null");
  edgerun_generate_options options = edgerun_generate_options_default();
  if (Status status = take(given, &options); !status.ok()) return status;
  if ((options.stop_ids == nullptr && options.stop_count > 0) ||
      (options.forced_ids == nullptr && options.forced_count > 0)) {
    return invalid("stop_ids or forced_ids is null, but its count is not 0");
  }
  edgerun::GenerateOptions run;
  run.max_new_tokens = options.max_new_tokens;
  run.sampler = {options.temperature, options.top_k, options.top_p, options.seed};
  if (options.has_stop_ids != 0) run.stop_ids.emplace(options.stop_ids, options.stop_ids + options.stop_count);
  run.forced = {options.forced_ids, options.forced_count};
  run.logits_out = options.logits_out;
  if (on_token != nullptr) run.on_token = [&](int64_t token) { return on_token(token, user) == 0; };
  if (options.on_step != nullptr) run.keep_going = [&] { return options.on_step(user) == 0; };
  edgerun::Finish finish = edgerun::Finish::kLength;
  if (Status status = session->session->generate({ids, count}, run, &finish); !status.ok()) return status;
  return give(edgerun_generate_result{0, static_cast<edgerun_finish>(finish), stats_of(*session->session)}, result);
}

}  // namespace

int32_t edgerun_api_version(void) { return EDGERUN_API_VERSION; }

const char* edgerun_version(void) { return EDGERUN_VERSION; }

int64_t edgerun_threads(void) {
  const edgerun::ExecutorchLog log;
  return edgerun::pool_threads();
}

const char* edgerun_last_error(void) { return edgerun::c_api::last_error.c_str(); }

edgerun_session_options edgerun_session_options_default(void) { return {sizeof(edgerun_session_options), 1, 0}; }

edgerun_generate_options edgerun_generate_options_default(void) {
  edgerun_generate_options options = {};
  options.struct_bytes = sizeof(options);
  options.max_new_tokens = 128;
  options.top_p = 1.0f;
  return options;
}

edgerun_status edgerun_text_session_open(const char* bundle_path, const edgerun_session_options* options,
                                         edgerun_text_session** session) {
  return guarded([&]() -> Status {
    if (bundle_path == nullptr || session == nullptr) return invalid("bundle_path or session is null");
    edgerun_session_options taken = edgerun_session_options_default();
    if (Status status = take(options, &taken); !status.ok()) return status;
    auto opened = std::make_unique<edgerun_text_session>();
    const edgerun::SessionOptions session_options = {taken.verify != 0, taken.threads};
    Status status = edgerun::TextSession::open(bundle_path, session_options, &opened->session);
    if (status.ok()) *session = opened.release();
    return status;
  });
}

void edgerun_text_session_close(edgerun_text_session* session) { delete session; }

edgerun_status edgerun_text_session_generate(edgerun_text_session* session, const int64_t* ids, size_t count,
                                             const edgerun_generate_options* options, edgerun_token_callback on_token,
                                             void* user, edgerun_generate_result* result) {
  return guarded([&] { return generate(session, ids, count, options, on_token, user, result); });
}

edgerun_status edgerun_text_session_forward(edgerun_text_session* session, const int64_t* ids, size_t count,
                                            int64_t input_pos, float* logits_out) {
  return guarded([&] {
    if (session == nullptr || (ids == nullptr && count > 0)) return invalid("session or ids is null");
    return session->session->forward({ids, count}, input_pos, logits_out);
  });
}

edgerun_status edgerun_text_session_reset(edgerun_text_session* session) {
  return guarded([&] { return session == nullptr ? invalid("session is null") : session->session->reset(); });
}

void edgerun_text_session_cancel(edgerun_text_session* session) {
  if (session != nullptr) session->session->cancel();
}

edgerun_status edgerun_text_session_info(const edgerun_text_session* session, edgerun_session_info* info) {
  return guarded([&] {
    if (session == nullptr || info == nullptr) return invalid("session or info is null");
    const edgerun::BundleInfo& bundle = session->session->info();
    return give(edgerun_session_info{0, bundle.vocab_size, bundle.max_context, bundle.prefill_slice,
                                     session->session->cached_tokens(), edgerun::pool_threads(), bundle.build.c_str()},
                info);
  });
}

edgerun_status edgerun_text_session_stats(const edgerun_text_session* session, edgerun_stats* stats) {
  return guarded([&] {
    if (session == nullptr || stats == nullptr) return invalid("session or stats is null");
    return give(stats_of(*session->session), stats);
  });
}
