// edgerun-runner: a bundle and token ids in, a JSON report out. What runs on a board: no Python, nothing to install.
#include <cstdio>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "csrc/base/json.h"
#include "csrc/bindings/c_api.h"
#include "csrc/runner/support.h"
#include "csrc/runner/video.h"
#include "csrc/runtime/bundle_files.h"

namespace {

using namespace edgerun::runner;
namespace json = edgerun::json;

constexpr char kHelp[] = R"(usage: edgerun-runner BUNDLE (--tokens 1,2,3 | --tokens-file F) [options]

Runs a text or a video bundle on this machine and prints a JSON report.

  --tokens IDS          the prompt: token ids, separated by commas
  --tokens-file F       the prompt: a file of decimal token ids, separated by white space
  --seed S              of the sampling, or of the noise (0)
  --threads N           0: as many as the processor has good cores (0)
  --report F            write the report to F instead of the standard output
  --no-verify           do not compare the programs' sha256 with the manifest's
  --describe            print what this machine is, as JSON, and nothing else
  --version             print the version

Text:
  --max-new-tokens N    tokens to generate (128)
  --temperature T       0: greedy (0)
  --top-k K             only the K likeliest tokens; 0: all (0)
  --top-p P             only the likeliest tokens that make up P; 1: all (1)
  --stop IDS            stop at these tokens instead of the bundle's end tokens; '' for none
  --force-file F        feed these token ids one at a time after the prompt instead of sampled ones
  --logits-out RAW      float32 rows [forced + 1, vocabulary] in this machine's byte order (with --force-file, or alone)

Video:
  --frames-out RAW      uint8 [frames, height, width, 3]
  --latent-out RAW      float32 [channels, latent frames, height, width] in this machine's byte order
  --noise-file RAW      of the same shape, instead of the seed's
  --memory-limit SIZE   for all that this process has in RAM, as 900MB or 1GiB; programs stream through what it leaves
  --prefetch N          programs to load while one executes; 0: none (1)
  --guidance G          instead of the bundle's
  --times T,T,...       of the diffusion, from 1 down, instead of the bundle's
  --solver NAME         euler or ab2 (second-order steps), instead of the bundle's
  --leap KIND           none, fixed:EVALUATIONS or cosine:LATEST_TIME,TOLERANCE,PATIENCE, instead of the bundle's
  --merge-steps N       first steps with merged frames, instead of the bundle's
  --state-out F         where a run that SIGINT, SIGTERM or --stop-after ends is saved
  --stop-after STAGE    encode or denoise: run no later stage; text features and latent are in --state-out
  --state-in F          go on from there; the prompt is not read then
  --progress            say each prompt, step and chunk of latents on the standard error as it begins, in a line:
                        progress STAGE DONE TOTAL EVALUATIONS TIME ELAPSED_MS

Exit status: 0 good, 2 bad usage or input, with one line on the standard error.
)";

struct Request {
  std::string bundle, report_path, logits_path;
  std::vector<int64_t> tokens, stop, forced;
  bool has_tokens = false, has_stop = false, has_forced = false;
  edgerun_session_options session = edgerun_session_options_default();
  edgerun_generate_options generate = edgerun_generate_options_default();
  VideoRequest video;
  std::string text_option, video_option;  // the first of those that only one kind of bundle has
};

// Options of both kinds of bundles. *known: it is one of them.
bool parse_common(const std::string& option, const char* value, Request* request, bool* known) {
  if (option == "--tokens") return request->has_tokens = parse_ids(option, value, ",", &request->tokens);
  if (option == "--tokens-file") return request->has_tokens = read_ids(option, value, &request->tokens);
  if (option == "--seed") return parse_number(option, value, &request->generate.seed);
  if (option == "--threads") return parse_number(option, value, &request->session.threads);
  if (option == "--report") return request->report_path = value, true;
  return *known = false;
}

bool parse_text(const std::string& option, const char* value, Request* request, bool* known) {
  edgerun_generate_options& generate = request->generate;
  if (option == "--stop") return request->has_stop = parse_ids(option, value, ",", &request->stop);
  if (option == "--force-file") return request->has_forced = read_ids(option, value, &request->forced);
  if (option == "--max-new-tokens") return parse_number(option, value, &generate.max_new_tokens);
  if (option == "--temperature") return parse_number(option, value, &generate.temperature);
  if (option == "--top-k") return parse_number(option, value, &generate.top_k);
  if (option == "--top-p") return parse_number(option, value, &generate.top_p);
  if (option == "--logits-out") return request->logits_path = value, true;
  return *known = false;
}

bool parse_option(const std::string& option, const char* value, Request* request) {
  bool known = true;
  const bool common = parse_common(option, value, request, &known);
  if (known) return common;
  known = true;
  const bool text = parse_text(option, value, request, &known);
  if (known && request->text_option.empty()) request->text_option = option;
  if (known) return text;
  known = true;
  const bool video = parse_video(option, value, &request->video, &known);
  if (known && request->video_option.empty()) request->video_option = option;
  return known ? video : fail("unknown option " + option + ": see --help");
}

bool parse_arguments(int count, char** values, Request* request) {
  for (int i = 1; i < count; ++i) {
    const std::string argument = values[i];
    if (argument == "--no-verify") {
      request->session.verify = 0;
    } else if (argument == "--progress") {
      request->video.progress = true;
      if (request->video_option.empty()) request->video_option = argument;
    } else if (argument.rfind("--", 0) != 0) {
      if (!request->bundle.empty())
        return fail("two bundles, '" + request->bundle + "' and '" + argument + "': give one");
      request->bundle = argument;
    } else if (i + 1 == count) {
      return fail(argument + " needs a value: see --help");
    } else if (!parse_option(argument, values[++i], request)) {
      return false;
    }
  }
  if (request->bundle.empty()) return fail("no bundle given: see --help");
  return true;
}

