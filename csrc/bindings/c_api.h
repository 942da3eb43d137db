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

#define EDGERUN_API_VERSION 2 /* raised when a caller of the version before would break */

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

/* ---- video: a prompt's token ids in, frames out (csrc/runtime/video_session.h) */

typedef struct edgerun_video_session edgerun_video_session;

typedef enum edgerun_video_stage {
  EDGERUN_VIDEO_ENCODE = 0,
  EDGERUN_VIDEO_DENOISE = 1,
  EDGERUN_VIDEO_DECODE = 2
} edgerun_video_stage;

typedef enum edgerun_video_leap {
  EDGERUN_VIDEO_LEAP_BUNDLE = -1, /* as the bundle says */
  EDGERUN_VIDEO_LEAP_NONE = 0,
  EDGERUN_VIDEO_LEAP_FIXED = 1,
  EDGERUN_VIDEO_LEAP_COSINE = 2
} edgerun_video_leap;

typedef enum edgerun_video_solver {
  EDGERUN_VIDEO_SOLVER_BUNDLE = -1, /* as the bundle says */
  EDGERUN_VIDEO_SOLVER_EULER = 0,
  EDGERUN_VIDEO_SOLVER_AB2 = 1 /* Adams-Bashforth, second order */
} edgerun_video_solver;

typedef struct edgerun_video_options {
  size_t struct_bytes;
  int32_t verify;             /* 1: compare the programs' sha256 with the manifest's; 0: sizes and paths only */
  int32_t threads;            /* of the process's pool; 0: as it is */
  int32_t prefetch;           /* programs to load ahead; 0: none */
  int64_t memory_limit_bytes; /* for what the whole process has in RAM; 0: none */
} edgerun_video_options;

typedef struct edgerun_video_info {
  size_t struct_bytes;
  int64_t frames, height, width;
  double fps;
  int64_t channels, latent_frames, latent_height, latent_width;
  int64_t steps;
  double guidance;
  int64_t min_tokens, max_tokens; /* of a prompt */
  int64_t threads;                /* of the process's pool */
  const char* build;              /* lives as long as the session */
} edgerun_video_info;

typedef struct edgerun_video_progress {
  edgerun_video_stage stage;
  int64_t done, total; /* prompts, steps, or chunks of latents and then calls for frames */
  int64_t evaluations; /* of the denoiser so far */
  double time;         /* of the diffusion, 1 is noise */
  double elapsed_ms;
} edgerun_video_progress;

typedef int32_t (*edgerun_video_callback)(const edgerun_video_progress* progress, void* user); /* not 0: cancel */

typedef struct edgerun_video_generate_options {
  size_t struct_bytes;
  double guidance; /* NaN: the bundle's */
  uint64_t seed;
  const float* noise; /* [channels, latent frames, height, width] instead of the seed's, or null */
  size_t noise_count;
  const double* times; /* from 1 down instead of the bundle's, or null */
  size_t time_count;
  edgerun_video_leap leap;
  int64_t leap_evaluations;
  double leap_latest_time, leap_tolerance;
  int64_t leap_patience;
  int64_t merge_steps; /* -1: the bundle's */
  const void* state;   /* of an earlier run, to go on from, or null; the ids are not read then */
  size_t state_bytes;
  float* latent_out;              /* [channels, latent frames, height, width] or null */
  uint8_t* frames_out;            /* [frames, height, width, 3]; null: nothing is decoded */
  edgerun_step_callback on_block; /* before every program; not 0: cancel */
  edgerun_video_solver solver;    /* how steps are made */
} edgerun_video_generate_options;

typedef struct edgerun_video_result {
  size_t struct_bytes;
  int32_t cancelled;   /* 1: the run stopped early; edgerun_video_session_state goes on from there */
  int64_t evaluations; /* of the denoiser, both halves of guidance being one */
} edgerun_video_result;

EDGERUN_API edgerun_video_options edgerun_video_options_default(void);
EDGERUN_API edgerun_video_generate_options edgerun_video_generate_options_default(void);
EDGERUN_API edgerun_status edgerun_video_session_open(const char* bundle_path, const edgerun_video_options* options,
                                                      edgerun_video_session** session);
EDGERUN_API void edgerun_video_session_close(edgerun_video_session* session); /* null is allowed */
EDGERUN_API edgerun_status edgerun_video_session_generate(edgerun_video_session* session, const int64_t* ids,
                                                          size_t count, const edgerun_video_generate_options* options,
                                                          edgerun_video_callback on_progress, void* user,
                                                          edgerun_video_result* result);
/* From any thread. */
EDGERUN_API void edgerun_video_session_cancel(edgerun_video_session* session);
EDGERUN_API edgerun_status edgerun_video_session_set_memory_limit(edgerun_video_session* session, int64_t bytes);
EDGERUN_API edgerun_status edgerun_video_session_info(const edgerun_video_session* session, edgerun_video_info* info);
/* The last run's state, and what it measured as JSON. Both live until the next call of the same function. */
EDGERUN_API edgerun_status edgerun_video_session_state(edgerun_video_session* session, const void** state,
                                                       size_t* bytes);
EDGERUN_API edgerun_status edgerun_video_session_report(edgerun_video_session* session, const char** json);

#ifdef __cplusplus
}
#endif

#endif /* EDGERUN_C_API_H_ */
