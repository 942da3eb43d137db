// edgerun::dhsa_attention.out in ExecuTorch. Schema: edgerun/ops/dhsa_attention.py. Equation: dhsa_attention.h.
#include "csrc/base/executorch_binding.h"
#include "csrc/base/huge_pages.h"
#include "csrc/ops/dhsa_attention/counters.h"
#include "csrc/ops/dhsa_attention/dhsa_attention.h"

namespace edgerun::dhsa {
namespace {

using executorch::aten::ScalarType;
using executorch::aten::SizesType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::KernelRuntimeContext;

thread_local Counters* counters_sink = nullptr;
thread_local int64_t expected_tokens = 0;

bool has_sizes(const Tensor& tensor, std::initializer_list<int64_t> sizes) {
  if (tensor.dim() != static_cast<ssize_t>(sizes.size())) return false;
  ssize_t axis = 0;
  for (const int64_t size : sizes) {
    if (tensor.size(axis++) != size) return false;
  }
  return true;
}

bool contiguous(std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* tensor : tensors) {
    if (!executorch::runtime::tensor_is_default_dim_order(*tensor)) return false;
  }
  return true;
}

Dtype dtype_of(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  return type == ScalarType::Half ? Dtype::kHalf : type == ScalarType::Char ? Dtype::kInt8 : Dtype::kFloat;
}

// What is wrong with the state's dtypes and shapes, or nullptr.
const char* check_state(const Tensor& key_cache, const Tensor& value_cache, const Tensor& summaries,
                        const Tensor& boundaries, const Tensor& selection, int64_t depth, Pooling pooling) {
  const ScalarType dtype = key_cache.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::Half && dtype != ScalarType::Char) {
    return "the caches must be float32, float16 or int8";
  }
  if (value_cache.scalar_type() != dtype) return "the caches must share one dtype";
  if (summaries.scalar_type() != ScalarType::Half) return "summaries must be float16";
  if (boundaries.scalar_type() != ScalarType::Byte) return "boundaries must be uint8";
  const int64_t heads = key_cache.size(0);
  const int64_t blocks = key_cache.size(1);
  if (dtype == ScalarType::Char) {
    if (!has_sizes(key_cache, {heads, blocks, key_block_bytes(Dtype::kInt8, depth)}) ||
        !has_sizes(value_cache, {heads, blocks, value_block_bytes(Dtype::kInt8, depth)})) {
      return "int8 caches must be [kv heads, micro-blocks, bytes of a micro-block]";
    }
  } else if (!has_sizes(key_cache, {heads, blocks, depth, kMicroBlock}) ||
             !has_sizes(value_cache, {heads, blocks, kMicroBlock, depth})) {
    return "the caches must be [kv heads, micro-blocks, head_dim, 16] and [kv heads, micro-blocks, 16, head_dim]";
  }
  if (summaries.numel() > 0 && !has_sizes(summaries, {heads, blocks, summary_vectors(pooling), depth})) {
    return "summaries must be [kv heads, micro-blocks, 1 or (min-max, moments) 2, head_dim], or empty";
  }
  if (boundaries.numel() > 0 && !has_sizes(boundaries, {blocks + 1})) {
    return "boundaries must be [micro-blocks + 1], or empty";
  }
  if (selection.scalar_type() != ScalarType::Int) return "selection must be int32";
  return nullptr;
}

