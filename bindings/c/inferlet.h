/* inferlet.h -- the C binding of piehost, ABI version 1 (docs/abi.md).
 *
 * An inferlet is a program that drives the generation of a language model itself. piehost starts
 * it with everything it needs already open, so this binding only encodes, decodes and waits. It is
 * two files with no dependency but libc; this header is its documentation.
 *
 * WHEN A CALL WAITS. Calls marked (queued) append a command to an outbox and never wait for an
 * answer. The outbox leaves in one frame when the program waits, when it is full, when pie_flush is
 * called, and when the program returns from main or calls exit. After _exit, or a signal, what was
 * not flushed is lost. Calls marked (waits) wait for an answer. Calls marked (local) look up what
 * the process was started with.
 *
 * ANSWERS. The last parameter of a queued call is where the future of its answer goes, or NULL when
 * no answer is wanted. A future is waited for or forgotten exactly once; at most PIE_MAX_FUTURES
 * may be outstanding.
 *
 * ERRORS. A call gives 0 (PIE_OK) or a code of docs/abi.md section 9, and pie_error tells what, why
 * and what to try. A call that makes a handle gives one with id 0 instead; so does a future. Using
 * such a handle is PIE_BAD_HANDLE, and waiting for such a future gives the error that made it so:
 * a program may check at the end. A failed command stops its queue until pie_synchronize reports
 * it. PIE_CLOSED and PIE_BAD_FRAME of the connection itself are final. Nothing here calls exit.
 *
 * THREADS. One connection a process, used by one thread at a time. pie_init makes the process
 * ignore SIGPIPE if it had no handler, so that a lost controller is an error and not a signal. */
#ifndef INFERLET_H
#define INFERLET_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define PIE_ABI 1
#define PIE_MAX_FRAME 65536    /* octets of a frame's body, both directions */
#define PIE_MAX_COMMANDS 4096  /* commands in a frame */
#define PIE_MAX_MESSAGE 60000  /* octets of pie_send */
#define PIE_MAX_TEXT 32768     /* octets of pie_tokenize */
#define PIE_MAX_STOP 64        /* stop tokens of one sample */
#define PIE_MAX_READS 1024     /* read spans of one forward */
#define PIE_MAX_FUTURES 1024   /* answers outstanding or not yet waited for */

/* ---------------------------------------------------------------------------------- errors --- */

enum {
    PIE_OK = 0,
    PIE_BAD_FRAME = 1,      /* what the controller sent is not the ABI; final */
    PIE_BAD_HANDLE = 2,     /* forged, stale, foreign, in use, or an id of 0 */
    PIE_BAD_SPAN = 3,       /* outside what the handle holds, wrong length, overlapping */
    PIE_BAD_POSITION = 4,   /* at or beyond max_context, or a wrong number of positions */
    PIE_BAD_ARGUMENT = 5,   /* out of range, or a command too large for a frame */
    PIE_BAD_MASK = 6,       /* a mask of the wrong size */
    PIE_OVER_QUOTA = 7,     /* a cap in pie_limits, or PIE_MAX_FUTURES */
    PIE_SHARED_PAGE = 8,    /* a write into a page that another handle holds too */
    PIE_UNWRITTEN = 9,      /* an embed or token that nothing was written to */
    PIE_CANCELLED = 10,     /* dropped by pie_cancel or pie_destroy_queue */
    PIE_OUT_OF_MEMORY = 11, /* more KV pages than the machine has; or malloc failed here */
    PIE_BACKEND = 12,       /* the step failed or the backend is gone */
    PIE_MISSING_TRAIT = 13, /* the model does not realise what the command needs */
    PIE_CLOSED = 14         /* the other side will send no more */
};

typedef struct {
    int code;
    const char *message; /* what and why */
    const char *hint;    /* what to try; may be empty */
} pie_error_info;

