// edgerun::embedding_logits.out(Tensor hidden, Tensor table, Tensor? scales, *, Tensor(a!) out) in ExecuTorch.
#include "csrc/base/executorch_binding.h"
#include "csrc/ops/embedding_logits/embedding_logits.h"
#include "csrc/ops/embedding_lookup/table_of_tensors.h"

namespace edgerun::embedding {
namespace {

using executorch::aten::ScalarType;
using executorch::aten::SizesType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::KernelRuntimeContext;

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
  logits(*view, hidden.const_data_ptr<float>(), hidden.numel() / view->hidden, out.mutable_data_ptr<float>(),
         executorch_pool());
  return out;
}

EDGERUN_REGISTER_OP("edgerun::embedding_logits.out", embedding_logits_out);

}  // namespace
}  // namespace edgerun::embedding