// What is wrong with the tensors' dtypes and shapes, or nullptr.
const char* check_tensors(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& key_cache,
                          const Tensor& value_cache, const Tensor& summaries, const Tensor& boundaries,
                          const Tensor& selection, const Tensor& input_pos, const Tensor& out, Pooling pooling) {
  if (query.dim() != 4 || query.size(0) != 1) return "query must be [1, query heads, tokens, head_dim]";
  if (key_cache.dim() < 2) return "key_cache must be [kv heads, micro-blocks, ...]";
  const ScalarType dtype = query.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::Half) return "query must be float32 or float16";
  for (const Tensor* tensor : {&key, &value, &out}) {
    if (tensor->scalar_type() != dtype) return "query, key, value and out must share one dtype";
  }
  if (input_pos.scalar_type() != ScalarType::Long || input_pos.numel() != 1) return "input_pos must be one int64";
  const int64_t tokens = query.size(2);
  const int64_t depth = query.size(3);
  const int64_t heads = key_cache.size(0);
  if (!has_sizes(key, {1, heads, tokens, depth}) || !has_sizes(value, {1, heads, tokens, depth})) {
    return "key and value must be [1, kv heads, tokens, head_dim]";
  }
  if (!contiguous({&query, &key, &value, &key_cache, &value_cache, &summaries, &boundaries, &selection, &out})) {
    return "all tensors must be contiguous";
  }
  return check_state(key_cache, value_cache, summaries, boundaries, selection, depth, pooling);
}

Tensors pointers(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& key_cache,
                 const Tensor& value_cache, const Tensor& summaries, const Tensor& boundaries, const Tensor& selection,
                 Tensor& out) {
  Tensors tensors;
  tensors.query = query.const_data_ptr();
  tensors.key = key.const_data_ptr();
  tensors.value = value.const_data_ptr();
  tensors.out = out.mutable_data_ptr();
  tensors.key_cache = key_cache.mutable_data_ptr();
  tensors.value_cache = value_cache.mutable_data_ptr();
  tensors.summaries = summaries.numel() > 0 ? summaries.mutable_data_ptr() : nullptr;
  tensors.boundaries = boundaries.numel() > 0 ? boundaries.mutable_data_ptr<uint8_t>() : nullptr;
  tensors.selection = selection.numel() > 0 ? selection.mutable_data_ptr<int32_t>() : nullptr;
  return tensors;
}

Params sizes_of(const Tensor& query, const Tensor& key_cache, const Tensor& input_pos) {
  Params params;
  params.tokens = query.size(2);
  params.query_heads = query.size(1);
  params.kv_heads = key_cache.size(0);
  params.head_dim = query.size(3);
  params.capacity_blocks = key_cache.size(1);
  params.input_pos = input_pos.const_data_ptr<int64_t>()[0];
  params.dtype = dtype_of(query);
  params.cache_dtype = dtype_of(key_cache);
  return params;
}

// Of [Hkv, M, ...], what the expected tokens fill of every head; all of it is one run where they fill the cache.
void advise_state_of(const Params& params, void* state, int64_t block_bytes, int64_t blocks) {
  const int64_t head_bytes = params.capacity_blocks * block_bytes;
  const bool full = blocks >= params.capacity_blocks;
  const int64_t runs = full ? 1 : params.kv_heads;
  const int64_t bytes = full ? params.kv_heads * head_bytes : blocks * block_bytes;
  for (int64_t run = 0; run < runs; ++run) advise_huge_pages(static_cast<char*>(state) + run * head_bytes, bytes);
}

void advise_state(const Params& params, const Tensors& tensors) {
  const int64_t blocks = expected_tokens / kMicroBlock;
  advise_state_of(params, tensors.key_cache, key_block_bytes(params.cache_dtype, params.head_dim), blocks);
  advise_state_of(params, tensors.value_cache, value_block_bytes(params.cache_dtype, params.head_dim), blocks);
  if (tensors.summaries == nullptr) return;
  advise_state_of(params, tensors.summaries, summary_vectors(params.pooling) * params.head_dim * 2, blocks);
}

// The op, with what a session said and wants to know (counters.h).
void run_for_session(const Params& params, const Tensors& tensors, void* scratch, const Parallel& pool) {
  if (expected_tokens > 0) advise_state(params, tensors);
  Counters counters;
  run(params, tensors, scratch, pool, counters_sink ? &counters : nullptr);
  if (counters_sink) {
    counters_sink->attended_pairs += counters.attended_pairs;
    counters_sink->causal_pairs += counters.causal_pairs;
  }
}

