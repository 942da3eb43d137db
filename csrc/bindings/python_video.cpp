// edgerun._native.VideoSession: the C boundary for Python. The interpreter's lock is given up while programs run, and
// taken before every one of them to look for Ctrl-C; edgerun/sessions/video.py is what users hold.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <exception>
#include <optional>
#include <string>
#include <vector>

#include "csrc/bindings/python_errors.h"

namespace py = pybind11;

namespace {

void raise_for(edgerun_status status) { edgerun::raise_for(status, edgerun_last_error()); }

using Floats = py::array_t<float, py::array::c_style>;

struct Listener {
  std::optional<py::function> on_progress;
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
  static int32_t take_progress(const edgerun_video_progress* progress, void* self) {
    auto* const listener = static_cast<Listener*>(self);
    static constexpr const char* kStages[] = {"encode", "denoise", "decode"};
    return listener->ask([&] {
      if (!listener->on_progress) return;
      (*listener->on_progress)(kStages[progress->stage], progress->done, progress->total, progress->evaluations,
                               progress->time, progress->elapsed_ms);
    });
  }
  static int32_t take_block(void* self) {
    return static_cast<Listener*>(self)->ask([] {});
  }
};

class Session {
 public:
  Session(const std::string& path, bool verify, int32_t threads, int32_t prefetch, int64_t memory_limit_bytes) {
    edgerun_video_options options = edgerun_video_options_default();
    options.verify = verify;
    options.threads = threads;
    options.prefetch = prefetch;
    options.memory_limit_bytes = memory_limit_bytes;
    raise_for(released([&] { return edgerun_video_session_open(path.c_str(), &options, &handle_); }));
  }
  ~Session() { edgerun_video_session_close(handle_); }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  // leap: (kind, evaluations, latest_time, tolerance, patience)
  py::tuple generate(const std::vector<int64_t>& ids, double guidance, uint64_t seed,
                     const std::optional<Floats>& noise, const std::optional<std::vector<double>>& times, int solver,
                     const std::tuple<int, int64_t, double, double, int64_t>& leap, int64_t merge_steps,
                     const std::optional<std::string>& state, bool decode, std::optional<py::function> on_progress) {
    Listener listener{std::move(on_progress), nullptr};
    const edgerun_video_info shape = info();
    Floats latent({shape.channels, shape.latent_frames, shape.latent_height, shape.latent_width});
    py::array_t<uint8_t> frames({decode ? shape.frames : int64_t{0}, shape.height, shape.width, int64_t{3}});
    edgerun_video_generate_options options = edgerun_video_generate_options_default();
    options.guidance = guidance;
    options.seed = seed;
    options.noise = noise ? noise->data() : nullptr;
    options.noise_count = noise ? static_cast<size_t>(noise->size()) : 0;
    options.times = times ? times->data() : nullptr;
    options.time_count = times ? times->size() : 0;
    options.solver = static_cast<edgerun_video_solver>(solver);
    int kind = 0;
    std::tie(kind, options.leap_evaluations, options.leap_latest_time, options.leap_tolerance, options.leap_patience) =
        leap;
    options.leap = static_cast<edgerun_video_leap>(kind);
    options.merge_steps = merge_steps;
    options.state = state ? state->data() : nullptr;
    options.state_bytes = state ? state->size() : 0;
    options.latent_out = latent.mutable_data();
    options.frames_out = decode ? frames.mutable_data() : nullptr;
    options.on_block = Listener::take_block;
    edgerun_video_result result = {};
    result.struct_bytes = sizeof(result);
    const edgerun_status status = released([&] {
      return edgerun_video_session_generate(handle_, ids.data(), ids.size(), &options, Listener::take_progress,
                                            &listener, &result);
    });
    if (listener.error) std::rethrow_exception(listener.error);
    raise_for(status);
    return py::make_tuple(frames, latent, result.evaluations, result.cancelled != 0);
  }

  py::bytes state() {
    const void* data = nullptr;
    size_t bytes = 0;
    raise_for(edgerun_video_session_state(handle_, &data, &bytes));
    return py::bytes(static_cast<const char*>(data), bytes);
  }
  std::string report() {
    const char* json = nullptr;
    raise_for(edgerun_video_session_report(handle_, &json));
    return json;
  }
  void cancel() { edgerun_video_session_cancel(handle_); }
  void set_memory_limit(int64_t bytes) {
    raise_for(released([&] { return edgerun_video_session_set_memory_limit(handle_, bytes); }));
  }

  edgerun_video_info info() const {
    edgerun_video_info info = {};
    info.struct_bytes = sizeof(info);
    raise_for(edgerun_video_session_info(handle_, &info));
    return info;
  }

 private:
  template <typename Call>
  static edgerun_status released(const Call& call) {
    const py::gil_scoped_release unlocked;
    return call();
  }

  edgerun_video_session* handle_ = nullptr;
};

}  // namespace

void register_video(py::module_& module) {
  py::class_<Session>(module, "VideoSession")
      .def(py::init<const std::string&, bool, int32_t, int32_t, int64_t>(), py::arg("path"), py::arg("verify"),
           py::arg("threads"), py::arg("prefetch"), py::arg("memory_limit_bytes"))
      .def("generate", &Session::generate, py::arg("ids"), py::arg("guidance"), py::arg("seed"), py::arg("noise"),
           py::arg("times"), py::arg("solver"), py::arg("leap"), py::arg("merge_steps"), py::arg("state"),
           py::arg("decode"), py::arg("on_progress"))
      .def("state", &Session::state)
      .def("report", &Session::report)
      .def("cancel", &Session::cancel)
      .def("set_memory_limit", &Session::set_memory_limit, py::arg("bytes"))
      .def_property_readonly("frames", [](const Session& session) { return session.info().frames; })
      .def_property_readonly("height", [](const Session& session) { return session.info().height; })
      .def_property_readonly("width", [](const Session& session) { return session.info().width; })
      .def_property_readonly("fps", [](const Session& session) { return session.info().fps; })
      .def_property_readonly("steps", [](const Session& session) { return session.info().steps; })
      .def_property_readonly("max_tokens", [](const Session& session) { return session.info().max_tokens; })
      .def_property_readonly("threads", [](const Session& session) { return session.info().threads; });
}
