// edgerun-runner: a bundle and token ids in, a JSON report out. What runs on a board: no Python, nothing to install.
#include <sys/utsname.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "csrc/base/cpu_features.h"
#include "csrc/base/json.h"
#include "csrc/bindings/c_api.h"

namespace {

constexpr char kHelp[] = R"(usage: edgerun-runner BUNDLE (--tokens 1,2,3 | --tokens-file F) [options]

Runs a text bundle on this machine and prints a JSON report.

  --tokens IDS          the prompt: token ids, separated by commas
  --tokens-file F       the prompt: a file of decimal token ids, separated by white space
  --max-new-tokens N    tokens to generate (128)
  --temperature T       0: greedy (0)
  --top-k K             only the K likeliest tokens; 0: all (0)
  --top-p P             only the likeliest tokens that make up P; 1: all (1)
  --seed S              of the sampling (0)
  --stop IDS            stop at these tokens instead of the bundle's end tokens; '' for none
  --threads N           0: as many as the processor has good cores (0)
  --force-file F        feed these token ids one at a time after the prompt instead of sampled ones
  --logits-out RAW      float32 rows [forced + 1, vocabulary] in this machine's byte order (with --force-file, or alone)
  --report F            write the report to F instead of the standard output
  --no-verify           do not compare the program's sha256 with the manifest's
  --describe            print what this machine is, as JSON, and nothing else
  --version             print the version
Exit status: 0 good, 2 bad usage or input, with one line on the standard error.
)";

struct Request {
  std::string bundle, report_path, logits_path;
  std::vector<int64_t> tokens, stop, forced;
  bool has_tokens = false, has_stop = false, has_forced = false;
  edgerun_session_options session = edgerun_session_options_default();
  edgerun_generate_options generate = edgerun_generate_options_default();
};

bool fail(const std::string& message) {
  std::fprintf(stderr, "edgerun-runner: %s\n", message.c_str());
  return false;
}

template <typename Number>
bool parse_number(const std::string& option, std::string_view text, Number* number) {
  const auto parsed = std::from_chars(text.data(), text.data() + text.size(), *number);
  if (parsed.ec == std::errc() && parsed.ptr == text.data() + text.size()) return true;
  return fail(option + " is '" + std::string(text) + "'; it must be a number: see --help");
}

bool parse_ids(const std::string& option, std::string_view text, std::string_view separators,
               std::vector<int64_t>* ids) {
  for (size_t at = 0; (at = text.find_first_not_of(separators, at)) != std::string_view::npos;) {
    const size_t end = std::min(text.find_first_of(separators, at), text.size());
    if (!parse_number(option, text.substr(at, end - at), &ids->emplace_back())) return false;
    at = end;
  }
  return true;
}