Tensor& dhsa_attention_out(KernelRuntimeContext& context, const Tensor& query, const Tensor& key, const Tensor& value,
                           const Tensor& key_cache, const Tensor& value_cache, const Tensor& summaries,
                           const Tensor& boundaries, const Tensor& selection, const Tensor& input_pos, double scale,
                           double softcap, int64_t window, int64_t budget, int64_t tile, int64_t sink,
                           int64_t dense_tail, int64_t chunking, double boundary_threshold, bool finds_boundaries,
                           int64_t pooling, int64_t query_pooling, int64_t selector, int64_t refine, int64_t reselect,
                           Tensor& out) {
  const char* wrong = check_tensors(query, key, value, key_cache, value_cache, summaries, boundaries, selection,
                                    input_pos, out, static_cast<Pooling>(pooling));
  ET_KERNEL_CHECK_MSG(context, wrong == nullptr, InvalidArgument, out, "dhsa_attention: %s", wrong);

  Params params = sizes_of(query, key_cache, input_pos);
  params.scale = static_cast<float>(scale);
  params.softcap = static_cast<float>(softcap);
  params.window = window;
  params.budget = budget;
  params.tile = tile;
  params.sink = sink;
  params.dense_tail = dense_tail;
  params.chunking = static_cast<Chunking>(chunking);
  params.boundary_threshold = static_cast<float>(boundary_threshold);
  params.finds_boundaries = finds_boundaries;
  params.pooling = static_cast<Pooling>(pooling);
  params.query_pooling = static_cast<QueryPooling>(query_pooling);
  params.selector = static_cast<Selector>(selector);
  params.refine = refine;
  params.reselect = reselect;

  const SizesType sizes[4] = {1, static_cast<SizesType>(params.tokens), static_cast<SizesType>(params.query_heads),
                              static_cast<SizesType>(params.head_dim)};
  const Error resized = executorch::runtime::resize_tensor(out, {sizes, 4});
  ET_KERNEL_CHECK_MSG(context, resized == Error::Ok, InvalidArgument, out,
                      "dhsa_attention: out cannot hold [1, %d, %d, %d]", int(sizes[1]), int(sizes[2]), int(sizes[3]));

  const Tensors tensors = pointers(query, key, value, key_cache, value_cache, summaries, boundaries, selection, out);
  wrong = check(params, tensors);
  if (wrong == nullptr && selection.numel() > 0 &&
      !has_sizes(selection, {params.kv_heads, kept_integers(params.budget)})) {
    wrong = "selection must be [kv heads, 4 + budget / 16], or empty";
  }
  ET_KERNEL_CHECK_MSG(context, wrong == nullptr, InvalidArgument, out,
                      "dhsa_attention: %s (input_pos %lld, tokens %lld, cache of %lld tokens)", wrong,
                      static_cast<long long>(params.input_pos), static_cast<long long>(params.tokens),
                      static_cast<long long>(params.capacity_blocks * kMicroBlock));

  const Parallel pool = executorch_pool();
  const Scratch scratch(context, scratch_bytes(params, pool.threads));
  ET_KERNEL_CHECK_MSG(context, scratch.data() != nullptr, MemoryAllocationFailed, out,
                      "dhsa_attention: no memory for %zu bytes of scratch", scratch_bytes(params, pool.threads));
  run_for_session(params, tensors, scratch.data(), pool);
  return out;
}

EDGERUN_REGISTER_OP("edgerun::dhsa_attention.out", dhsa_attention_out);

}  // namespace
}  // namespace edgerun::dhsa

void set_attention_counters(edgerun::dhsa::Counters* sink) { edgerun::dhsa::counters_sink = sink; }

void set_attention_expected_tokens(int64_t tokens) { edgerun::dhsa::expected_tokens = tokens; }