/* (local) The last error of any call. The strings are the binding's, until the next failure. */
pie_error_info pie_error(void);
/* (local) "bad_handle" for PIE_BAD_HANDLE and so on; never NULL. */
const char *pie_error_name(int code);
/* (local) Writes "who: bad_handle: message (try: hint)" and a newline to standard error. */
void pie_perror(const char *who);

/* --------------------------------------------------------------------------------- handles --- */

/* One id each, chosen by the binding, so making something never waits. Copy them freely. Each lasts
 * until its own dealloc or destroy call, or until the queue it was made through is destroyed. */
typedef struct { uint32_t id; } pie_queue;  /* orders the commands put on it */
typedef struct { uint32_t id; } pie_kvpage; /* an array of KV pages, addressed by slot */
typedef struct { uint32_t id; } pie_emb;    /* an array of embeds: model inputs and outputs */
typedef struct { uint32_t id; } pie_token;  /* a late-bound token: known to the accelerator first */
typedef struct { uint64_t id; } pie_future; /* an answer that will come; 0: there is none */

typedef struct { pie_kvpage kv; uint32_t first, length; } pie_kv_span;   /* in slots */
typedef struct { pie_emb emb; uint32_t first, length; } pie_emb_span;    /* in embeds */

/* A token where text is meant: an id (>= 0), or a late-bound one (pie_late), or PIE_NO_TOKEN. */
typedef int64_t pie_ref;
#define PIE_NO_TOKEN ((pie_ref)-1)
/* (local) The reference that stands for `token`. */
pie_ref pie_late(pie_token token);

/* --------------------------------------------------------------------- connection, start-up --- */

typedef struct {
    const char *name, *description, *architecture;
    const char *chat_template; /* Jinja, or NULL */
    const char *const *traits;
    uint32_t trait_count;
    uint32_t page_size; /* slots a page: 8, 16 or 32 */
    uint32_t vocab_size, hidden_size;
    uint32_t max_context; /* positions are 0 to max_context - 1 */
    pie_ref bos_token;    /* or PIE_NO_TOKEN */
    const pie_ref *eos_tokens;
    uint32_t eos_count;
} pie_model;

typedef struct {
    uint32_t kv_pages, embeds, tokens; /* held at once */
    uint32_t commands;                 /* queued and not yet carried out */
    uint32_t frame_bytes, top_k, ring_bytes;
} pie_limits;

/* (local) Reads the start-up block, maps ring out and the vocabulary. Call it first, once. Nothing
 * is sent. PIE_CLOSED if the program was not started by piehost. */
int pie_init(void);
/* Sends the outbox. Blocks only while the socket is full; waits for no answer. */
int pie_flush(void);

/* The strings and arrays behind these are the binding's and stay valid until the program ends. */
/* (local) This inferlet's id. */
const char *pie_get_id(void);
/* (local) Argument `index` from 0, of those after `--`; NULL beyond the last. */
const char *pie_get_arg(uint32_t index);
/* (local) The models; `count` gets how many. */
const pie_model *pie_available_models(uint32_t *count);
/* (local) The traits that model number `model` realises; NULL and 0 if there is no such model. */
const char *const *pie_available_traits(uint32_t model, uint32_t *count);
/* (local) Slots a KV page of model number `model` has; 0 if there is no such model. */
uint32_t pie_get_kvpage_size(uint32_t model);
/* (local) The caps of this inferlet. */
const pie_limits *pie_get_limits(void);

/* --------------------------------------------------------------------------------- answers --- */

typedef enum { PIE_NIL, PIE_NUMBER, PIE_BYTES, PIE_TOKENS } pie_kind;

typedef struct {
    pie_kind kind;   /* which of the below it is */
    pie_ref number;  /* PIE_NUMBER: a token id or a count; PIE_NO_TOKEN for all others */
    uint8_t *bytes;  /* PIE_BYTES: `length` octets and a NUL after them; yours to free() */
    pie_ref *tokens; /* PIE_TOKENS: `length` token ids; yours to free() */
    size_t length;
} pie_value;

