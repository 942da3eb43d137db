// edgerun._native.TextSession: the C boundary for Python. The interpreter's lock is given up while a program runs, and
// taken before every slice and token to look for Ctrl-C; edgerun/sessions/text.py is what users hold.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <exception>
#include <optional>
#include <string>
#include <vector>

#include "csrc/bindings/c_api.h"
#include "csrc/bindings/python_errors.h"

namespace py = pybind11;

namespace {

using Ids = std::vector<int64_t>;

void raise_for(edgerun_status status) { edgerun::raise_for(status, edgerun_last_error()); }

struct Listener {
  std::optional<py::function> on_token;
  Ids tokens;
  std::exception_ptr error;

  // Runs `body` with the lock held; an exception is kept for the caller of generate and ends the run.
  template <typename Body>
  int32_t ask(const Body& body) {
    const py::gil_scoped_acquire lock;
    try {
      body();
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
      return 0;
    } catch (...) {
      error = std::current_exception();
      return 1;
    }
  }
  static int32_t take_token(int64_t token, void* self) {
    auto* const listener = static_cast<Listener*>(self);
    return listener->ask([&] {
      listener->tokens.push_back(token);
      if (listener->on_token) (*listener->on_token)(token);
    });
  }
  static int32_t take_step(void* self) {
    return static_cast<Listener*>(self)->ask([] {});
  }
};

py::dict to_dict(const edgerun_stats& stats) {
  py::dict values;
  values["prompt_tokens"] = stats.prompt_tokens;
  values["generated_tokens"] = stats.generated_tokens;
  values["model_load_start_ms"] = stats.model_load_start_ms;
  values["model_load_end_ms"] = stats.model_load_end_ms;
  values["inference_start_ms"] = stats.inference_start_ms;
  values["inference_end_ms"] = stats.inference_end_ms;
  values["prompt_eval_end_ms"] = stats.prompt_eval_end_ms;
  values["first_token_ms"] = stats.first_token_ms;
  values["aggregate_sampling_time_ms"] = stats.aggregate_sampling_time_ms;
  values["peak_rss_bytes"] = stats.peak_rss_bytes;
  values["attended_pairs"] = stats.attended_pairs;
  values["causal_pairs"] = stats.causal_pairs;
  return values;
}

class Session {
 public:
  Session(const std::string& path, bool verify, int32_t threads) {
    edgerun_session_options options = edgerun_session_options_default();
    options.verify = verify;
    options.threads = threads;
    raise_for(released([&] { return edgerun_text_session_open(path.c_str(), &options, &handle_); }));
  }
  ~Session() { edgerun_text_session_close(handle_); }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  py::tuple generate(const Ids& ids, int64_t max_new_tokens, float temperature, int64_t top_k, float top_p,
                     uint64_t seed, const std::optional<Ids>& stop_ids, std::optional<py::function> on_token) {
    Listener listener{std::move(on_token), {}, nullptr};
    edgerun_generate_options options = edgerun_generate_options_default();
    options.max_new_tokens = max_new_tokens;
    options.temperature = temperature;
    options.top_k = top_k;
    options.top_p = top_p;
    options.seed = seed;
    options.has_stop_ids = stop_ids.has_value();
    options.stop_ids = stop_ids ? stop_ids->data() : nullptr;
    options.stop_count = stop_ids ? stop_ids->size() : 0;
    options.on_step = Listener::take_step;
    edgerun_generate_result result = {};
    result.struct_bytes = sizeof(result);
    const edgerun_status status = released([&] {
      return edgerun_text_session_generate(handle_, ids.data(), ids.size(), &options, Listener::take_token, &listener,
                                           &result);
    });
    if (listener.error) std::rethrow_exception(listener.error);
    raise_for(status);
    static constexpr const char* kFinishes[] = {"length", "eos", "stop", "cancelled"};
    return py::make_tuple(listener.tokens, kFinishes[result.finish], to_dict(result.stats));
  }

  py::array_t<float> forward(const Ids& ids, int64_t input_pos) {
    py::array_t<float> logits(info().vocab_size);
    float* const target = logits.mutable_data();
    raise_for(
        released([&] { return edgerun_text_session_forward(handle_, ids.data(), ids.size(), input_pos, target); }));
    return logits;
  }

  void reset() { raise_for(edgerun_text_session_reset(handle_)); }
  void cancel() { edgerun_text_session_cancel(handle_); }

  edgerun_session_info info() const {
    edgerun_session_info info = {};
    info.struct_bytes = sizeof(info);
    raise_for(edgerun_text_session_info(handle_, &info));
    return info;
  }

  py::dict stats() const {
    edgerun_stats stats = {};
    stats.struct_bytes = sizeof(stats);
    raise_for(edgerun_text_session_stats(handle_, &stats));
    return to_dict(stats);
  }

 private:
  template <typename Call>
  static edgerun_status released(const Call& call) {
    const py::gil_scoped_release unlocked;
    return call();
  }

  edgerun_text_session* handle_ = nullptr;
};

}  // namespace

void register_sessions(py::module_& module) {
  module.def("version", &edgerun_version, "Version of the native library.");
  module.def("api_version", &edgerun_api_version, "Version of the C boundary.");
  py::class_<Session>(module, "TextSession")
      .def(py::init<const std::string&, bool, int32_t>(), py::arg("path"), py::arg("verify"), py::arg("threads"))
      .def("generate", &Session::generate, py::arg("ids"), py::arg("max_new_tokens"), py::arg("temperature"),
           py::arg("top_k"), py::arg("top_p"), py::arg("seed"), py::arg("stop_ids"), py::arg("on_token"))
      .def("forward", &Session::forward, py::arg("ids"), py::arg("input_pos"))
      .def("reset", &Session::reset)
      .def("cancel", &Session::cancel)
      .def("stats", &Session::stats)
      .def_property_readonly("vocab_size", [](const Session& session) { return session.info().vocab_size; })
      .def_property_readonly("max_context", [](const Session& session) { return session.info().max_context; })
      .def_property_readonly("cached_tokens", [](const Session& session) { return session.info().cached_tokens; })
      .def_property_readonly("threads", [](const Session& session) { return session.info().threads; });
}
