// dhsa_attention in C++: the laws of dhsa_attention.h and its arithmetic against double precision, for every kernel
// variant that this CPU runs, or the one named. A plain program, status 0 when all holds; needs nothing but the op, so
// that it also runs on a board (tests/ops/test_dhsa_attention_cpp.py builds it).
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#define EDGERUN_VARIANT under_test
#define EDGERUN_LANES 4
#define EDGERUN_ROWS 2
#define EDGERUN_WIDE 1
#include "csrc/ops/dhsa_attention/kernels_impl.h"  // its own copy, for the functions that the table does not show

#include "csrc/base/half.h"
#include "csrc/ops/dhsa_attention/dhsa_attention.h"
#include "csrc/ops/dhsa_attention/kernels.h"

namespace {

using namespace edgerun;
using namespace edgerun::dhsa;

constexpr double kFloatTolerance = 2e-6;   // relative L2 of one call in float against double, a few roundings per key
constexpr double kHalfTolerance = 5e-4;    // the result is rounded to 11 bits
constexpr double kInt8Tolerance = 5e-5;    // queries and weights in 16 bits, each off by 1.5e-5 of the largest
constexpr double kPeakedTolerance = 1e-4;  // a score of 1000 is rounded by 6e-5, and a weight's relative error is that
constexpr double kExpTolerance = 2.5e-7;   // relative: the polynomial's 9e-8 and the roundings of its evaluation

int failures = 0;

#define CHECK(condition, ...)                                                         \
  do {                                                                                \
    if (!(condition)) {                                                               \
      ++failures;                                                                     \
      std::printf("%s:%d: %s [%s] ", __FILE__, __LINE__, #condition, kernels().name); \
      std::printf(__VA_ARGS__);                                                       \
      std::printf("\n");                                                              \
    }                                                                                 \
  } while (false)

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  float uniform() {  // [-1, 1)
    state_ = state_ * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<float>(static_cast<int32_t>(state_ >> 32)) * 0x1p-31f;
  }

 private:
  uint64_t state_;
};

edgerun::Parallel threads(int64_t count) {
  const auto run = [](void*, int64_t workers, edgerun::ParallelBody body, void* context) {
    std::vector<std::thread> pool;
    for (int64_t worker = 0; worker < workers; ++worker) pool.emplace_back(body, context, worker);
    for (std::thread& thread : pool) thread.join();
  };
  return edgerun::Parallel{run, nullptr, count};
}

// A text's queries, keys and values, token-major, and the state that calls build from it. Floats, or halves as bits.
struct Layer {
  Params params;
  int64_t length;
  std::vector<float> query, key, value;  // [length, heads, D]
  std::vector<char> key_cache, value_cache, summaries, out;
  std::vector<uint8_t> boundaries;
  std::vector<int32_t> selection;
  std::vector<std::vector<uint16_t>> lists;  // of the last call: [Hkv * groups]

  Layer(const Params& base, int64_t tokens, uint64_t seed = 1) : params(base), length(tokens) {
    Random random(seed);
    const auto fill = [&](std::vector<float>& data, int64_t heads) {
      data.resize(static_cast<size_t>(length * heads * params.head_dim));
      for (float& x : data) x = rounded(random.uniform());
    };
    fill(query, params.query_heads);
    fill(key, params.kv_heads);
    fill(value, params.kv_heads);
    for (int64_t t = 1; t < length; ++t) {  // topics, so that boundaries and scores mean something
      const int64_t width = params.kv_heads * params.head_dim;
      for (int64_t i = 0; i < width; ++i) {
        float& x = key[static_cast<size_t>(t * width + i)];
        x = rounded(0.5f * x + 0.8f * std::sin(static_cast<float>(t / 37 * 5 + i)));
      }
    }
    const size_t blocks = static_cast<size_t>(params.kv_heads * params.capacity_blocks);
    // NaN in both float dtypes, and as a scale: what is not written must not be read.
    key_cache.assign(blocks * key_bytes(), '\x7f');
    value_cache.assign(blocks * value_bytes(), '\x7f');
    summaries.assign(blocks * summary_bytes(2), '\x7f');
    boundaries.assign(static_cast<size_t>(params.capacity_blocks + 1), 1);
    selection.assign(static_cast<size_t>(params.kv_heads * edgerun::dhsa::kept_integers(params.budget)), 0x7f7f7f7f);
    out.resize(static_cast<size_t>(length * params.query_heads * params.head_dim) * bytes());
  }

  size_t bytes() const { return params.dtype == Dtype::kHalf ? 2 : 4; }
  size_t key_bytes() const { return size_t(edgerun::dhsa::key_block_bytes(params.cache_dtype, params.head_dim)); }
  size_t value_bytes() const { return size_t(edgerun::dhsa::value_block_bytes(params.cache_dtype, params.head_dim)); }
  size_t summary_bytes(int64_t vectors) const { return size_t(vectors * params.head_dim * 2); }