/* (waits) The answer of `future`, which is then used up, also when this fails. Answers of others
 * that come meanwhile are kept for them. `value` may be NULL. */
int pie_wait(pie_future future, pie_value *value);
/* Sends the outbox and reads what has arrived, without waiting. True once `future` is answered or
 * the connection has failed, so that pie_wait on it returns at once. */
bool pie_ready(pie_future future);
/* (local) Gives the answer up, whether it has come or not. An id of 0 is no error. */
void pie_forget(pie_future future);

/* -------------------------------------------------------------------------------- messages --- */

/* (queued) A message of at most PIE_MAX_MESSAGE octets to whoever launched this. `data` is copied.
 * Answer: nil. */
int pie_send(const void *data, size_t length, pie_future *answer);
/* (queued) Asks for the next message. Answer: PIE_BYTES; PIE_CLOSED when there will be none. */
int pie_receive(pie_future *answer);

/* ---------------------------------------------------------------------------------- queues --- */

/* (queued) A queue for model number `model`. Ended by pie_destroy_queue. Answer: nil. */
pie_queue pie_create_queue(uint32_t model, pie_future *answer);
/* (queued) At once, not in order: drops what has not run (those commands answer PIE_CANCELLED) and
 * frees every page, embed and token made through the queue. Answer: nil. */
int pie_destroy_queue(pie_queue queue, pie_future *answer);
/* (queued) Answered when everything before it on the queue has been carried out: nil, or the error
 * that stopped the queue, which then is usable again. */
int pie_synchronize(pie_queue queue, pie_future *answer);
/* (queued) -8 to 7, at first 0; higher goes first. At once, not in order. Answer: nil. */
int pie_set_queue_priority(pie_queue queue, int priority, pie_future *answer);
/* (queued) Drops what has not been handed to the accelerator; those commands answer PIE_CANCELLED
 * and the queue goes on. At once, not in order. Answer: nil. */
int pie_cancel(pie_queue queue, pie_future *answer);

/* ---------------------------------------------------------------------------------- memory --- */

/* (queued) `pages` (>= 1) pages, freed by pie_dealloc_kvpage. Answer: nil. */
pie_kvpage pie_alloc_kvpage(pie_queue queue, uint32_t pages, pie_future *answer);
/* (queued) Frees all that is left of `kv` from page `first_page` on; from 0, the handle too.
 * Answer: nil. */
int pie_dealloc_kvpage(pie_queue queue, pie_kvpage kv, uint32_t first_page, pie_future *answer);
/* (queued) Frees `pages` pages of `kv` from `first_page` on; the others keep their slot numbers.
 * Answer: nil. */
int pie_dealloc_kvpage_range(pie_queue queue, pie_kvpage kv, uint32_t first_page, uint32_t pages,
                             pie_future *answer);
/* (queued) A new handle for whole pages of `source`, shared until the last handle lets them go;
 * writing into a shared page is PIE_SHARED_PAGE. Answer: nil. */
pie_kvpage pie_share_kvpage(pie_queue queue, pie_kvpage source, uint32_t first_page, uint32_t pages,
                            pie_future *answer);
/* (queued) Copies slots (keys, values, position, visible bit) between spans of one length.
 * Answer: nil. */
int pie_copy_kvpage(pie_queue queue, pie_kv_span source, pie_kv_span target, pie_future *answer);
/* (queued) Shows or hides slots. A new write makes its slot visible. Answer: nil. */
int pie_mask_kvpage(pie_queue queue, pie_kv_span span, bool visible, pie_future *answer);
/* (queued) `count` (>= 1) embeds, freed by pie_dealloc_emb. Answer: nil. */
pie_emb pie_alloc_emb(pie_queue queue, uint32_t count, pie_future *answer);
/* (queued) Frees all embeds of the handle. Answer: nil. */
int pie_dealloc_emb(pie_queue queue, pie_emb emb, pie_future *answer);
/* (local) A handle for pie_sample to bind; it costs nothing until then. */
pie_token pie_new_token(void);
/* (queued) Frees a token that was sampled. Answer: nil. */
int pie_dealloc_token(pie_queue queue, pie_token token, pie_future *answer);

