// edgerun::embedding_lookup.out(Tensor table, Tensor? scales, Tensor ids, *, Tensor(a!) out) in ExecuTorch.
#include "csrc/base/executorch_binding.h"
#include "csrc/ops/embedding_lookup/table_of_tensors.h"

namespace edgerun::embedding {
namespace {

using executorch::aten::ScalarType;
using executorch::aten::SizesType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::KernelRuntimeContext;

Tensor& embedding_lookup_out(KernelRuntimeContext& context, const Tensor& table,
                             const executorch::aten::optional<Tensor>& scales, const Tensor& ids, Tensor& out) {
  const std::optional<Table> view = table_of(table, scales);
  ET_KERNEL_CHECK_MSG(context, view, InvalidArgument, out, "embedding_lookup: table and scales do not fit together");
  ET_KERNEL_CHECK(context,
                  ids.scalar_type() == ScalarType::Long && out.scalar_type() == ScalarType::Float && ids.dim() < 8,
                  InvalidArgument, out);
  const int64_t* id = ids.const_data_ptr<int64_t>();
  const int64_t invalid = first_invalid_id(*view, id, ids.numel());
  ET_KERNEL_CHECK_MSG(context, invalid < 0, InvalidArgument, out,
                      "embedding_lookup: token id %lld is outside [0, %lld)", static_cast<long long>(id[invalid]),
                      static_cast<long long>(view->vocab));
  SizesType sizes[8];
  for (ssize_t d = 0; d < ids.dim(); ++d) sizes[d] = static_cast<SizesType>(ids.size(d));
  sizes[ids.dim()] = static_cast<SizesType>(view->hidden);
  const Error error = executorch::runtime::resize_tensor(out, {sizes, static_cast<size_t>(ids.dim()) + 1});
  ET_KERNEL_CHECK(context, error == Error::Ok, InvalidArgument, out);
  lookup(*view, id, ids.numel(), out.mutable_data_ptr<float>());
  return out;
}

EDGERUN_REGISTER_OP("edgerun::embedding_lookup.out", embedding_lookup_out);

}  // namespace
}  // namespace edgerun::embedding