void write_stats(const edgerun_stats& stats, json::Writer* json) {
  json->key("stats").begin_object();
  json->key("prompt_tokens").value(stats.prompt_tokens).key("generated_tokens").value(stats.generated_tokens);
  json->key("model_load_start_ms").value(stats.model_load_start_ms);
  json->key("model_load_end_ms").value(stats.model_load_end_ms);
  json->key("inference_start_ms").value(stats.inference_start_ms);
  json->key("inference_end_ms").value(stats.inference_end_ms);
  json->key("prompt_eval_end_ms").value(stats.prompt_eval_end_ms);
  json->key("first_token_ms").value(stats.first_token_ms);
  json->key("aggregate_sampling_time_ms").value(stats.aggregate_sampling_time_ms).end_object();
  json->key("peak_rss_bytes");
  stats.peak_rss_bytes < 0 ? json->null() : json->value(stats.peak_rss_bytes);
  json->key("attended_pairs").value(stats.attended_pairs).key("causal_pairs").value(stats.causal_pairs);
}

int describe() {
  json::Writer json;
  json.begin_object().key("version").value(edgerun_version());
  write_device(edgerun_threads(), &json);
  return std::printf("%s\n", json.end_object().text().c_str()) < 0 ? 2 : 0;
}

int32_t keep_token(int64_t token, void* tokens) {
  static_cast<std::vector<int64_t>*>(tokens)->push_back(token);
  return 0;
}

bool run_text(Request request) {
  edgerun_text_session* session = nullptr;
  if (edgerun_text_session_open(request.bundle.c_str(), &request.session, &session) != EDGERUN_OK) {
    return failed_call();
  }
  const std::unique_ptr<edgerun_text_session, void (*)(edgerun_text_session*)> owner(session,
                                                                                     edgerun_text_session_close);
  edgerun_session_info info = {};
  info.struct_bytes = sizeof(info);
  if (edgerun_text_session_info(session, &info) != EDGERUN_OK) return failed_call();
  std::vector<float> logits;
  if (!request.logits_path.empty()) {
    logits.resize((request.forced.size() + 1) * static_cast<size_t>(info.vocab_size));
    request.generate.logits_out = logits.data();
  }
  request.generate.has_stop_ids = request.has_stop;
  request.generate.stop_ids = request.stop.data();
  request.generate.stop_count = request.stop.size();
  request.generate.forced_ids = request.forced.data();
  request.generate.forced_count = request.forced.size();
  std::vector<int64_t> tokens;
  edgerun_generate_result result = {};
  result.struct_bytes = sizeof(result);
  result.stats.struct_bytes = sizeof(result.stats);
  if (edgerun_text_session_generate(session, request.tokens.data(), request.tokens.size(), &request.generate,
                                    keep_token, &tokens, &result) != EDGERUN_OK) {
    return failed_call();
  }
  json::Writer json;
  json.begin_object().key("schema_version").value(1).key("bundle").value(request.bundle);
  json.key("build").value(info.build);
  write_device(info.threads, &json);
  write_stats(result.stats, &json);
  json.key("tokens").begin_array();
  for (const int64_t token : tokens) json.value(token);
  static constexpr const char* kFinishes[] = {"length", "eos", "stop", "cancelled"};
  json.end_array().key("finish").value(kFinishes[result.finish]).end_object();
  if (!logits.empty() && !write_file(request.logits_path, logits.data(), logits.size() * sizeof(float))) return false;
  return write_report(request.report_path, json.text());
}

// The manifest decides what a bundle is; options that belong to the other kind are refused.
bool run(Request request) {
  json::Value manifest;
  if (const edgerun::Status status = edgerun::read_manifest(request.bundle, &manifest); !status.ok()) {
    return fail(status.message());
  }
  std::string kind;
  const bool is_video = manifest.get("kind").as(&kind) && kind == "video";
  const std::string& foreign = is_video ? request.text_option : request.video_option;
  if (!foreign.empty()) return fail(foreign + " is no option for a bundle of kind '" + kind + "': see --help");
  if (!is_video) {
    if (!request.has_tokens) return fail("no prompt given: use --tokens or --tokens-file");
    if (request.has_forced && request.logits_path.empty()) return fail("--force-file needs --logits-out");
    return run_text(std::move(request));
  }
  if (!request.has_tokens && request.video.state_in.empty()) {
    return fail("no prompt given: use --tokens or --tokens-file");
  }
  request.video.bundle = request.bundle;
  request.video.report_path = request.report_path;
  request.video.tokens = std::move(request.tokens);
  request.video.session.verify = request.session.verify;
  request.video.session.threads = request.session.threads;
  request.video.generate.seed = request.generate.seed;
  return run_video(request.video);
}

}  // namespace

int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    const std::string_view argument = argv[i];
    if (argument == "--help" || argument == "-h") return std::fputs(kHelp, stdout) < 0 ? 2 : 0;
    if (argument == "--version") return std::printf("edgerun-runner %s\n", edgerun_version()) < 0 ? 2 : 0;
    if (argument == "--describe") return describe();
  }
  Request request;
  return parse_arguments(argc, argv, &request) && run(std::move(request)) ? 0 : 2;
}