/* --------------------------------------------------------------------------- text and model --- */

/* (queued) Fills `count` embeds from `first` on with tokens at positions `position`,
 * `position` + 1 and so on. The arrays are copied. Answer: nil. */
int pie_embed_txt(pie_queue queue, pie_emb target, uint32_t first, const pie_ref *tokens,
                  uint32_t count, uint32_t position, pie_future *answer);
/* (queued) The same with a position for each. */
int pie_embed_txt_at(pie_queue queue, pie_emb target, uint32_t first, const pie_ref *tokens,
                     uint32_t count, const uint32_t *positions, pie_future *answer);

/* What one forward does. Zero what is not used: `(pie_pass){ .inputs = ... }`. */
typedef struct {
    pie_emb_span inputs;       /* filled by pie_embed_txt */
    const pie_kv_span *reads;  /* slots attended to, beside the inputs themselves */
    uint32_t read_count;       /* at most PIE_MAX_READS */
    pie_kv_span write;         /* where the inputs' keys and values go; kv.id 0: nowhere */
    pie_emb_span outputs;      /* hidden states of the last `length` inputs; emb.id 0: none */
    const uint32_t *positions; /* one an input, replacing those of the embeds; or NULL */
    const uint8_t *mask;       /* packed (see pie_pack_mask), decides alone; or NULL */
    size_t mask_length;        /* octets */
} pie_pass;

/* (queued) Runs the model. All arrays are copied. Answer: nil. */
int pie_forward(pie_queue queue, const pie_pass *pass, pie_future *answer);
/* (local) Packs `rows` x `columns` booleans (row-major, true: attend) as a mask: `packed` has
 * rows * ((columns + 7) / 8) octets. Columns are the slots of `reads` in order, then the inputs. */
void pie_pack_mask(const bool *attend, uint32_t rows, uint32_t columns, uint8_t *packed);

/* (queued) Writes the `k` most probable tokens into ring out at `offset` (a multiple of 4; it takes
 * 8 * k octets). Do not use the place again before the answer. Answer: PIE_NUMBER, how many were
 * written; nil if a stop dropped it. */
int pie_get_next_dist(pie_queue queue, pie_emb emb, uint32_t index, uint32_t k, uint32_t offset,
                      pie_future *answer);

typedef struct {
    const uint32_t *tokens;     /* most probable first */
    const float *probabilities; /* of the softmax over the whole vocabulary */
    uint32_t count;
} pie_dist;
/* (local) The `count` entries that pie_get_next_dist answered, at `offset` of ring out. The arrays
 * lie in the ring and last until the place is used again. PIE_BAD_ARGUMENT outside the ring. */
int pie_read_dist(uint32_t offset, uint32_t count, pie_dist *dist);

/* How to draw a token. All zero is greedy. */
typedef struct {
    double temperature; /* 0: the most probable token, and the others change nothing */
    uint32_t top_k;     /* keep the k most probable; 0: off */
    double top_p;       /* keep the fewest that reach this probability; 0 or 1: off */
    double min_p;       /* keep those with this share of the top probability; 0: off */
    bool seeded;        /* true: draw by `seed` and position, so that a run can be repeated */
    uint64_t seed;
    const pie_ref *stop; /* token ids that stop what depends on this token */
    uint32_t stop_count; /* at most PIE_MAX_STOP */
    bool lazy;           /* the answer may be held back (16 answers, 0.4 s) to share a frame */
} pie_sampling;