bool read_ids(const std::string& option, const char* path, std::vector<int64_t>* ids) {
  std::ifstream file(path, std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (!file.is_open() || file.bad()) {
    return fail(option + ": " + path + " cannot be read: " + std::strerror(errno) + "; give a file of token ids");
  }
  return parse_ids(option, text, " \t\r\n", ids);
}

bool parse_option(const std::string& option, const char* value, Request* request) {
  edgerun_generate_options& generate = request->generate;
  if (option == "--tokens") return request->has_tokens = parse_ids(option, value, ",", &request->tokens);
  if (option == "--tokens-file") return request->has_tokens = read_ids(option, value, &request->tokens);
  if (option == "--stop") return request->has_stop = parse_ids(option, value, ",", &request->stop);
  if (option == "--force-file") return request->has_forced = read_ids(option, value, &request->forced);
  if (option == "--max-new-tokens") return parse_number(option, value, &generate.max_new_tokens);
  if (option == "--temperature") return parse_number(option, value, &generate.temperature);
  if (option == "--top-k") return parse_number(option, value, &generate.top_k);
  if (option == "--top-p") return parse_number(option, value, &generate.top_p);
  if (option == "--seed") return parse_number(option, value, &generate.seed);
  if (option == "--threads") return parse_number(option, value, &request->session.threads);
  if (option == "--report") return request->report_path = value, true;
  if (option == "--logits-out") return request->logits_path = value, true;
  return fail("unknown option " + option + ": see --help");
}

bool parse_arguments(int count, char** values, Request* request) {
  for (int i = 1; i < count; ++i) {
    const std::string argument = values[i];
    if (argument == "--no-verify") {
      request->session.verify = 0;
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
  if (!request->has_tokens) return fail("no prompt given: use --tokens or --tokens-file");
  if (request->has_forced && request->logits_path.empty()) return fail("--force-file needs --logits-out");
  return true;
}

// Writes beside the target and moves it there, so that nobody finds half of it.
bool write_file(const std::string& path, const void* data, size_t bytes) {
  const std::string partial = path + ".partial";
  std::FILE* const file = std::fopen(partial.c_str(), "wb");
  bool good = file != nullptr && std::fwrite(data, 1, bytes, file) == bytes;
  if (file != nullptr) good = std::fclose(file) == 0 && good;
  good = good && std::rename(partial.c_str(), path.c_str()) == 0;
  if (good) return true;
  const std::string reason = std::strerror(errno);
  if (file != nullptr) std::remove(partial.c_str());
  return fail(path + " cannot be written: " + reason + "; choose another place");
}

bool failed_call() { return fail(edgerun_last_error()); }

void write_device(int64_t threads, edgerun::json::Writer* json) {
  utsname names = {};
  uname(&names);
  std::string cpu, line;
  for (std::ifstream file("/proc/cpuinfo"); cpu.empty() && std::getline(file, line);) {
    if (line.rfind("model name", 0) == 0) cpu = line.substr(std::min(line.find(": ") + 2, line.size()));
  }
  json->key("device").begin_object();
  json->key("system").value(names.sysname).key("machine").value(names.machine).key("cpu");
  cpu.empty() ? json->null() : json->value(cpu);
  const edgerun::CpuFeatures& features = edgerun::cpu_features();
  const std::pair<const char*, bool> named[] = {{"avx2", features.avx2},
                                                {"avx512", features.avx512},
                                                {"fp16", features.fp16},
                                                {"dotprod", features.dotprod},
                                                {"i8mm", features.i8mm}};
  json->key("features").begin_array();
  for (const auto& [name, present] : named) {
    if (present) json->value(name);
  }
  json->end_array().key("threads").value(threads).end_object();
}

void write_stats(const edgerun_stats& stats, edgerun::json::Writer* json) {
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
  edgerun::json::Writer json;
  json.begin_object().key("version").value(edgerun_version());
  write_device(edgerun_threads(), &json);
  return std::printf("%s\n", json.end_object().text().c_str()) < 0 ? 2 : 0;
}

int32_t keep_token(int64_t token, void* tokens) {
  static_cast<std::vector<int64_t>*>(tokens)->push_back(token);
  return 0;
}

bool run(Request request) {
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
  edgerun::json::Writer json;
  json.begin_object().key("schema_version").value(1).key("bundle").value(request.bundle);
  json.key("build").value(info.build);
  write_device(info.threads, &json);
  write_stats(result.stats, &json);
  json.key("tokens").begin_array();
  for (const int64_t token : tokens) json.value(token);
  static constexpr const char* kFinishes[] = {"length", "eos", "stop", "cancelled"};
  json.end_array().key("finish").value(kFinishes[result.finish]).end_object();
  const std::string text = json.text() + "\n";
  if (!logits.empty() && !write_file(request.logits_path, logits.data(), logits.size() * sizeof(float))) return false;
  if (!request.report_path.empty()) return write_file(request.report_path, text.data(), text.size());
  const bool printed = std::fwrite(text.data(), 1, text.size(), stdout) == text.size() && std::fflush(stdout) == 0;
  return printed || fail("the report cannot be written to the standard output");
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
