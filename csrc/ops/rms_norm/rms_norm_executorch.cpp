// edgerun::rms_norm.out(Tensor x, Tensor? weight, float eps, *, Tensor(a!) out) in ExecuTorch.
#include "csrc/base/executorch_binding.h"
#include "csrc/ops/rms_norm/rms_norm.h"

namespace edgerun::rms_norm {
namespace {

using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::KernelRuntimeContext;

Tensor& rms_norm_out(KernelRuntimeContext& context, const Tensor& x, const executorch::aten::optional<Tensor>& weight,
                     double eps, Tensor& out) {
  const ScalarType type = x.scalar_type();
  ET_KERNEL_CHECK_MSG(context,
                      x.dim() > 0 && (type == ScalarType::Float || type == ScalarType::Half) &&
                          out.scalar_type() == type && executorch::runtime::tensor_is_default_dim_order(x) &&
                          executorch::runtime::tensor_is_default_dim_order(out),
                      InvalidArgument, out, "rms_norm: x and out must be contiguous, both float32 or both float16");
  const int64_t size = x.size(x.dim() - 1);
  ET_KERNEL_CHECK_MSG(context,
                      !weight.has_value() || (weight->scalar_type() == ScalarType::Float && weight->numel() == size),
                      InvalidArgument, out, "rms_norm: the weight is not float32 [%lld]", static_cast<long long>(size));
  ET_KERNEL_CHECK_MSG(context, eps >= 0.0, InvalidArgument, out, "rms_norm: eps is %g; it cannot be below 0", eps);
  const Error error = executorch::runtime::resize_tensor(out, x.sizes());
  ET_KERNEL_CHECK(context, error == Error::Ok, InvalidArgument, out);
  const Params params{size == 0 ? 0 : x.numel() / size, size, static_cast<float>(eps),
                      type == ScalarType::Half ? Dtype::kFloat16 : Dtype::kFloat32};
  normalize(params, x.const_data_ptr(), weight.has_value() ? weight->const_data_ptr<float>() : nullptr,
            out.mutable_data_ptr(), executorch_pool());
  return out;
}

EDGERUN_REGISTER_OP("edgerun::rms_norm.out", rms_norm_out);

}  // namespace
}  // namespace edgerun::rms_norm
