#include "csrc/runtime/video_bundle.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <set>
#include <utility>

#include "csrc/runtime/bundle_files.h"

namespace edgerun {

namespace {

const json::Value* find_program(const json::Value& manifest, const std::string& name) {
  for (const json::Value& program : manifest.get("programs").items()) {
    std::string found;
    if (program.get("name").as(&found) && found == name) return &program;
  }
  return nullptr;
}

Status read_numbers(const json::Value& list, const std::string& name, std::vector<double>* numbers) {
  for (const json::Value& item : list.items()) {
    if (!item.as(&numbers->emplace_back()) || !std::isfinite(numbers->back())) {
      return corrupt("manifest.json has something else than a number in '" + name + "': export the bundle again");
    }
  }
  return Status();
}

// A list of rows → row after row.
Status read_matrix(const json::Value& list, const std::string& name, size_t rows, size_t columns,
                   std::vector<float>* values) {
  bool good = list.items().size() == rows;
  for (const json::Value& row : list.items()) {
    std::vector<double> numbers;
    if (Status status = read_numbers(row, name, &numbers); !status.ok()) return status;
    good = good && numbers.size() == columns;
    values->insert(values->end(), numbers.begin(), numbers.end());
  }
  if (good) return Status();
  return corrupt("manifest.json: '" + name + "' is not a matrix of " + std::to_string(rows) + " × " +
                 std::to_string(columns) + ": export the bundle again");
}

// More is no size. Sums and products of a few stay in 64 bits.
constexpr int64_t kMostBytes = int64_t{1} << 50, kMostSize = int64_t{1} << 20;

// Of a value at its largest; 0: the manifest does not tell, above kMostBytes: no size.
int64_t most_bytes(const json::Value& value) {
  std::string dtype;
  if (!value.get("dtype").as(&dtype)) return 0;
  int64_t bytes = dtype == "int64" ? 8 : dtype == "bool" ? 1 : 4;
  for (const json::Value& dimension : value.get("shape").items()) {
    std::string symbol;
    int64_t size = 0;
    if (dimension.as(&symbol)) {
      for (const auto& [limited, range] : value.get("limits").members()) {
        if (limited == symbol && range.items().size() == 2) (void)range.items()[1].as(&size);
      }
    } else {
      (void)dimension.as(&size);
    }
    if (size <= 0) return 0;
    if (bytes > kMostBytes / size) return kMostBytes + 1;
    bytes *= size;
  }
  return value.get("shape").items().empty() ? 0 : bytes;
}

Status read_values(const json::Value& list, const std::string& program, Chain* chain, std::vector<std::string>* names,
                   std::map<std::string, int64_t>* bytes) {
  for (const json::Value& item : list.items()) {
    std::string name;
    if (!item.get("name").as(&name)) {
      return corrupt("manifest.json: a value of program '" + program + "' has no name: export the bundle again");
    }
    names->push_back(name);
    const int64_t most = most_bytes(item);
    if (most > kMostBytes) {
      return corrupt("manifest.json: value '" + name + "' of program '" + program + "' is of no size: export again");
    }
    (*bytes)[name] = std::max((*bytes)[name], most);
    int64_t pictures = 0;
    if (name == "pictures" && chain->picture_bytes == 0 && most > 0 && item.get("shape").items().size() == 4) {
      chain->picture_bytes = 4;
      for (size_t i = 1; i < 4; ++i) {
        chain->picture_bytes *= item.get("shape").items()[i].as(&pictures) ? pictures : 0;
      }
    }
    const std::vector<json::Value>& shape = item.get("shape").items();
    if (name == "tokens" && shape.size() == 2) {
      std::string symbol;
      int64_t fixed = 0;
      if (shape[1].as(&fixed)) {
        chain->token_limits = {fixed, fixed};
      } else if (shape[1].as(&symbol)) {
        for (const auto& [limited, range] : item.get("limits").members()) {
          if (limited != symbol || range.items().size() != 2) continue;
          if (range.items()[0].as(&fixed)) chain->token_limits[0] = fixed;
          if (range.items()[1].as(&fixed)) chain->token_limits[1] = fixed;
        }
      }
    }
    if (name == "cosines" && shape.size() == 2) (void)shape[1].as(&chain->head_size);
  }
  return Status();
}

Status read_chain(const json::Value& manifest, const std::string& name, Chain* chain, std::set<std::string>* files) {
  std::map<std::string, int64_t> bytes;  // of each value
  for (const json::Value& item : manifest.get("chains").get(name).items()) {
    ChainProgram program;
    const json::Value* entry = nullptr;
    if (item.as(&program.name)) entry = find_program(manifest, program.name);
    if (entry == nullptr) {
      return corrupt("manifest.json: chain '" + name + "' has '" + program.name +
                     "', which is none of its programs: export the bundle again");
    }
    if (Status status = require(*entry, "file", &program.path); !status.ok()) return status;
    if (Status status = read_values(entry->get("inputs"), program.name, chain, &program.inputs, &bytes); !status.ok()) {
      return status;
    }
    if (Status status = read_values(entry->get("outputs"), program.name, chain, &program.outputs, &bytes);
        !status.ok()) {
      return status;
    }
    for (const json::Value& op : entry->get("operators").items()) {
      if (!op.as(&program.operators.emplace_back())) {
        return corrupt("manifest.json lists an operator that is not a string: export the bundle again");
      }
    }
    (void)entry->get("arena_bytes").as(&program.arena_bytes);
    (void)entry->get("table_bytes").as(&program.table_bytes);
    if (std::min(program.arena_bytes, program.table_bytes) < 0 ||
        std::max(program.arena_bytes, program.table_bytes) > kMostBytes) {
      return corrupt("manifest.json: program '" + program.name + "' states " + std::to_string(program.arena_bytes) +
                     " and " + std::to_string(program.table_bytes) + " bytes for XNNPACK: export the bundle again");
    }
    files->insert(program.path);
    chain->programs.push_back(std::move(program));
  }
  for (const auto& [value, most] : bytes) {
    chain->value_bytes += most;
    if (chain->value_bytes > kMostBytes) return corrupt("manifest.json: the values of '" + name + "' are of no size");
  }
  if (!chain->programs.empty()) return Status();
  return corrupt("manifest.json has no chain '" + name + "': export the bundle again");
}

Status check_chain(const std::string& name, const Chain& chain, std::set<std::string> given, const std::string& taken) {
  for (const ChainProgram& program : chain.programs) {
    for (const std::string& input : program.inputs) {
      if (given.count(input) > 0) continue;
      return corrupt("manifest.json: program '" + program.name + "' of chain '" + name + "' takes '" + input +
                     "', which nothing before it gives: export the bundle again");
    }
    given.insert(program.outputs.begin(), program.outputs.end());
  }
  const std::vector<std::string>& last = chain.programs.back().outputs;
  if (std::find(last.begin(), last.end(), taken) != last.end()) return Status();
  return corrupt("manifest.json: chain '" + name + "' does not end with '" + taken + "': export the bundle again");
}

// Bundles that were made before there was a choice name none.
Status read_solver(const json::Value& video, Solver* solver) {
  *solver = Solver::kEuler;
  if (video.get("solver").is_null()) return Status();
  std::string name;
  if (Status status = require(video, "solver", &name); !status.ok()) return status;
  if (name != "euler" && name != "ab2") {
    return corrupt("manifest.json: video.solver is '" + name + "', none of euler and ab2: update edgerun");
  }
  if (name == "ab2") *solver = Solver::kAdamsBashforth2;
  return Status();
}

Status read_leap(const json::Value& leap, LeapOptions* options) {
  if (leap.is_null()) return Status();
  std::string kind;
  if (Status status = require(leap, "kind", &kind); !status.ok()) return status;
  if (kind == "fixed") {
    options->kind = LeapKind::kFixed;
    if (Status status = require(leap, "evaluations", &options->evaluations); !status.ok()) return status;
  } else if (kind == "cosine") {
    options->kind = LeapKind::kCosine;
    if (Status status = require(leap, "latest_time", &options->latest_time); !status.ok()) return status;
    if (Status status = require(leap, "tolerance", &options->tolerance); !status.ok()) return status;
    if (Status status = require(leap, "patience", &options->patience); !status.ok()) return status;
  } else if (kind != "none") {
    return corrupt("manifest.json: video.leap.kind is '" + kind +
                   "'; this edgerun knows none, fixed and cosine: "
                   "update edgerun");
  }
  Status status = check(*options);
  return status.ok() ? status : corrupt("manifest.json: " + status.message());
}

Status read_merge(const json::Value& video, VideoBundle* bundle) {
  const json::Value& merge = video.get("merge");
  if (merge.is_null()) return Status();
  if (Status status = require_at_least(0, merge, "steps", &bundle->merge_steps); !status.ok()) return status;
  const size_t merged = merge.get("matrix").items().size(), frames = static_cast<size_t>(bundle->latent_frames);
  if (merged == 0 && bundle->merge_steps == 0) return Status();
  std::vector<double> positions;
  if (Status status = read_matrix(merge.get("matrix"), "video.merge.matrix", merged, frames, &bundle->merge.merge);
      !status.ok()) {
    return status;
  }
  if (Status status = read_matrix(merge.get("unmerge"), "video.merge.unmerge", frames, merged, &bundle->merge.unmerge);
      !status.ok()) {
    return status;
  }
  if (Status status = read_numbers(merge.get("positions"), "video.merge.positions", &positions); !status.ok()) {
    return status;
  }
  if (positions.size() != merged || merged == 0) {
    return corrupt("manifest.json: video.merge has " + std::to_string(positions.size()) + " positions for " +
                   std::to_string(merged) + " merged frames: export the bundle again");
  }
  bundle->merge.positions.assign(positions.begin(), positions.end());
  bundle->merge.merged = static_cast<int64_t>(merged);
  return Status();
}

// Frequencies of the rotary embedding: the manifest's, or 10000^(-2 i / head size).
Status read_rotary(const json::Value& video, VideoBundle* bundle) {
  const int64_t head_size = bundle->denoiser.head_size;
  if (head_size == 0) return Status();
  std::vector<double> numbers;
  if (Status status = read_numbers(video.get("rotary.frequencies"), "video.rotary.frequencies", &numbers);
      !status.ok()) {
    return status;
  }
  for (int64_t i = 0; numbers.empty() && i < head_size / 2; ++i) {
    bundle->rotary_frequencies.push_back(
        static_cast<float>(std::pow(10000.0, -2.0 * static_cast<double>(i) / static_cast<double>(head_size))));
  }
  bundle->rotary_frequencies.insert(bundle->rotary_frequencies.end(), numbers.begin(), numbers.end());
  if (static_cast<int64_t>(bundle->rotary_frequencies.size()) == head_size / 2) return Status();
  return corrupt("manifest.json: video.rotary has " + std::to_string(numbers.size()) + " frequencies for heads of " +
                 std::to_string(head_size) + ": export the bundle again");
}

Status read_video(const json::Value& video, VideoBundle* bundle) {
  const std::pair<const char*, int64_t*> sizes[] = {{"frames", &bundle->frames},
                                                    {"height", &bundle->height},
                                                    {"width", &bundle->width},
                                                    {"latent.channels", &bundle->channels},
                                                    {"latent.frames", &bundle->latent_frames},
                                                    {"latent.height", &bundle->latent_height},
                                                    {"latent.width", &bundle->latent_width},
                                                    {"decoder.latents_per_chunk", &bundle->latents_per_chunk},
                                                    {"decoder.frames_per_chunk", &bundle->frames_per_chunk},
                                                    {"decoder.frames_per_call", &bundle->frames_per_call}};
  for (const auto& [name, target] : sizes) {
    if (Status status = require_at_least(1, video, name, target); !status.ok()) return status;
    if (*target > kMostSize) {
      return corrupt("manifest.json: video." + std::string(name) + " is " + std::to_string(*target) +
                     ", which is no size: export the bundle again");
    }
  }
  for (const std::array<int64_t, 4>& factors :
       {std::array{bundle->frames, bundle->height, bundle->width, int64_t{1}},
        std::array{bundle->channels, bundle->latent_frames, bundle->latent_height, bundle->latent_width}}) {
    int64_t product = 1;
    for (const int64_t factor : factors) product = product > kMostBytes / factor ? kMostBytes : product * factor;
    if (product >= kMostBytes / 8) {
      return corrupt("manifest.json: video.frames, height and width, or those of its latent, are together no size");
    }
  }
  if (bundle->frames_per_call > bundle->frames_per_chunk) {
    return corrupt("manifest.json: video.decoder.frames_per_call is " + std::to_string(bundle->frames_per_call) +
                   ", more than the " + std::to_string(bundle->frames_per_chunk) + " frames of a chunk: export again");
  }
  if (Status status = require(video, "fps", &bundle->fps); !status.ok()) return status;
  if (Status status = require(video, "guidance", &bundle->guidance); !status.ok()) return status;
  if (Status status = read_numbers(video.get("times"), "video.times", &bundle->times); !status.ok()) return status;
  if (bundle->times.empty()) return corrupt("manifest.json has no usable 'video.times': export the bundle again");
  if ((bundle->frames - 1) / bundle->frames_per_chunk + 1 != bundle->chunks()) {
    return corrupt("manifest.json: " + std::to_string(bundle->frames) + " frames and " +
                   std::to_string(bundle->latent_frames) + " latents are not the same number of chunks: export again");
  }
  if (Status status = read_solver(video, &bundle->solver); !status.ok()) return status;
  if (Status status = read_leap(video.get("leap"), &bundle->leap); !status.ok()) return status;
  if (Status status = read_merge(video, bundle); !status.ok()) return status;
  return read_rotary(video, bundle);
}

}  // namespace

Status check(const LeapOptions& options) {
  const auto invalid = [](const std::string& message) { return Status(StatusCode::kInvalidArgument, message); };
  if (options.kind == LeapKind::kFixed && options.evaluations < 1) {
    return invalid("a leap after " + std::to_string(options.evaluations) + " evaluations: give at least 1");
  }
  if (options.kind != LeapKind::kCosine) return Status();
  if (!(options.latest_time > 0.0 && options.latest_time <= 1.0) || options.patience < 1 ||
      !std::isfinite(options.tolerance)) {
    return invalid("a cosine leap has latest_time " + std::to_string(options.latest_time) + " and patience " +
                   std::to_string(options.patience) + ": it needs 0 < latest_time <= 1 and patience >= 1");
  }
  return Status();
}

Status read_video_bundle(const std::string& path, bool verify, VideoBundle* bundle) {
  *bundle = VideoBundle();
  bundle->path = path;
  json::Value manifest;
  if (Status status = read_manifest(path, &manifest); !status.ok()) return status;
  if (Status status = check_schema(manifest, "video"); !status.ok()) return status;
  if (Status status = require(manifest, "build", &bundle->build); !status.ok()) return status;
  std::set<std::string> names;
  struct Part {
    const char* name;
    Chain* chain;
    std::set<std::string> given;
    const char* taken;
  };
  const Part parts[] = {
      {"text_encoder", &bundle->text_encoder, {"tokens"}, "y"},
      {"denoiser", &bundle->denoiser, {"x", "time", "fps", "y", "merge", "unmerge", "cosines", "sines"}, "v"},
      {"time_decoder", &bundle->time_decoder, {"z"}, "chunk"},
      {"frame_decoder", &bundle->frame_decoder, {"pictures"}, "frames"}};
  for (const Part& part : parts) {
    if (Status status = read_chain(manifest, part.name, part.chain, &names); !status.ok()) return status;
    if (Status status = check_chain(part.name, *part.chain, part.given, part.taken); !status.ok()) return status;
  }
  if (Status status = read_video(manifest.get("video"), bundle); !status.ok()) return status;
  std::map<std::string, BundleFile> files;
  if (Status status = check_files(manifest, path, names, verify, &files); !status.ok()) return status;
  for (const Part& part : parts) {
    for (ChainProgram& program : part.chain->programs) {
      program.bytes = files[program.path].bytes;
      program.path = files[program.path].path;
    }
  }
  return Status();
}

}  // namespace edgerun