  // Channel d of token j of KV head g, as the cache holds it.
  float stored(bool of_key, int64_t g, int64_t j, int64_t d) const {
    const int64_t block = g * params.capacity_blocks + j / 16, depth = params.head_dim;
    const char* base = of_key ? &key_cache[size_t(block) * key_bytes()] : &value_cache[size_t(block) * value_bytes()];
    const int64_t at = of_key ? d * 16 + j % 16 : j % 16 * depth + d;
    const auto half_at = [](const char* source) {
      uint16_t half;
      std::memcpy(&half, source, 2);
      return edgerun::half_to_float(half);
    };
    if (params.cache_dtype == Dtype::kHalf) return half_at(base + 2 * at);
    if (params.cache_dtype == Dtype::kInt8) {
      return static_cast<float>(static_cast<int8_t>(base[at])) *
             half_at(base + 16 * depth + 2 * ((of_key ? d / 32 * 16 : 0) + j % 16));
    }
    float x;
    std::memcpy(&x, base + 4 * at, 4);
    return x;
  }
  float rounded(float x) const {
    return params.dtype == Dtype::kHalf ? edgerun::half_to_float(edgerun::float_to_half(x)) : x;
  }

  // [heads, count, D] of tokens [first, first + count), in the layer's dtype.
  std::vector<char> slice(const std::vector<float>& data, int64_t heads, int64_t first, int64_t count) const {
    const int64_t depth = params.head_dim;
    std::vector<char> result(static_cast<size_t>(heads * count * depth) * bytes());
    for (int64_t i = 0; i < heads * count * depth; ++i) {
      const int64_t head = i / (count * depth), token = first + i / depth % count;
      const float x = data[static_cast<size_t>((token * heads + head) * depth + i % depth)];
      if (params.dtype == Dtype::kHalf) {
        const uint16_t half = edgerun::float_to_half(x);
        std::memcpy(&result[static_cast<size_t>(i) * 2], &half, 2);
      } else {
        std::memcpy(&result[static_cast<size_t>(i) * 4], &x, 4);
      }
    }
    return result;
  }

  Counters call(int64_t first, int64_t count, const edgerun::Parallel& parallel = edgerun::serial(),
                bool with_lists = false) {
    params.input_pos = first;
    params.tokens = count;
    const std::vector<char> q = slice(query, params.query_heads, first, count);
    const std::vector<char> k = slice(key, params.kv_heads, first, count);
    const std::vector<char> v = slice(value, params.kv_heads, first, count);
    Tensors tensors;
    tensors.query = q.data();
    tensors.key = k.data();
    tensors.value = v.data();
    tensors.out = &out[static_cast<size_t>(first * params.query_heads * params.head_dim) * bytes()];
    tensors.key_cache = key_cache.data();
    tensors.value_cache = value_cache.data();
    tensors.summaries = summaries.data();
    tensors.boundaries = boundaries.data();
    tensors.selection = selection.data();
    const char* wrong = check(params, tensors);
    CHECK(wrong == nullptr, "%s", wrong);
    const size_t size = scratch_bytes(params, parallel.threads);
    void* scratch = std::aligned_alloc(64, (size + 63) / 64 * 64);
    std::memset(scratch, 0x7f, size);
    Counters counters;
    run(params, tensors, scratch, parallel, &counters);
    if (with_lists) {
      const int64_t groups = group_count(params);
      std::vector<uint16_t> ids(static_cast<size_t>(params.kv_heads * groups * params.capacity_blocks));
      std::vector<int32_t> counts(static_cast<size_t>(params.kv_heads * groups));
      select(params, tensors, Lists{ids.data(), counts.data()}, scratch, parallel);
      lists.clear();
      for (size_t i = 0; i < counts.size(); ++i) {
        const auto begin = ids.begin() + static_cast<int64_t>(i) * params.capacity_blocks;
        lists.emplace_back(begin, begin + counts[i]);
      }
    }
    std::free(scratch);
    return counters;
  }

  float output(int64_t index) const {
    if (params.dtype == Dtype::kHalf) {
      uint16_t half;
      std::memcpy(&half, &out[static_cast<size_t>(index) * 2], 2);
      return edgerun::half_to_float(half);
    }
    float x;
    std::memcpy(&x, &out[static_cast<size_t>(index) * 4], 4);
    return x;
  }

  // Relative L2 error of the last call's output against a double-precision softmax over its lists; counts what it
  // attends.
  double error(Counters* counted) const {
    const int64_t depth = params.head_dim, group = params.query_heads / params.kv_heads, groups = group_count(params);
    double squares = 0, differences = 0;
    *counted = Counters{};
    for (int64_t t = params.input_pos; t < params.input_pos + params.tokens; ++t) {
      for (int64_t h = 0; h < params.query_heads; ++h) {
        const int64_t g = h / group;
        const auto& list = lists[static_cast<size_t>(g * groups + t / params.tile - params.input_pos / params.tile)];
        std::vector<double> sums(static_cast<size_t>(depth));
        std::vector<std::pair<int64_t, double>> scores;
        double total = 0, highest = -INFINITY;
        for (const uint16_t block : list) {
          for (int64_t j = block * 16; j < block * 16 + 16; ++j) {
            if (j > t || (params.window > 0 && j <= t - params.window)) continue;
            double score = 0;
            for (int64_t d = 0; d < depth; ++d) {
              score += double(query[size_t((t * params.query_heads + h) * depth + d)]) * stored(true, g, j, d);
            }
            score *= params.scale;
            if (params.softcap > 0) score = params.softcap * std::tanh(score / params.softcap);
            highest = std::max(highest, score);
            scores.emplace_back(j, score);
          }
        }
        if (h % group == 0) counted->attended_pairs += static_cast<int64_t>(scores.size());
        for (const auto& [j, score] : scores) {
          const double weight = std::exp(score - highest);
          total += weight;
          for (int64_t d = 0; d < depth; ++d) {
            sums[size_t(d)] += weight * stored(false, g, j, d);
          }
        }
        if (h % group == 0) counted->causal_pairs += params.window > 0 ? std::min(t + 1, params.window) : t + 1;
        for (int64_t d = 0; d < depth; ++d) {
          const double truth = sums[size_t(d)] / total;
          const double got = output((t * params.query_heads + h) * depth + d);
          squares += truth * truth;
          differences += (got - truth) * (got - truth);
        }
      }
    }
    return std::sqrt(differences / squares);
  }

