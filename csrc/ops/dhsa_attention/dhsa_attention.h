// dhsa_attention: attention over a growing key/value cache, dense or sparse by Dynamic Hierarchical Sparse Attention.
// One call appends S tokens to the cache, keeps the chunk boundaries and chunk summaries, selects for every query
// tile the micro-blocks worth attending, and attends them exactly.
//
//   out[t, h] = softmax_j(cap(scale * q[t,h] . k[j,g(h)])) v[j,g(h)]
//                                                        over j in list(tile(t), g(h)), j <= t, j > t - window
//   cap(x) = softcap * tanh(x / softcap) when softcap > 0, else x;      g(h) = h / (query_heads / kv_heads)
//
// DHSA: arXiv 2510.24606 v1. What is ours: micro-blocks, local streaming boundaries, one list per KV head, decode.
//
// Units (n = tokens stored after the call, p = input_pos, so n = p + S):
//   micro-block b   = tokens [16 b, 16 b + 16). Everything a kernel reads or lists is a micro-block.
//   edge e          = a multiple of 16. boundaries[e / 16] == 1 means that a chunk starts at token e.
//   chunk           = the run of micro-blocks from one cut edge to the next: 16 to 64 tokens.
//
// Boundaries (kept only by the layer with finds_boundaries; the other layers read what it wrote in the same call):
//   A cut is decided for edge e > 0 once e + kBoundaryReach <= n (kBoundaryReach = 8 + 4). Edge 0 is always cut.
//   cut(e) = e % 64 == 0 or (chunking == kCosine and max over gaps g in [e - 8, e + 8] of
//            1 - cos(mean(x[g-4..g-1]), mean(x[g..g+3])) > boundary_threshold),
//   x[i] = the keys of token i of all KV heads, concatenated, as the cache holds them. Scores are computed in double;
//   a zero mean gives cosine 0. A call first clears every flag with e + kBoundaryReach > p (truncation), then decides
//   the edges that became decidable. Flags not decided are 0.
//
// Cache: floats, halves, or 8-bit integers with a scale for each token, of values and of every 32 channels of keys:
//   x ~ q * s, s = half(max |x| / 127), q = round(x / s) to even, at most 127 in magnitude. The scale belongs to one
//   token, so a token is quantised when it arrives, whatever comes after it, and no open micro-block is kept aside. q *
//   s is exact in float. Where a key or value is not finite its s is NaN. A micro-block is the integers, then the
//   scales. Variants with integer products round queries and weights to 16 bits beside it: 1.5e-5 of the largest.
//
// Summaries (kept when budget > 0 and selector == kChunk): summaries[g][b] for every *complete* micro-block, from the
//   keys as the cache holds them: the mean of 16 keys in float (one vector), with kMinMax pooling the elementwise
//   minimum then maximum, with kMoments the mean then the variance, 1/16 sum (k - mean)^2 (two vectors). Stored as
//   halves of at most 65504. Those of incomplete micro-blocks are not defined.
//
// Query groups: rows of one call that lie in one tile of the absolute grid [m T, m T + T). s = first row's position,
//   E = last row's position + 1.
//
// List of a group, per KV head (micro-blocks ascending), decided in this order:
//   1. window > 0                   -> every micro-block that holds a token in (s - window, E).
//   2. budget == 0, or E <= budget, or 2 <= S <= dense_tail -> [0, E): the dense list.
//   3. otherwise  L = the largest cut edge e with e == 0 or e + kBoundaryReach <= s
//      forced = [0, min(sink, L)) and [L, E);  extra = (budget - forced tokens) / 16 micro-blocks (rounded down),
//      chosen among the micro-blocks of [sink, L) in order of (score descending, id ascending).
//      selector kRecent: score = id (window + sink). selector kChunk: score = the score of the micro-block's chunk,
//      so whole chunks in score order, and of the first that does not fit its leading micro-blocks. A chunk
//      that straddles `sink` counts its micro-blocks from `sink` on only.
//      refine > 0, kChunk with kMoments, and the group is one row (so always in decode, and with T = 1): the
//      max(2 extra, 256) first micro-blocks in that order are scored again, one by one (see below), and extra of them
//      chosen in the new order. A single query looks for single tokens, which the moments of 16 keys can hide.
//   `sink` is a multiple of 16. budget >= sink + 64 + kBoundaryReach + tile + reselect - 1, or the call is refused.
//
// Decode with reselect = r > 1: a call of one row whose list was chosen by 3 keeps what it chose for up to r - 1 calls
//   after it, each of one row at the position after the last one's: their lists are [0, sink), the same chosen
//   micro-blocks, and [L, E) with the L of then. extra = (budget - forced tokens - (r - 1)) / 16 for a call of one row,
//   so that the budget holds for all of them. Any other call, a prompt or a step back, forgets it.
//
// Score of chunk c = {micro-blocks} for the pooled queries Q (float): max over q in Q of score(q, c), where with
//   t(b) = q . summary[b] (float)
//   kMean:    sum_b t(b) / |c|                     kSqrt:    16-token units: sqrt(16 |c|) * sum_b t(b) / |c|
//   kCentred: sqrt(16 |c|) * (sum_b t(b) / |c| - mean of t over all micro-blocks of [0, L))
//   kMinMax:  max_b sum_d max(q_d * minimum[b][d], q_d * maximum[b][d])
//   kMoments: an estimate of the attention that the chunk's tokens get. The logits scale * q . k of a micro-block are
//             taken as normal, so log mean exp(scale * q . k) ~
//             t(b) = scale * q . mean[b] + 1/2 scale^2 sum_d q_d^2 variance[b][d];
//             score = log(sum_{b in c} exp t(b) / |c|) - log(sum_{b in [0, L)} exp t(b)).  Softcap is not considered.
//   refined:  as kMoments for one micro-block b, but what the queries' largest channels R = {d: max over Q of |q_d| is
//             at least the refine-th largest} give is computed from the keys (after SparQ, arXiv 2312.04985):
//             log(1/16 sum_{i in b} exp(scale sum_{d in R} q_d k[i][d])) + scale sum_{d not in R} q_d mean[b][d]
//             + 1/2 scale^2 sum_{d not in R} q_d^2 variance[b][d]  - log(sum_{b in [0, L)} exp t(b)).
//   Q: kQueryMean: one vector, the mean of the group's rows and of the KV head's query heads.
//      kQueryMax:  for each query head of the KV head and each 16-row segment (absolute 16-grid) of the group, the mean
//                  of its rows.
//   No scale but in kMoments: it does not change the order of the others.
//
// Laws (tests/ops/test_dhsa_attention.py), for finite values: after n tokens cache, summaries and boundaries are
//   bit-identical for every partition of [0, n) into calls; cuts at multiples of `tile` give bit-identical lists and
//   outputs (where dense_tail is 0 and reselect 1: those rules look at the size of the call, and at the calls before
//   it); nothing depends on threads; a list that
//   is the dense list gives the dense output bit for bit.
#pragma once

