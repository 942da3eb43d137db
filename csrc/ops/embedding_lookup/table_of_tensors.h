// ExecuTorch's tensors as the table that the embedding kernels take, checked once for both ops.
#pragma once

#include <executorch/runtime/kernel/kernel_includes.h>

#include <optional>

#include "csrc/ops/embedding_lookup/embedding_lookup.h"

namespace edgerun::embedding {

// Nothing when the tensors are not a table: [vocab, hidden] float, half or int8, not empty, with scales [vocab] for int8 alone.
inline std::optional<Table> table_of(const executorch::aten::Tensor& table,
                                     const executorch::aten::optional<executorch::aten::Tensor>& scales) {
  using executorch::aten::ScalarType;
  if (table.dim() != 2 || table.numel() == 0) return std::nullopt;
  const bool is_int8 = table.scalar_type() == ScalarType::Char;
  if (scales.has_value() != is_int8) return std::nullopt;
  if (is_int8 && (scales->scalar_type() != ScalarType::Float || scales->numel() != table.size(0))) return std::nullopt;
  TableType type = TableType::kInt8;
  if (table.scalar_type() == ScalarType::Float) {
    type = TableType::kFloat32;
  } else if (table.scalar_type() == ScalarType::Half) {
    type = TableType::kFloat16;
  } else if (!is_int8) {
    return std::nullopt;
  }
  return Table{table.const_data_ptr(), is_int8 ? scales->const_data_ptr<float>() : nullptr, type, table.size(0),
               table.size(1)};
}

}  // namespace edgerun::embedding