  // Blocks in use, from every buffer that outlives a call.
  std::vector<char> state(int64_t tokens) const {
    std::vector<char> result(boundaries.begin(), boundaries.end());
    const int64_t vectors = edgerun::dhsa::summary_vectors(params.pooling);
    for (int64_t head = 0; head < params.kv_heads; ++head) {
      const auto add = [&](const std::vector<char>& data, size_t block_bytes, int64_t blocks) {
        const auto begin = data.begin() + head * params.capacity_blocks * int64_t(block_bytes);
        result.insert(result.end(), begin, begin + blocks * int64_t(block_bytes));
      };
      add(key_cache, key_bytes(), (tokens + 15) / 16);
      add(value_cache, value_bytes(), (tokens + 15) / 16);
      if (params.budget > 0) add(summaries, summary_bytes(vectors), tokens / 16);
    }
    return result;
  }
};

Params shape(int64_t query_heads, int64_t kv_heads, int64_t head_dim, int64_t blocks) {
  Params params;
  params.query_heads = query_heads;
  params.kv_heads = kv_heads;
  params.head_dim = head_dim;
  params.capacity_blocks = blocks;
  params.scale = 1.5f / std::sqrt(static_cast<float>(head_dim));
  return params;
}

Params sparse(int64_t tile) {
  Params params = shape(4, 2, 16, 32);
  params.tile = tile;
  params.budget = 16 + 64 + 12 + tile + 32;
  params.boundary_threshold = 0.4f;
  params.finds_boundaries = true;
  return params;
}

// Every pair of dtypes that a model is exported with: of activations and of the cache.
struct Dtypes {
  Dtype activations, cache;
};
constexpr Dtypes kDtypes[] = {{Dtype::kFloat, Dtype::kFloat}, {Dtype::kHalf, Dtype::kHalf},
                              {Dtype::kFloat, Dtype::kHalf},  {Dtype::kFloat, Dtype::kInt8},
                              {Dtype::kHalf, Dtype::kInt8},   {Dtype::kHalf, Dtype::kFloat}};

Params with(Params params, const Dtypes& dtypes) {
  params.dtype = dtypes.activations;
  params.cache_dtype = dtypes.cache;
  return params;
}

void expect_output(const Params& params, int64_t before, int64_t tokens, const char* name,
                   double float_tolerance = kFloatTolerance) {
  Layer layer(params, before + tokens);
  if (before > 0) layer.call(0, before);
  const Counters counters = layer.call(before, tokens, edgerun::serial(), true);
  Counters counted;
  const double error = layer.error(&counted);
  const bool rounded = kernels().integer_products && params.cache_dtype == Dtype::kInt8;
  const double limit = std::max(float_tolerance, rounded ? kInt8Tolerance : 0.0);
  CHECK(error < (params.dtype == Dtype::kHalf ? kHalfTolerance : limit), "%s: error %g", name, error);
  CHECK(counters.attended_pairs == counted.attended_pairs && counters.causal_pairs == counted.causal_pairs,
        "%s: %lld of %lld pairs, not %lld of %lld", name, (long long)counters.attended_pairs,
        (long long)counters.causal_pairs, (long long)counted.attended_pairs, (long long)counted.causal_pairs);
}

void test_outputs() {
  for (const int64_t depth : {1, 7, 16, 20, 64, 80, 96, 128, 256}) {
    expect_output(shape(4, 2, depth, 8), 0, 70, "head_dim");
    expect_output(shape(3, 3, depth, 8), 65, 1, "decode");
  }
  for (const int64_t tokens : {1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 160}) {
    expect_output(shape(2, 1, 32, 16), 0, tokens, "length");
    expect_output(shape(2, 1, 32, 16), 31, tokens, "length after 31");
  }
  expect_output(shape(300, 1, 8, 4), 3, 20, "more heads than rows of a task");
  Params params = shape(4, 2, 32, 24);
  params.tile = 300;
  expect_output(params, 0, 333, "tile larger than a task");
  params = shape(4, 2, 32, 24);
  params.softcap = 0.7f;
  expect_output(params, 5, 90, "softcap");
  for (const int64_t window : {1, 16, 33, 200}) {
    params = shape(4, 2, 32, 24);
    params.window = window;
    expect_output(params, 50, 190, "window");
    expect_output(params, 139, 1, "window, decode");
  }
  for (const Dtypes& dtypes : kDtypes) {
    for (const int64_t depth : {8, 40, 128}) {
      expect_output(with(shape(4, 2, depth, 24), dtypes), 17, 150, "dtypes");
      expect_output(with(shape(4, 2, depth, 24), dtypes), 150, 1, "dtypes, decode");
      params = with(shape(4, 2, depth, 24), dtypes);
      params.window = 33;
      params.softcap = 0.7f;
      expect_output(params, 50, 190, "dtypes, window, softcap");
      params.tile = 300;
      expect_output(params, 0, 333, "dtypes, window, tile larger than a task");
    }
  }
  for (const int64_t tile : {1, 24, 64}) {
    for (int pooling = 0; pooling < 5; ++pooling) {
      for (int variety = 0; variety < 7; ++variety) {
        params = with(sparse(tile), kDtypes[variety % 6]);
        params.pooling = static_cast<Pooling>(pooling);
        params.query_pooling = static_cast<QueryPooling>(variety & 1);
        params.selector = variety == 6 ? Selector::kRecent : Selector::kChunk;
        params.refine = tile == 1 ? 5 : 100;
        expect_output(params, 211, 130, "sparse");
        expect_output(params, 340, 1, "sparse decode");
      }
    }
  }
}

// A list holds the sink, the local band and its own tile, ascends, fits the budget and leaves no room unused.
void test_lists() {
  for (const int64_t tile : {1, 16, 40, 64}) {
    Layer layer(sparse(tile), 500);
    layer.call(0, 500, edgerun::serial(), true);
    const int64_t groups = group_count(layer.params);
    for (int64_t i = 0; i < groups * 2; ++i) {
      const auto& list = layer.lists[static_cast<size_t>(i)];
      const int64_t end = std::min<int64_t>(500, (i % groups + 1) * tile);
      const int64_t held = static_cast<int64_t>(list.size()) * 16 - (list.back() * 16 + 16 - end);
      CHECK(std::is_sorted(list.begin(), list.end()) && list[0] == 0, "list %lld", (long long)i);
      CHECK(std::adjacent_find(list.begin(), list.end()) == list.end(), "list %lld", (long long)i);
      CHECK(list.back() == (end - 1) / 16, "list %lld", (long long)i);
      CHECK(held <= layer.params.budget && (held > layer.params.budget - 16 || held == end), "list %lld: %lld tokens",
            (long long)i, (long long)held);
    }
  }
}

void test_state_is_the_same_for_every_partition() {
  for (const Dtypes& dtypes : kDtypes) {
    for (const Pooling pooling : {Pooling::kMean, Pooling::kMinMax, Pooling::kMoments}) {
      Params params = with(sparse(64), dtypes);
      params.pooling = pooling;
      Layer whole(params, 301);
      whole.call(0, 301);
      int64_t cuts = 0;
      for (const uint8_t flag : whole.boundaries) cuts += flag;
      CHECK(cuts > 5 && cuts < 18, "%lld cuts exercise both outcomes", (long long)cuts);
      for (const int64_t step : {1, 7, 16, 33, 150}) {
        Layer parts(params, 301);
        for (int64_t first = 0; first < 301; first += step) parts.call(first, std::min(step, 301 - first));
        CHECK(parts.state(301) == whole.state(301), "step %lld", (long long)step);
      }
      Layer again(params, 301);
      again.call(0, 301);
      again.call(203, 98);  // truncates first
      CHECK(again.state(301) == whole.state(301), "rewound");
      again.call(100, 7);
      Layer shorter(params, 301);
      shorter.call(0, 107);
      CHECK(again.state(107) == shorter.state(107), "truncated");
    }
  }
}

void test_cuts_at_tiles_change_no_bit() {
  for (const Dtypes& dtypes : kDtypes) {
    for (const Pooling pooling : {Pooling::kMean, Pooling::kMoments}) {
      for (const int64_t tile : {1, 32}) {
        Params params = with(sparse(tile), dtypes);
        params.pooling = pooling;
        params.refine = 5;
        Layer whole(params, 320), parts(params, 320);
        whole.call(0, 320);
        for (const int64_t first : {0, 32, 160, 288}) parts.call(first, first == 0 ? 32 : first == 288 ? 32 : 128);
        CHECK(whole.out == parts.out, "tile %lld", (long long)tile);
      }
    }
  }
}

void test_threads_change_no_bit() {
  for (const Dtypes& dtypes : kDtypes) {
    const Params params = with(sparse(16), dtypes);
    Layer one(params, 400), three(params, 400);
    one.call(0, 400);
    three.call(0, 400, threads(3));
    CHECK(one.out == three.out && one.state(400) == three.state(400), "cache dtype %d", static_cast<int>(dtypes.cache));
  }
}

void test_budget_of_everything_is_dense_bit_for_bit() {
  for (const Dtypes& dtypes : kDtypes) {
    Params params = with(sparse(64), dtypes);
    params.budget = 512;
    Layer large(params, 333);
    params.budget = 0;
    Layer dense(params, 333);
    large.call(0, 333);
    dense.call(0, 333);
    CHECK(large.out == dense.out, "budget 512 over 333 tokens");
  }
}

void test_grouped_heads_equal_repeated_heads() {
  for (const Dtypes& dtypes : kDtypes) {
    Layer grouped(with(shape(4, 2, 32, 8), dtypes), 100), repeated(with(shape(4, 4, 32, 8), dtypes), 100);
    repeated.query = grouped.query;
    for (int64_t i = 0; i < 100 * 4 * 32; ++i) {
      const int64_t from = (i / 128 * 2 + i / 32 % 4 / 2) * 32 + i % 32;
      repeated.key[size_t(i)] = grouped.key[size_t(from)];
      repeated.value[size_t(i)] = grouped.value[size_t(from)];
    }
    grouped.call(0, 100);
    repeated.call(0, 100);
    CHECK(grouped.out == repeated.out, "4 heads on 2");
  }
}

void test_nan_stays_where_it_is() {
  Layer layer(shape(1, 1, 16, 8), 40);
  layer.key[10 * 16] = NAN;  // one key: rows 0..9 do not see it, all later ones do
  layer.call(0, 40);
  for (int64_t t = 0; t < 40; ++t) CHECK(std::isnan(layer.output(t * 16)) == (t >= 10), "row %lld", (long long)t);
}

// A key behind the causal frontier reaches no row before it, not even in its own micro-block. A value reaches none before
// its micro-block (in it, 0 times what is not finite is NaN), and where it is stale, none at all.
void test_nothing_leaks_from_behind_the_frontier() {
  for (const Dtypes& dtypes : kDtypes) {
    for (const float poison : {NAN, INFINITY, -INFINITY}) {
      for (const int64_t budget : {0, 176}) {
        for (const bool of_value : {false, true}) {
          Params params = with(sparse(64), dtypes);
          params.budget = budget;
          Layer clean(params, 300), poisoned(params, 300);
          for (int64_t i = 0; i < 2 * 16; ++i) {
            (of_value ? poisoned.value : poisoned.key)[size_t(259 * 32 + i)] = poison;
          }
          clean.call(0, 300);
          poisoned.call(0, 300);
          const int64_t rows = of_value || budget > 0 ? 256 : 259;  // a list may change from its tile on
          const int64_t bytes = rows * 4 * 16 * int64_t(clean.bytes());
          CHECK(std::equal(clean.out.begin(), clean.out.begin() + bytes, poisoned.out.begin()), "budget %lld, %s",
                (long long)budget, of_value ? "value" : "key");
          poisoned.value = clean.value;
          poisoned.key = clean.key;
          poisoned.call(256, 44);
          CHECK(clean.out == poisoned.out, "rewound over it, budget %lld", (long long)budget);
        }
      }
    }
  }
}

// Flags of another text, with no cut where every text has one, may choose badly but reach nothing out of bounds.
void test_stale_flags_are_survived() {
  Params params = sparse(64);
  params.capacity_blocks = 128;
  params.finds_boundaries = false;
  Layer layer(params, 2000);
  std::fill(layer.boundaries.begin(), layer.boundaries.end(), uint8_t{0});
  for (int64_t first = 0; first < 2000; first += 500) layer.call(first, 500, edgerun::serial(), true);
  Counters counted;
  CHECK(layer.error(&counted) < kFloatTolerance, "sparse over stale flags");
  for (const auto& list : layer.lists) CHECK(int64_t(list.size()) <= params.budget / 16 + 1, "%zu", list.size());
}

// Scores that are all equal, or all of a query that is not finite: the lower ids first, of the last chunk its head.
void test_ties_go_to_the_lower_id() {
  for (const float fill : {0.0f, NAN}) {
    Params params = sparse(64);
    params.pooling = Pooling::kMoments;
    params.chunking = Chunking::kFixed;
    Layer layer(params, 512);
    std::fill(layer.query.begin(), layer.query.end(), fill);
    layer.call(0, 512, edgerun::serial(), true);
    // The last tile, rows 448 to 511: the sink; (188 - 16 - 128) / 16 micro-blocks, the head of the chunk that starts
    // behind it; and what is local, from the cut at 384 on.
    const std::vector<uint16_t> expected = {0, 1, 2, 24, 25, 26, 27, 28, 29, 30, 31};
    for (int64_t head = 0; head < 2; ++head) {
      CHECK(layer.lists[size_t((head + 1) * group_count(layer.params) - 1)] == expected, "KV head %lld, queries of %g",
            (long long)head, fill);
    }
  }
}

// A key whose score is -inf has a weight of exactly zero; a row that sees +inf has no answer, and says so.
void test_infinite_scores() {
  const auto run_with = [](float key) {
    Layer layer(shape(1, 1, 16, 8), 40);
    for (int64_t t = 0; t < 40; ++t) layer.query[size_t(t * 16)] = 1.0f;
    for (int64_t d = 1; d < 16; ++d) layer.key[size_t(5 * 16 + d)] = 0.0f;
    layer.key[5 * 16] = key;
    layer.call(0, 40);
    return layer;
  };
  const Layer small = run_with(-3e38f), smallest = run_with(-INFINITY), largest = run_with(INFINITY);
  for (int64_t t = 0; t < 40; ++t) {
    CHECK(t == 5 || smallest.output(t * 16) == small.output(t * 16), "row %lld", (long long)t);
    CHECK(std::isfinite(smallest.output(t * 16)), "row %lld", (long long)t);
    CHECK(std::isnan(largest.output(t * 16)) == (t >= 5), "row %lld", (long long)t);
  }
}

void test_large_scores_do_not_overflow() {
  for (const float softcap : {0.0f, 50.0f}) {
    Params params = shape(2, 1, 16, 16);
    params.scale = 300.0f;
    params.softcap = softcap;
    expect_output(params, 0, 200, "peaked", kPeakedTolerance);
    expect_output(params, 199, 1, "peaked, decode", kPeakedTolerance);
  }
  Params params = sparse(64);
  params.scale = 300.0f;
  params.pooling = Pooling::kMoments;
  params.refine = 5;
  expect_output(params, 0, 500, "peaked, sparse", kPeakedTolerance);
  expect_output(params, 499, 1, "peaked, sparse decode", kPeakedTolerance);
}

// Subnormal keys and values are computed with, not flushed: half of them, beside ordinary ones, and alone.
void test_subnormals() {
  for (const bool all : {false, true}) {
    Layer layer(shape(2, 1, 16, 16), 100);
    for (size_t i = 0; i < layer.key.size(); ++i) {
      if (all || i / 16 % 2 == 0) layer.key[i] *= 1e-39f, layer.value[i] *= 1e-39f;
    }
    layer.call(0, 100, edgerun::serial(), true);
    Counters counted;
    const double error = layer.error(&counted);
    // Alone they keep 17 bits or so, a weighted sum of them as many.
    CHECK(error < (all ? 1e-4 : kFloatTolerance), "%s: error %g", all ? "all" : "half", error);
  }
}

// One selection for three tokens: each call attends what the first of the three chose, and all that came since.
void test_kept_selections() {
  for (const Dtypes& dtypes : kDtypes) {
    Params params = with(sparse(16), dtypes);
    params.pooling = Pooling::kMoments;
    params.refine = 5;
    params.reselect = 3;
    params.budget += 2;
    const int64_t before = 450, last = 460;
    Layer layer(params, last);
    layer.call(0, before, threads(3));
    std::vector<std::vector<uint16_t>> first;
    for (int64_t at = before; at < last; ++at) {
      layer.call(at, 1, threads(3), true);
      Counters counted;
      const double error = layer.error(&counted);
      const bool rounded = kernels().integer_products && params.cache_dtype == Dtype::kInt8;
      const double limit = std::max(kFloatTolerance, rounded ? kInt8Tolerance : 0.0);
      CHECK(error < (params.dtype == Dtype::kHalf ? kHalfTolerance : limit), "token %lld: error %g", (long long)at,
            error);
      if ((at - before) % 3 == 0) first = layer.lists;
      for (size_t head = 0; head < first.size(); ++head) {
        std::vector<uint16_t> expected = first[head];
        for (int64_t b = expected.back() + 1; b <= at / 16; ++b) expected.push_back(uint16_t(b));
        CHECK(layer.lists[head] == expected, "token %lld attends another list", (long long)at);
        CHECK(int64_t(expected.size()) <= params.budget / 16 + 1, "%zu micro-blocks", expected.size());
      }
    }
  }
}

// The kernels of selection against plain loops in double, at every size of their register tiles and beyond.
void test_selection_kernels() {
  Random random(3);
  const Kernels& variant = kernels();
  for (const int64_t width : {1, 3, 16, 20, 64, 70}) {
    for (const int64_t pooled : {1, 2, 4, 5, 16, 18}) {
      for (const int64_t count : {1, 2, 4, 7, 9}) {
        for (const bool bounds : {false, true}) {
          const int64_t stride = round_up(pooled, variant.lanes);
          std::vector<float> queries(size_t(pooled * width)), rows(size_t(count * width * 2));
          std::vector<uint16_t> halves(rows.size());
          for (float& x : queries) x = random.uniform();
          for (size_t i = 0; i < rows.size(); ++i) {
            halves[i] = edgerun::float_to_half(random.uniform());
            rows[i] = edgerun::half_to_float(halves[i]);
          }
          std::vector<float> scores(size_t(count * stride), 0.0f), alone(size_t(count * stride), 0.0f);
          variant.score(queries.data(), pooled, halves.data(), count, width, bounds, scores.data(), stride);
          for (int64_t r = 0; r < count; ++r) {
            const float* row = rows.data() + r * width * (bounds ? 2 : 1);
            for (int64_t q = 0; q < pooled; ++q) {
              double truth = 0;
              for (int64_t d = 0; d < width; ++d) {
                const double low = double(queries[size_t(q * width + d)]) * row[d];
                truth += bounds ? std::max(low, double(queries[size_t(q * width + d)]) * row[width + d]) : low;
              }
              const float got = scores[size_t(r * stride + q)];
              CHECK(std::abs(got - truth) < 1e-6 * double(width), "%g, not %g", got, truth);
              variant.score(&queries[size_t(q * width)], 1, &halves[size_t(row - rows.data())], 1, width, bounds,
                            alone.data(), variant.lanes);
              CHECK(alone[0] == got, "a score depends on its neighbours: %g, %g", alone[0], got);
            }
          }
          for (float& x : scores) x *= 40.0f;
          std::vector<float> masses(static_cast<size_t>(stride));
          variant.mass(scores.data(), stride, count, masses.data());
          double largest = -INFINITY;
          for (int64_t q = 0; q < pooled; ++q) {
            double sum = 0;
            for (int64_t r = 0; r < count; ++r) sum += std::exp2(double(scores[size_t(r * stride + q)]));
            CHECK(std::abs(std::log2(sum) - masses[size_t(q)]) < 1e-6 * std::max(1.0, std::abs(std::log2(sum))),
                  "mass %g, not %g", masses[size_t(q)], std::log2(sum));
            largest = std::max(largest, double(scores[size_t(q)]) - std::log2(sum));
          }
          const float share = variant.largest_share(scores.data(), stride, 1, masses.data(), pooled);
          CHECK(std::abs(share - largest) < 1e-6 * std::max(1000.0, std::abs(largest)), "share %g, not %g", share,
                largest);
          scores[0] = NAN;
          const float others = variant.largest_share(scores.data(), stride, 1, masses.data(), pooled);
          CHECK(pooled == 1 ? others == -INFINITY : std::isfinite(others), "a NaN is passed over: %g", others);
        }
      }
    }
  }
}

// What a second ranking and a boundary read of the keys, against plain loops, from every cache and at odd sizes.
void test_kernels_that_read_channels() {
  for (const Dtypes& dtypes : kDtypes) {
    for (const int64_t depth : {7, 20, 40}) {
      Layer layer(with(shape(1, 1, depth, 4), dtypes), 48);
      layer.call(0, 48);
      const char* keys = layer.key_cache.data();
      const std::vector<int32_t> channels = {0, 2, int32_t(depth) - 1};
      std::vector<float> weights, masses(6);
      for (int i = 0; i < 18; ++i) weights.push_back(2.0f * std::sin(float(i)));
      kernels().channel_masses(weights.data(), 6, channels.data(), 3, keys + layer.key_bytes(), depth, dtypes.cache,
                               masses.data());
      for (int q = 0; q < 6; ++q) {
        double sum = 0;
        for (int64_t i = 16; i < 32; ++i) {
          double logit = 0;
          for (int c = 0; c < 3; ++c)
            logit += double(weights[size_t(3 * q + c)]) * layer.stored(true, 0, i, channels[c]);
          sum += std::exp2(logit);
        }
        CHECK(std::abs(masses[size_t(q)] - std::log2(sum)) < 2e-6, "mass %g, not %g", masses[size_t(q)],
              std::log2(sum));
      }
      double dots[kGapSums] = {}, squares[kGapSums] = {};
      kernels().gap_sums(keys, keys + layer.key_bytes(), depth, dtypes.cache, dots, squares);
      const auto window = [&](int64_t i, int64_t d) {
        double total = 0;
        for (int64_t j = 4 + i; j < 8 + i; ++j) total += layer.stored(true, 0, j, d);
        return total;
      };
      for (int64_t i = 0; i < 21; ++i) {
        double dot = 0, square = 0;
        for (int64_t d = 0; d < depth; ++d) {
          square += window(i, d) * window(i, d);
          if (i < 17) dot += window(i, d) * window(i + 4, d);
        }
        CHECK(std::abs(squares[i] - square) < 1e-9 && (i >= 17 || std::abs(dots[i] - dot) < 1e-9), "gap %lld",
              (long long)i);
      }
    }
  }
}

// Scratch is bounded by the budget: what it holds of a longer text is one float per pooled query and three more per
// micro-block, hidden by what attention needs.
void test_scratch_does_not_grow() {
  Params params = shape(8, 2, 128, 4096);
  params.tokens = 512;
  params.refine = 16;
  params.pooling = Pooling::kMoments;
  for (const int64_t budget : {0, 2048}) {
    params.budget = budget;
    params.input_pos = 16384 - 512;
    const size_t short_bytes = scratch_bytes(params, 2);
    params.input_pos = 32768 - 512;
    CHECK(scratch_bytes(params, 2) == short_bytes, "budget %lld: %zu, then %zu bytes", (long long)budget, short_bytes,
          scratch_bytes(params, 2));
  }
}

void test_vector_functions() {
  using namespace edgerun::dhsa::under_test;
  double exp_error = 0, tanh_error = 0, log_error = 0;
  for (int i = 0; i < 400000; ++i) {
    const float x = -100.0f + 0.00027f * static_cast<float>(i);
    exp_error = std::max(exp_error, std::abs(weight(splat(x))[0] / std::exp2(double(x)) - 1));
    const float y = 0.00005f * static_cast<float>(i - 200000);
    const float z = std::exp2(0.0001f * static_cast<float>(i));
    const double log = std::log2(double(z));
    log_error = std::max(log_error, std::abs(log2_vector(splat(z))[0] - log) / std::max(1.0, log));
    if (y != 0) tanh_error = std::max(tanh_error, std::abs(tanh_vector(splat(y))[0] / std::tanh(double(y)) - 1));
  }
  CHECK(exp_error < kExpTolerance, "exp2 error %g", exp_error);
  CHECK(tanh_error < kExpTolerance, "tanh error %g", tanh_error);
  CHECK(log_error < kExpTolerance, "log2 error %g", log_error);
  CHECK(log2_vector(splat(1.0f))[0] == 0.0f && log2_vector(splat(1024.0f))[0] == 10.0f, "exact powers of two");
  CHECK(std::isnan(log2_vector(splat(NAN))[0]), "NaN stays");
  Vector rows[kLanes];
  for (int i = 0; i < kLanes; ++i) rows[i] = splat(static_cast<float>(i)) + 0.25f;
  const Vector folded = fold_vectors<kLanes>(rows);
  for (int i = 0; i < kLanes; ++i) CHECK(folded[i] == kLanes * (i + 0.25f), "lane %d: %g", i, folded[i]);
  for (int i = 0; i < kLanes; ++i) {
    Vector lanes = splat(-2.0f);
    lanes[i] = 7.0f;
    CHECK(largest_lane(lanes) == 7.0f, "lane %d", i);
  }
  CHECK(weight(splat(0.0f))[0] == 1.0f && weight(splat(-INFINITY))[0] == 0.0f, "exact at 0 and -inf");
  CHECK(std::isnan(weight(splat(NAN))[0]) && std::isnan(tanh_vector(splat(NAN))[0]), "NaN stays");
  CHECK(tanh_vector(splat(1e30f))[0] == 1.0f && tanh_vector(splat(-1e30f))[0] == -1.0f, "saturated");
}

void test_half_conversions() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const uint16_t half = static_cast<uint16_t>(bits);
    const float x = edgerun::half_to_float(half);
    const int exponent = half >> 10 & 31, mantissa = half & 1023;
    float truth = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
    if (exponent == 31) truth = mantissa ? NAN : INFINITY;
    if (half & 0x8000) truth = -truth;
    CHECK(x == truth || (std::isnan(x) && std::isnan(truth)), "half %04x", bits);
    if (!std::isnan(x)) CHECK(edgerun::float_to_half(x) == half, "half %04x back", bits);
    if (std::isfinite(x)) {  // as the kernel that scores halves reads it: in a whole vector, and behind the last one
      const uint16_t row[17] = {half, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, half};
      float queries[2][17] = {{1.0f}, {}}, read[32];
      queries[1][16] = 1.0f;
      kernels().score(queries[0], 2, row, 1, 17, false, read, kernels().lanes);
      CHECK(read[0] == x && read[1] == x, "half %04x read as %g and %g", bits, read[0], read[1]);
    }
    if (exponent < 30) {  // between two neighbours: to the nearer, and ties to the even one
      const float next = edgerun::half_to_float(static_cast<uint16_t>(half + 1)), middle = x + (next - x) / 2;
      CHECK(edgerun::float_to_half(middle) == (mantissa & 1 ? half + 1 : half), "tie above %04x", bits);
      CHECK(edgerun::float_to_half(std::nextafter(middle, next)) == half + 1, "above %04x", bits);
    }
  }
  CHECK(edgerun::float_to_half(65519.0f) == 0x7bff && edgerun::float_to_half(65520.0f) == 0x7c00, "overflow");
}