#include <cstddef>
#include <cstdint>

#include "csrc/base/parallel.h"

namespace edgerun::dhsa {

inline constexpr int64_t kMicroBlock = 16;     // tokens
inline constexpr int64_t kMaxChunk = 64;       // tokens
inline constexpr int64_t kBoundarySpan = 8;    // a cut may be caused by a gap this many tokens from its edge
inline constexpr int64_t kBoundaryWindow = 4;  // keys averaged on either side of a gap
inline constexpr int64_t kBoundaryReach = kBoundarySpan + kBoundaryWindow;
inline constexpr int64_t kRefineFactor = 2;   // micro-blocks scored again: so many times those chosen,
inline constexpr int64_t kRefineLeast = 256;  // and at least so many

inline constexpr int64_t kKeptHeader = 4;  // integers before the micro-blocks of a kept list

inline constexpr int64_t kScaleChannels = 32;  // of a key that share a scale in an 8-bit cache

enum class Dtype : int { kFloat = 0, kHalf = 1, kInt8 = 2 };  // kInt8: caches only
enum class Chunking : int { kFixed = 0, kCosine = 1 };
enum class Pooling : int { kMean = 0, kSqrt = 1, kCentred = 2, kMinMax = 3, kMoments = 4 };
enum class QueryPooling : int { kQueryMean = 0, kQueryMax = 1 };
enum class Selector : int { kChunk = 0, kRecent = 1 };

// P: vectors that summarise a micro-block.
inline constexpr int64_t summary_vectors(Pooling pooling) {
  return pooling == Pooling::kMinMax || pooling == Pooling::kMoments ? 2 : 1;
}

// Bytes of a micro-block of keys and of values in a cache.
static inline constexpr int64_t key_block_bytes(Dtype cache, int64_t head_dim) {
  if (cache != Dtype::kInt8) return kMicroBlock * head_dim * (cache == Dtype::kHalf ? 2 : 4);
  return kMicroBlock * (head_dim + (head_dim + kScaleChannels - 1) / kScaleChannels * 2);
}
static inline constexpr int64_t value_block_bytes(Dtype cache, int64_t head_dim) {
  return cache == Dtype::kInt8 ? kMicroBlock * (head_dim + 2) : key_block_bytes(cache, head_dim);
}

// Integers that a KV head keeps of its last selection: the position of the last call, how many more calls it serves,
// L / 16, how many micro-blocks were chosen, then those.
static inline constexpr int64_t kept_integers(int64_t budget) { return kKeptHeader + budget / kMicroBlock; }

struct Params {
  int64_t tokens = 0;       // S
  int64_t query_heads = 0;  // a multiple of kv_heads
  int64_t kv_heads = 0;
  int64_t head_dim = 0;         // D
  int64_t capacity_blocks = 0;  // M: micro-blocks in the cache; input_pos + tokens <= 16 M
  int64_t input_pos = 0;        // tokens already stored; anything stored at or after it is dropped
  Dtype dtype = Dtype::kFloat;  // of query, key, value and out: kFloat or kHalf; arithmetic is float (but see Cache)
  Dtype cache_dtype = Dtype::kFloat;
  float scale = 1.0f;
  float softcap = 0.0f;  // 0: none
  int64_t window = 0;    // 0: none; a token attends itself and the window - 1 before it
  int64_t budget = 0;    // most distinct key tokens on a group's list; 0: unlimited, dense
  int64_t tile = 64;     // T >= 1
  int64_t sink = 16;
  int64_t dense_tail = 0;
  Chunking chunking = Chunking::kCosine;
  float boundary_threshold = 0.0f;
  bool finds_boundaries = false;
  Pooling pooling = Pooling::kMean;
  QueryPooling query_pooling = QueryPooling::kQueryMax;
  Selector selector = Selector::kChunk;
  int64_t refine = 0;    // channels of the keys that a second ranking reads in decode; 0: none
  int64_t reselect = 1;  // tokens of decode that one selection serves, r
};

// Row-major, contiguous. query [Hq, S, D], key and value [Hkv, S, D], out [S, Hq, D] (ready for the output projection).
struct Tensors {
  const void* query = nullptr;
  const void* key = nullptr;
  const void* value = nullptr;
  void* out = nullptr;
  // kInt8: key_cache [Hkv, M] of { int8 [D, 16], half [ceil(D / 32), 16] }, value_cache of { int8 [16, D], half [16] }.
  void* key_cache = nullptr;      // [Hkv, M, D, 16]: a micro-block is stored transposed
  void* value_cache = nullptr;    // [Hkv, M, 16, D]
  void* summaries = nullptr;      // half [Hkv, M, P, D], P = summary_vectors(pooling); null: budget == 0 or kRecent
  uint8_t* boundaries = nullptr;  // [M + 1]; may be null when budget == 0
  int32_t* selection = nullptr;   // [Hkv, kept_integers(budget)]; may be null when budget == 0 or reselect == 1
};

// What a call attended, counted from the lists: realised density = attended_pairs / causal_pairs.
// Pairs are (query token, key token) per KV head, causal and inside the layer's window.
struct Counters {
  int64_t attended_pairs = 0;
  int64_t causal_pairs = 0;
};

// The lists of one call: one per (KV head, group). A group is the call's rows in one tile.
struct Lists {
  uint16_t* ids = nullptr;    // [Hkv, groups, M], ascending; only the first counts[...] of a row are defined
  int32_t* counts = nullptr;  // [Hkv, groups]
};

// Number of groups: tiles of the absolute grid that [input_pos, input_pos + tokens) touches.
int64_t group_count(const Params& params);

// nullptr when the call can be served, else a static text that names what is wrong. The kernel assumes it was asked.
const char* check(const Params& params, const Tensors& tensors);

// Bytes of scratch that `run` needs with this many workers. Per worker: a list, bounded by the budget, and the larger
// of what attention needs, bounded by the rows of a tile, and what selection needs: per micro-block in use 12 bytes,
// and 4 for every pooled query in whole vectors. So it grows with the text only where selection needs more than
// attention.
size_t scratch_bytes(const Params& params, int64_t workers);

// The op: append, boundaries, summaries, select, attend. `scratch` is aligned to 64 bytes. Fills *counters if not null.
void run(const Params& params, const Tensors& tensors, void* scratch, const Parallel& parallel, Counters* counters);

// Two of its stages alone, for tests and timing, on a state that holds the call's tokens. `attend` takes any lists;
// `select` gives the list that a call kept for its own position, and keeps none.
void select(const Params& params, const Tensors& tensors, const Lists& lists, void* scratch, const Parallel& parallel);
void attend(const Params& params, const Tensors& tensors, const Lists& lists, void* scratch, const Parallel& parallel,
            Counters* counters);

}  // namespace edgerun::dhsa
