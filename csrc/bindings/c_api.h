/* edgerun's C boundary: what Python, Java, Swift and the runner stand on. Opaque handles, status codes, and a message
 * per thread; no exception crosses it. Structs begin with their size, so that a later version can add members at
 * their end: fill them with the _default function and then change what differs. */
#ifndef EDGERUN_C_API_H_
#define EDGERUN_C_API_H_

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define EDGERUN_API __declspec(dllexport)
#else
#define EDGERUN_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define EDGERUN_API_VERSION 1 /* raised when a caller of the version before would break */

typedef enum edgerun_status { /* the codes of csrc/base/status.h */
                              EDGERUN_OK = 0,
                              EDGERUN_INVALID_ARGUMENT = 1,
                              EDGERUN_NOT_FOUND = 2,
                              EDGERUN_CORRUPT = 3,
                              EDGERUN_OUT_OF_MEMORY = 4,
                              EDGERUN_CANCELLED = 5,
                              EDGERUN_INTERNAL = 6
} edgerun_status;

typedef enum edgerun_finish {
  EDGERUN_FINISH_LENGTH = 0, /* max_new_tokens, the end of the forced tokens, or a full context */
  EDGERUN_FINISH_EOS = 1,    /* one of the bundle's end tokens */
  EDGERUN_FINISH_STOP = 2,   /* another of stop_ids */
  EDGERUN_FINISH_CANCELLED = 3
} edgerun_finish;

typedef struct edgerun_text_session edgerun_text_session;

typedef struct edgerun_session_options {
  size_t struct_bytes;
  int32_t verify;  /* 1: compare the program's sha256 with the manifest's; 0: sizes and paths only */
  int32_t threads; /* of the process's pool; 0: as it is */
} edgerun_session_options;

typedef struct edgerun_session_info {
  size_t struct_bytes;
  int64_t vocab_size;
  int64_t max_context;   /* tokens */
  int64_t prefill_slice; /* tokens */
  int64_t cached_tokens;
  int64_t threads;   /* of the process's pool */
  const char* build; /* the recipe's hash; lives as long as the session */
} edgerun_session_info;

/* Times in milliseconds of a monotonic clock, NaN where it has not happened; the names are ExecuTorch's. */
typedef struct edgerun_stats {
  size_t struct_bytes;
  int64_t prompt_tokens;
  int64_t generated_tokens;
  double model_load_start_ms;
  double model_load_end_ms;
  double inference_start_ms;
  double inference_end_ms;
  double prompt_eval_end_ms;
  double first_token_ms;
  double aggregate_sampling_time_ms;
  int64_t peak_rss_bytes; /* of the process, so far; -1: unknown */
  int64_t attended_pairs; /* (query, key) pairs per KV head, summed over layers, of the last call */
  int64_t causal_pairs;   /* what dense attention would have attended */
} edgerun_stats;

typedef int32_t (*edgerun_token_callback)(int64_t token, void* user); /* not 0: cancel */
typedef int32_t (*edgerun_step_callback)(void* user);                 /* before every slice and token; not 0: cancel */

typedef struct edgerun_generate_options {
  size_t struct_bytes;
  int64_t max_new_tokens; /* 0: only prefill */
  float temperature;      /* 0: greedy */
  int64_t top_k;          /* 0: all */
  float top_p;            /* 1: all */
  uint64_t seed;
  int32_t has_stop_ids; /* 1: stop_ids instead of the bundle's end tokens, also when there are none */
  const int64_t* stop_ids;
  size_t stop_count;
  const int64_t* forced_ids; /* fed in turn instead of sampled tokens */
  size_t forced_count;
  float* logits_out; /* [forced_count + 1, vocab_size] or null; not null: nothing is sampled */
  edgerun_step_callback on_step;
} edgerun_generate_options;

typedef struct edgerun_generate_result {
  size_t struct_bytes;
  edgerun_finish finish;
  edgerun_stats stats;
} edgerun_generate_result;

EDGERUN_API int32_t edgerun_api_version(void);
EDGERUN_API const char* edgerun_version(void);
EDGERUN_API int64_t edgerun_threads(void); /* of the process's pool */
/* What went wrong in this thread's last call that did not return EDGERUN_OK: value, limit, next step, in one line. */
EDGERUN_API const char* edgerun_last_error(void);

EDGERUN_API edgerun_session_options edgerun_session_options_default(void);
EDGERUN_API edgerun_generate_options edgerun_generate_options_default(void);

/* options: null for the defaults. *session is set on success only; give it back with _close. */
EDGERUN_API edgerun_status edgerun_text_session_open(const char* bundle_path, const edgerun_session_options* options,
                                                     edgerun_text_session** session);
EDGERUN_API void edgerun_text_session_close(edgerun_text_session* session); /* null is allowed */

/* Appends the prompt to the conversation and generates; each token goes to on_token (null is allowed) as it comes. */
EDGERUN_API edgerun_status edgerun_text_session_generate(edgerun_text_session* session, const int64_t* ids,
                                                         size_t count, const edgerun_generate_options* options,
                                                         edgerun_token_callback on_token, void* user,
                                                         edgerun_generate_result* result);
/* Drops what is cached from input_pos on, appends the ids, writes vocab_size logits of the last. */
EDGERUN_API edgerun_status edgerun_text_session_forward(edgerun_text_session* session, const int64_t* ids, size_t count,
                                                        int64_t input_pos, float* logits_out);
EDGERUN_API edgerun_status edgerun_text_session_reset(edgerun_text_session* session);
/* From any thread: the running call ends before its next slice or token. */
EDGERUN_API void edgerun_text_session_cancel(edgerun_text_session* session);
EDGERUN_API edgerun_status edgerun_text_session_info(const edgerun_text_session* session, edgerun_session_info* info);
EDGERUN_API edgerun_status edgerun_text_session_stats(const edgerun_text_session* session, edgerun_stats* stats);

#ifdef __cplusplus
}
#endif

#endif /* EDGERUN_C_API_H_ */
