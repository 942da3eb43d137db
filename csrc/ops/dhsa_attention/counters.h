// What a session and the attention of its calls tell each other. Exported by libedgerun_ops.
#pragma once

#include "csrc/ops/dhsa_attention/dhsa_attention.h"

// Every later call of the op on this thread adds its counters to *sink; nullptr ends that. The op reads and writes the
// sink only on the thread that calls it.
void set_attention_counters(edgerun::dhsa::Counters* sink);

// Later calls of the op on this thread are parts of a text that ends after so many tokens; 0: they do not know. Where
// the text will fill whole huge pages of the caches, the op asks for them, so RAM is taken earlier but not more of it.
void set_attention_expected_tokens(int64_t tokens);