void test_check_names_what_is_wrong() {
  const auto refused = [](void (*change)(Params&)) {
    Params params = sparse(64);
    params.tokens = 1;
    change(params);
    float cell = 0;
    uint8_t flag = 0;
    return check(params, Tensors{&cell, &cell, &cell, &cell, &cell, &cell, &cell, &flag}) != nullptr;
  };
  CHECK(!refused([](Params&) {}), "a valid call");
  CHECK(refused([](Params& p) { p.tokens = 0; }), "no tokens");
  CHECK(refused([](Params& p) { p.input_pos = p.capacity_blocks * 16; }), "beyond the cache");
  CHECK(refused([](Params& p) { p.input_pos = -1; }), "negative position");
  CHECK(refused([](Params& p) { p.input_pos = std::numeric_limits<int64_t>::max(); }), "no overflow");
  CHECK(refused([](Params& p) { p.query_heads = 3; }), "heads");
  CHECK(refused([](Params& p) { p.budget = 155; }), "budget below 16 + 64 + 12 + 64");
  CHECK(refused([](Params& p) { p.budget = std::numeric_limits<int64_t>::min(); }), "negative budget");
  CHECK(refused([](Params& p) { p.tile = std::numeric_limits<int64_t>::max(); }), "tile beyond the budget");
  CHECK(refused([](Params& p) { p.sink = std::numeric_limits<int64_t>::max() - 15; }), "sink beyond the budget");
  CHECK(refused([](Params& p) { p.sink = 8; }), "sink");
  CHECK(refused([](Params& p) { p.tile = 0; }), "tile");
  CHECK(refused([](Params& p) { p.scale = INFINITY; }), "scale");
  CHECK(refused([](Params& p) { p.pooling = static_cast<Pooling>(5); }), "pooling");
  Params params = sparse(64);
  CHECK(check(params, Tensors{}) != nullptr, "null tensors");
}

}  // namespace

