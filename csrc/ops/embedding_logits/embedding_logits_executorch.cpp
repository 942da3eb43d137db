// edgerun::embedding_logits.out(Tensor hidden, Tensor table, Tensor? scales, *, Tensor(a!) out) in ExecuTorch.
#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>
#include <executorch/runtime/kernel/kernel_includes.h>
#include <executorch/runtime/kernel/thread_parallel_interface.h>

#include "csrc/ops/embedding_logits/embedding_logits.h"
#include "csrc/ops/embedding_lookup/table_of_tensors.h"

namespace edgerun::embedding {
namespace {

using executorch::aten::ScalarType;
using executorch::aten::SizesType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::KernelRuntimeContext;

void run_on_pool(void*, int64_t workers, ParallelBody body, void* body_context) {
  executorch::extension::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) body(body_context, worker);
  });
}

Tensor& embedding_logits_out(KernelRuntimeContext& context, const Tensor& hidden, const Tensor& table,
                             const executorch::aten::optional<Tensor>& scales, Tensor& out) {
  const std::optional<Table> view = table_of(table, scales);
  ET_KERNEL_CHECK_MSG(context, view, InvalidArgument, out, "embedding_logits: table and scales do not fit together");
  const ssize_t dims = hidden.dim();
  ET_KERNEL_CHECK(context,
                  dims > 0 && dims <= 8 && hidden.size(dims - 1) == view->hidden &&
                      hidden.scalar_type() == ScalarType::Float && out.scalar_type() == ScalarType::Float,
                  InvalidArgument, out);
  SizesType sizes[8];
  for (ssize_t d = 0; d + 1 < dims; ++d) sizes[d] = static_cast<SizesType>(hidden.size(d));
  sizes[dims - 1] = static_cast<SizesType>(view->vocab);
  const Error error = executorch::runtime::resize_tensor(out, {sizes, static_cast<size_t>(dims)});
  ET_KERNEL_CHECK(context, error == Error::Ok, InvalidArgument, out);
  const Parallel pool{run_on_pool, nullptr, executorch::extension::get_thread_count()};
  logits(*view, hidden.const_data_ptr<float>(), hidden.numel() / view->hidden, out.mutable_data_ptr<float>(), pool);
  return out;
}

}  // namespace
}  // namespace edgerun::embedding

EXECUTORCH_LIBRARY(edgerun, "embedding_logits.out", edgerun::embedding::embedding_logits_out);
