// Where a session learns what the attention of its calls attended. Exported by libedgerun_ops.
#pragma once

#include "csrc/ops/dhsa_attention/dhsa_attention.h"

// Every later call of the op on this thread adds its counters to *sink; nullptr ends that. The op reads and writes the
// sink only on the thread that calls it.
void set_attention_counters(edgerun::dhsa::Counters* sink);