/* (queued) Draws from the hidden state in embed `index` of `emb` and binds `token` to it; a token
 * may be bound again and again. `sampling` is copied; NULL is greedy. Answer: PIE_NUMBER, the token
 * id; nil if an earlier stop dropped it. */
int pie_sample(pie_queue queue, pie_emb emb, uint32_t index, pie_token token,
               const pie_sampling *sampling, pie_future *answer);

/* (queued) The token ids of a whole UTF-8 text of at most PIE_MAX_TEXT octets; `special` adds the
 * tokenizer's own BOS and EOS. Answer: PIE_TOKENS. */
int pie_tokenize(uint32_t model, const char *text, size_t length, bool special, pie_future *answer);
/* (local) Writes the octets of `tokens` to `text`, at most `capacity` of them and no NUL; control
 * tokens and ids outside the vocabulary have none. Returns the length of the whole. */
size_t pie_detokenize(const pie_ref *tokens, size_t count, char *text, size_t capacity);

typedef struct {
    const char *text; /* `length` octets, perhaps part of a character; no NUL */
    uint32_t length;
    bool control; /* a control token: no text of its own when detokenized */
} pie_vocab;
/* (local) Fills `vocabs` with the tokens from `first` on, at most `capacity`; returns how many the
 * vocabulary has. The texts stay valid until the program ends. */
uint32_t pie_get_vocabs(uint32_t first, pie_vocab *vocabs, uint32_t capacity);

/* ------------------------------------------------------------------------- support: stream --- */

/* Text from tokens as they come, never splitting a UTF-8 character. Start with `{0}`. */
typedef struct {
    char *buffer; /* what was last returned; the stream's own */
    size_t capacity;
    uint8_t held[4]; /* a character's first octets, waiting for the others */
    uint8_t count, need, low, high;
} pie_stream;

/* (local) The characters that `token` completes: valid UTF-8 with a NUL after it, octets that
 * can be no character replaced by U+FFFD. `length` may be NULL. The text is the stream's, until its
 * next call. NULL if malloc failed. */
const char *pie_stream_push(pie_stream *stream, pie_ref token, size_t *length);
/* (local) What is left at the end: empty, or U+FFFD for a character cut short. */
const char *pie_stream_end(pie_stream *stream, size_t *length);
/* (local) Frees what the stream holds and makes it `{0}` again. */
void pie_stream_free(pie_stream *stream);

/* ------------------------------------------------------------------------ support: context --- */

/* A text and its KV pages on a queue of its own. After an error every call on it gives that error;
 * destroy it then. */
typedef struct pie_context pie_context;

/* (queued) An empty context; ended by pie_context_destroy. NULL on failure. */
pie_context *pie_context_create(uint32_t model);
/* (queued) Frees the context and all that its queue holds. NULL is no error. */
void pie_context_destroy(pie_context *context);
/* (waits for the tokenizer) Appends a text; `special` as for pie_tokenize. */
int pie_context_fill(pie_context *context, const char *text, size_t length, bool special);
/* (queued) Appends tokens, in forwards of at most 512. The array is copied. */
int pie_context_fill_tokens(pie_context *context, const pie_ref *tokens, uint32_t count);

/* Called with each token as it comes; a result other than 0 ends the generation there. It may make
 * any call but those on the same context. */
typedef int (*pie_on_token)(pie_ref token, void *user);

/* (waits) Appends up to `count` tokens. It ends early at a token of `sampling->stop`, which joins
 * the context but is not passed to `on_token`, and where `on_token` says so. Steps are queued in
 * chains of late-bound tokens, the next before the last has ended, so the accelerator never waits
 * for this process; `lazy` is the binding's to set. PIE_BAD_POSITION when the model's context is
 * full (what came before was passed on). `on_token` may be NULL. */
int pie_context_generate(pie_context *context, uint32_t count, const pie_sampling *sampling,
                         pie_on_token on_token, void *user);

#ifdef __cplusplus
}
#endif

#endif