int main(int count, char** arguments) {
  const char* only = count > 1 ? arguments[1] : nullptr;  // a variant's name, which this CPU must have
  if (only != nullptr && !use_kernels(only)) {
    std::printf("no variant %s here; the fastest is %s\n", only, kernels().name);
    return 2;
  }
  test_vector_functions();
  test_scratch_does_not_grow();
  test_check_names_what_is_wrong();
  for (int64_t i = 0; i < kernel_count(); ++i) {
    use_kernels(kernel_at(i).name);
    if (only != nullptr && std::strcmp(kernels().name, only) != 0) continue;
    test_half_conversions();
    test_outputs();
    test_lists();
    test_state_is_the_same_for_every_partition();
    test_cuts_at_tiles_change_no_bit();
    test_threads_change_no_bit();
    test_budget_of_everything_is_dense_bit_for_bit();
    test_grouped_heads_equal_repeated_heads();
    test_nan_stays_where_it_is();
    test_nothing_leaks_from_behind_the_frontier();
    test_infinite_scores();
    test_large_scores_do_not_overflow();
    test_subnormals();
    test_kept_selections();
    test_selection_kernels();
    test_kernels_that_read_channels();
    test_stale_flags_are_survived();
    test_ties_go_to_the_lower_id();
    std::printf("%s: %d failures so far\n", kernels().name, failures);
  }
  return failures == 0 ? 0 : 1;
}
