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
#define PIE_MAX_MESSAGE 60000  /* octets of a message, a value of the store, a part of a body */
#define PIE_MAX_TEXT 32768     /* octets of pie_tokenize */
#define PIE_MAX_STOP 64        /* stop tokens of one sample */
#define PIE_MAX_BIAS 1024      /* biased tokens of one sample */
#define PIE_MAX_READS 1024     /* read spans of one forward */
#define PIE_MAX_RANGES 1024    /* page ranges of one export */
#define PIE_MAX_CHAT 1024      /* messages of one pie_chat */
#define PIE_MAX_NAME 256       /* octets of a topic, a key of the store, the name of an export */
#define PIE_MAX_URL 8192       /* octets of a URL */
#define PIE_MAX_HEADERS 64     /* headers of one request */
#define PIE_MAX_ARGS 256       /* arguments of one child */
#define PIE_MAX_LISTED 256     /* names in one answer of a list */
#define PIE_MAX_FUTURES 1024   /* answers outstanding or not yet waited for */

/* ---------------------------------------------------------------------------------- errors --- */

enum {
    PIE_OK = 0,
    PIE_BAD_FRAME = 1,      /* what the controller sent is not the ABI; final */
    PIE_BAD_HANDLE = 2,     /* forged, stale, foreign, in use, or an id of 0 */
    PIE_BAD_SPAN = 3,       /* outside what the handle holds, wrong length, overlapping */
    PIE_BAD_POSITION = 4,   /* at or beyond max_context, or a wrong number of positions */
    PIE_BAD_ARGUMENT = 5,   /* out of range, or a command too large for a frame */
    PIE_BAD_MASK = 6,       /* a mask of the wrong size, or one that allows no token */
    PIE_OVER_QUOTA = 7,     /* a cap in pie_limits, or PIE_MAX_FUTURES */
    PIE_SHARED_PAGE = 8,    /* a write into a page that another handle holds too */
    PIE_UNWRITTEN = 9,      /* an embed or token nothing was written to, or of the other kind */
    PIE_CANCELLED = 10,     /* dropped by pie_cancel or pie_destroy_queue */
    PIE_OUT_OF_MEMORY = 11, /* more pages or rows than the machine has; or malloc failed here */
    PIE_BACKEND = 12,       /* the step failed or the backend is gone */
    PIE_MISSING_TRAIT = 13, /* the model does not realise what the command needs */
    PIE_CLOSED = 14,        /* the other side will send no more */
    PIE_DENIED = 15,        /* not allowed to this inferlet: a host nobody granted */
    PIE_NOT_FOUND = 16,     /* no export, or child program, has that name */
    PIE_UNAVAILABLE = 17,   /* a service failed: a web server, the store, a launch */
    PIE_LAGGED = 18         /* messages of a subscription were lost as it was not read in time */
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
 * until the call that ends it, or until the queue it was made through is destroyed. */
typedef struct { uint32_t id; } pie_queue;   /* orders the commands put on it */
typedef struct { uint32_t id; } pie_kvpage;  /* an array of KV pages, addressed by slot */
typedef struct { uint32_t id; } pie_emb;     /* an array of embeds: model inputs and outputs */
typedef struct { uint32_t id; } pie_token;   /* a late-bound one: the accelerator knows it first */
typedef struct { uint32_t id; } pie_history; /* tokens that penalties look at */
typedef struct { uint32_t id; } pie_subscription; /* to the broadcasts of a topic */
typedef struct { uint32_t id; } pie_http;    /* a request and the body of its response */
typedef struct { uint32_t id; } pie_child;   /* an inferlet that this one started */
typedef struct { uint64_t id; } pie_future;  /* an answer that will come; 0: there is none */

typedef struct { pie_kvpage kv; uint32_t first, length; } pie_kv_span;       /* in slots */
typedef struct { pie_emb emb; uint32_t first, length; } pie_emb_span;        /* in embeds */
typedef struct { pie_kvpage kv; uint32_t first_page, pages; } pie_kv_range;  /* in whole pages */

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
    uint32_t frame_bytes, top_k;
    uint32_t ring_bytes, ring_in_bytes; /* ring out and ring in */
    uint32_t history;                   /* tokens in all histories */
    uint32_t export_pages;              /* held by all exports of the user */
    uint32_t children;                  /* descendants alive at once, of the job's first inferlet */
    uint32_t subscriptions;             /* held at once */
    uint32_t http_streams;              /* open at once */
    uint64_t store_bytes;               /* keys and values of the user */
} pie_limits;

/* (local) Reads the start-up block, maps both rings and the vocabulary. Call it first, once.
 * Nothing is sent. PIE_CLOSED if the program was not started by piehost. */
int pie_init(void);
/* Sends the outbox. Blocks only while the socket is full; waits for no answer. */
int pie_flush(void);

/* The strings and arrays behind these are the binding's and stay valid until the program ends. */
/* (local) This inferlet's id: the paper's get_instance_id. */
const char *pie_get_id(void);
/* (local) The version of piehost. */
const char *pie_get_version(void);
/* (local) The user whose store, topics and exports this inferlet sees. */
const char *pie_get_user(void);
/* (local) The job: the id of the inferlet the client launched, or the name it gave the launch. All
 * descendants of an inferlet have its job. */
const char *pie_get_job(void);
/* (local) When this inferlet will be ended, in seconds of Unix time as
 * clock_gettime(CLOCK_REALTIME) counts them; infinity if it will not. */
double pie_get_deadline(void);
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

/* Of the members of a value below, a kind has those named here; all others are 0, or NULL, and
 * `number` is PIE_NO_TOKEN. */
typedef enum {
    PIE_NIL,
    PIE_NUMBER,   /* number: a token id, a count, an exit code */
    PIE_BYTES,    /* bytes, length */
    PIE_TOKENS,   /* tokens, length */
    PIE_BOOL,     /* number: 0 or 1 */
    PIE_TEXT,     /* text */
    PIE_NAMES,    /* names, length */
    PIE_MESSAGE,  /* bytes, length; text: the sender's id */
    PIE_QUOTAS,   /* quotas, length */
    PIE_RESPONSE, /* number: the status; headers, length */
    PIE_IMPORTED, /* number: pages; bytes, length: what the exporter left beside them */
    PIE_EXPORTS,  /* exports, length */
    PIE_SAMPLED   /* number: the token; logprob, entries */
} pie_kind;

typedef struct {
    const char *name; /* "kv_pages", "store_bytes" and so on */
    double left;
} pie_quota_left;

typedef struct {
    const char *name, *value;
} pie_header;

typedef struct {
    const char *name;
    const char *exporter; /* the id of the inferlet that made it */
    uint32_t pages;
    double seconds_left; /* of its lease; below 0: none, it ends with its exporter */
} pie_exported;

typedef struct {
    pie_kind kind;  /* which of the below it has */
    pie_ref number; /* PIE_NO_TOKEN if the kind has none */
    uint8_t *bytes; /* `length` octets and a NUL after them */
    pie_ref *tokens;
    const char *text;
    const char **names;
    pie_quota_left *quotas;
    pie_header *headers;
    pie_exported *exports;
    size_t length;    /* octets of `bytes`, or items of the array that the kind has */
    double logprob;   /* natural logarithm of the token's probability in the model's own softmax */
    uint32_t entries; /* of that softmax, written to ring out: see pie_read_dist */
    void *block;      /* the one block of memory that all of the above lie in, or NULL */
} pie_value;

/* (local) Frees what pie_wait gave and makes it PIE_NIL. Of PIE_BYTES and PIE_TOKENS, free() of
 * `bytes` or `tokens` does the same. */
void pie_value_free(pie_value *value);

/* (waits) The answer of `future`, which is then used up, also when this fails. The value is yours
 * to pie_value_free; after a failure it holds nothing. Answers of others that come meanwhile are
 * kept for them. `value` may be NULL. */
int pie_wait(pie_future future, pie_value *value);
/* Sends the outbox and reads what has arrived, without waiting. True once `future` is answered or
 * the connection has failed, so that pie_wait on it returns at once. */
bool pie_ready(pie_future future);
/* (local) Gives the answer up, whether it has come or not. An id of 0 is no error. */
void pie_forget(pie_future future);

/* ---------------------------------------------------------------------- messages and quota --- */

/* (queued) A message of at most PIE_MAX_MESSAGE octets to whoever launched this. `data` is copied.
 * Answer: nil. */
int pie_send(const void *data, size_t length, pie_future *answer);
/* (queued) Asks for the next message. Answer: PIE_BYTES; PIE_CLOSED when there will be none. */
int pie_receive(pie_future *answer);

/* (queued) What is left of the caps and quotas. Answer: PIE_QUOTAS. */
int pie_quota(pie_future *answer);

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

/* ----------------------------------------------------------------------------------- rings --- */

/* Memory shared with the backend: it reads token masks and vectors from ring in, and writes
 * distributions and vectors into ring out. What lies where is the program's choice; a place that a
 * command was given is not touched until its answer. Offsets are multiples of 4, but for a mask's;
 * numbers are f32 in this machine's order, little-endian. Both begin at a page. */

/* (local) Where ring in is mapped, to be written; `size` (may be NULL) gets its octets. NULL and 0
 * if there is none. */
uint8_t *pie_ring_in(size_t *size);
/* (local) The same of ring out, to be read. */
const uint8_t *pie_ring_out(size_t *size);
/* (local) `count` numbers at `offset` of ring in, for pie_write_emb. They lie in the ring. NULL
 * (PIE_BAD_ARGUMENT) outside it or at a wrong offset. */
float *pie_ring_in_floats(uint32_t offset, size_t count);
/* (local) The same of ring out, where pie_read_emb left them. */
const float *pie_ring_out_floats(uint32_t offset, size_t count);

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
    pie_emb_span inputs;       /* filled by pie_embed_txt, pie_write_emb or a forward */
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

/* (queued) Writes the vectors of embeds into ring out at `offset` (a multiple of 4): `length` times
 * hidden_size numbers. A hidden state, or for text the token's own embedding. Answer: PIE_NUMBER,
 * how many vectors; nil if a stop dropped one of them. */
int pie_read_emb(pie_queue queue, pie_emb_span source, uint32_t offset, pie_future *answer);
/* (queued) Fills embeds with vectors from ring in at `offset` (a multiple of 4), at positions
 * `position`, `position` + 1 and so on. What pie_read_emb gave is kept bit by bit. Answer: nil. */
int pie_write_emb(pie_queue queue, pie_emb_span target, uint32_t offset, uint32_t position,
                  pie_future *answer);
/* (queued) The same with a position for each. The array is copied. */
int pie_write_emb_at(pie_queue queue, pie_emb_span target, uint32_t offset,
                     const uint32_t *positions, pie_future *answer);

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
/* (local) The `count` entries that pie_get_next_dist or pie_sample answered, at `offset` of ring
 * out. The arrays lie in the ring and last until the place is used again. PIE_BAD_ARGUMENT outside
 * the ring. */
int pie_read_dist(uint32_t offset, uint32_t count, pie_dist *dist);

/* (queued) Tokens that penalties look at, freed by pie_dealloc_history. Those of `prompt`, which
 * may be none, count for the repetition penalty alone. The array is copied. Answer: nil. */
pie_history pie_alloc_history(pie_queue queue, const pie_ref *prompt, uint32_t count,
                              pie_future *answer);
/* (queued) Adds tokens, which count for all penalties. pie_sample adds its own. Answer: nil. */
int pie_extend_history(pie_queue queue, pie_history history, const pie_ref *tokens, uint32_t count,
                       pie_future *answer);
/* (queued) Answer: nil. */
int pie_dealloc_history(pie_queue queue, pie_history history, pie_future *answer);

typedef struct {
    pie_ref token; /* an id */
    double bias;   /* added to its logit */
} pie_bias;

/* How to draw a token. All zero is greedy. Penalties, bias and mask come before everything else, in
 * this order, also when greedy. */
typedef struct {
    double temperature; /* 0: the most probable token; top_k, top_p, min_p change nothing then */
    uint32_t top_k;     /* keep the k most probable; 0: off */
    double top_p;       /* keep the fewest that reach this probability; 0 or 1: off */
    double min_p;       /* keep those with this share of the top probability; 0: off */
    bool seeded;        /* true: draw by `seed` and position, so that a run can be repeated */
    uint64_t seed;
    const pie_ref *stop; /* token ids that stop what depends on this token */
    uint32_t stop_count; /* at most PIE_MAX_STOP */
    bool lazy;           /* the answer may be held back (16 answers, 0.4 s) to share a frame */

    bool masked;   /* true: only tokens whose bit is 1 at `mask` are taken */
    uint32_t mask; /* offset in ring in of (vocab_size + 7) / 8 octets; see pie_pack_token_mask */
    const pie_bias *bias;
    uint32_t bias_count;       /* at most PIE_MAX_BIAS */
    pie_history history;       /* for the penalties; the token is added to it. id 0: none */
    double repetition_penalty; /* of what the history holds: above 1 for fewer; 0 or 1: off */
    double presence_penalty;   /* subtracted from the logit of what was added to it; 0: off */
    double frequency_penalty;  /* the same, times how often; 0: off */
    bool logprobs;   /* true: the answer tells the token's log-probability (PIE_SAMPLED) */
    uint32_t k;      /* this many most probable tokens into ring out (PIE_SAMPLED); 0: none */
    uint32_t offset; /* where, as of pie_get_next_dist */
} pie_sampling;

/* (queued) Draws from the hidden state in embed `index` of `emb` and binds `token` to it; a token
 * may be bound again and again. `sampling` is copied; NULL is greedy. Answer: PIE_NUMBER, the token
 * id, or PIE_SAMPLED with `logprobs` or a `k`; nil if an earlier stop dropped it. */
int pie_sample(pie_queue queue, pie_emb emb, uint32_t index, pie_token token,
               const pie_sampling *sampling, pie_future *answer);

/* (local) Packs the tokens that may be taken, in any order, as a mask: `packed` has
 * (vocab_size + 7) / 8 octets, say in ring in. PIE_BAD_ARGUMENT if one is not below `vocab_size`.
 * (Of booleans, one a token, pie_pack_mask makes the same as one row.) */
int pie_pack_token_mask(const pie_ref *allowed, size_t count, uint32_t vocab_size, uint8_t *packed);

/* (queued) The token ids of a whole UTF-8 text of at most PIE_MAX_TEXT octets; `special` adds the
 * tokenizer's own BOS and EOS. Answer: PIE_TOKENS. */
int pie_tokenize(uint32_t model, const char *text, size_t length, bool special, pie_future *answer);

typedef struct {
    const char *role; /* "system", "user", "assistant": what the model's template knows */
    const char *content;
} pie_chat_message;

/* (queued) The token ids of `count` messages (at most PIE_MAX_CHAT) in the model's chat template;
 * `generation_prompt` adds the head of the assistant's next one. All strings are UTF-8 and copied.
 * Answer: PIE_TOKENS; PIE_MISSING_TRAIT if the model has no template. */
int pie_chat(uint32_t model, const pie_chat_message *messages, uint32_t count,
             bool generation_prompt, pie_future *answer);

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

/* ----------------------------------------------------------------------------- broadcasts --- */

/* All strings from here on are NUL-terminated UTF-8 and copied, as are all arrays and octets. Names
 * have 1 to PIE_MAX_NAME octets. Lists leave out names that hold a NUL, as C cannot say them. */

/* (queued) Sends a message of at most PIE_MAX_MESSAGE octets to all subscriptions to `topic` by
 * inferlets of this user, its own too; with `job`, to those by the same job with `job`. Answer:
 * PIE_NUMBER, how many got it. */
int pie_broadcast(const char *topic, const void *data, size_t length, bool job,
                  pie_future *answer);
/* (queued) A subscription, ended by pie_unsubscribe. Answer: nil. */
pie_subscription pie_subscribe(const char *topic, bool job, pie_future *answer);
/* (queued) A waiting pie_next_message gets PIE_CLOSED. Answer: nil. */
int pie_unsubscribe(pie_subscription subscription, pie_future *answer);
/* (queued) Asks for the next message. Answer: PIE_MESSAGE; PIE_LAGGED once after some were lost. */
int pie_next_message(pie_subscription subscription, pie_future *answer);

/* ----------------------------------------------------------------------------------- store --- */

/* Small values of the user, which outlive the server. Each command is atomic. */

/* (queued) Answer: PIE_BYTES, or nil if there is none. */
int pie_store_get(const char *key, pie_future *answer);
/* (queued) A value of at most PIE_MAX_MESSAGE octets. Answer: nil; it is safe then. */
int pie_store_set(const char *key, const void *value, size_t length, pie_future *answer);
/* (queued) Answer: PIE_BOOL, whether it was there. */
int pie_store_delete(const char *key, pie_future *answer);
/* (queued) Answer: PIE_BOOL. */
int pie_store_exists(const char *key, pie_future *answer);
/* (queued) The keys that begin with `prefix` and come after `after`, in order of their octets; NULL
 * is as "". Answer: PIE_NAMES, at most PIE_MAX_LISTED: the last one is the next call's `after`. */
int pie_store_list(const char *prefix, const char *after, pie_future *answer);

/* ------------------------------------------------------------------------------------ http --- */

/* Requests to the hosts that the launch granted; others are PIE_DENIED. A request is open, and
 * counts, until pie_http_close. */

/* (queued) A GET with at most PIE_MAX_HEADERS headers, which may be NULL. Answer: PIE_RESPONSE,
 * also for a status of 400 and more; PIE_UNAVAILABLE if the server could not be reached. */
pie_http pie_http_get(const char *url, const pie_header *headers, uint32_t count,
                      pie_future *answer);
/* (queued) The same for a POST with a body of at most PIE_MAX_MESSAGE octets; with `more`,
 * pie_http_write sends the rest of it, and the answer comes after that. */
pie_http pie_http_post(const char *url, const void *body, size_t length, const pie_header *headers,
                       uint32_t count, bool more, pie_future *answer);
/* (queued) The next at most PIE_MAX_MESSAGE octets of the body. Answer: nil. */
int pie_http_write(pie_http http, const void *data, size_t length, bool more, pie_future *answer);
/* (queued) Answer: PIE_BYTES, the next 1 to 60000 octets of the response's body; 0 at its end. */
int pie_http_read(pie_http http, pie_future *answer);
/* (queued) Ends the request, whether it is done or not. Answer: nil. */
int pie_http_close(pie_http http, pie_future *answer);

/* -------------------------------------------------------------------------------- children --- */

/* (queued) Starts a child with the same user, job, quotas and grants; its pie_send and pie_receive
 * speak to this inferlet, and it ends when this one does. `program` is a name under [children] of
 * inferlet.toml; NULL or "" is the caller's own program. At most PIE_MAX_ARGS arguments. Freed by
 * pie_end_child. Answer: PIE_TEXT, the child's id. */
pie_child pie_spawn(const char *program, const char *const *args, uint32_t count,
                    pie_future *answer);
/* (queued) A message of at most PIE_MAX_MESSAGE octets. Answer: nil. */
int pie_send_child(pie_child child, const void *data, size_t length, pie_future *answer);
/* (queued) Asks for the child's next message. Answer: PIE_BYTES; PIE_CLOSED when there will be
 * none. */
int pie_receive_child(pie_child child, pie_future *answer);
/* (queued) No more messages to the child: its pie_receive is PIE_CLOSED once it has read the
 * others. Answer: nil. */
int pie_close_child(pie_child child, pie_future *answer);
/* (queued) Answered when the child has ended: PIE_NUMBER, its exit code (128 + n: signal n). */
int pie_wait_child(pie_child child, pie_future *answer);
/* (queued) Ends the child if it runs, and frees the handle. Answer: nil. */
int pie_end_child(pie_child child, pie_future *answer);

/* --------------------------------------------------------------------------------- exports --- */

#define PIE_NO_LEASE ((int64_t)-1)

/* (queued) Shares whole pages, side by side (1 to PIE_MAX_RANGES ranges), under a name with the
 * other inferlets of the user, and `meta` beside them (at most PIE_MAX_MESSAGE octets; the tokens,
 * say). They are shared from then on: writing is PIE_SHARED_PAGE. `lease`: how many seconds after
 * the latest export or import it lasts, whoever has ended; PIE_NO_LEASE: it ends with this
 * inferlet. Answer: nil. */
int pie_export_kvpage(pie_queue queue, const char *name, const pie_kv_range *pages, uint32_t count,
                      const void *meta, size_t meta_length, int64_t lease, pie_future *answer);
/* (queued) Ends an export, also another inferlet's. What was imported stays. Answer: nil. */
int pie_unexport_kvpage(const char *name, pie_future *answer);
/* (queued) A handle of the pages of an export, shared, freed by pie_dealloc_kvpage. Answer:
 * PIE_IMPORTED; PIE_NOT_FOUND if there is none of that name. */
pie_kvpage pie_import_kvpage(pie_queue queue, const char *name, pie_future *answer);
/* (queued) The exports whose names begin with `prefix` and come after `after`, in order; NULL is as
 * "". Answer: PIE_EXPORTS, at most PIE_MAX_LISTED: the last name is the next call's `after`. */
int pie_list_exported(const char *prefix, const char *after, pie_future *answer);

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

/* ------------------------------------------------------------------------ support: futures --- */

/* (waits) The answers of all `count` futures, which are then used up. `values` (NULL, or `count` of
 * them) are yours to pie_value_free, each. The result is that of the first that failed; the others
 * are there all the same. */
int pie_gather(const pie_future *futures, uint32_t count, pie_value *values);

/* ------------------------------------------------------------------------ support: context --- */

/* Tokens, and their keys and values in KV pages, on a queue of its own; token i is at position i.
 * What is refused before it reaches the queue (PIE_BAD_ARGUMENT, PIE_BAD_POSITION, PIE_BAD_MASK)
 * changes nothing. Every call but those marked (local) and pie_context_next ends a generation that
 * runs, as pie_context_stop does, and waits for that.
 *
 * An error of the queue (no pages left, the backend gone) is told once, by the call that waits for
 * what failed, and ends a generation. The context is usable again then: it has the tokens it had
 * before that call, those of a generation up to the last that came, gives back its pages, and
 * computes again, when it is asked for more, what is not evicted, attending to what is then
 * visible. */
typedef struct pie_context pie_context;

/* (queued) An empty context; ended by pie_context_destroy. NULL on failure. */
pie_context *pie_context_create(uint32_t model);
/* (queued) Frees the context and all that its queue holds. NULL is no error. */
void pie_context_destroy(pie_context *context);

/* Appended tokens go through the model at once, in forwards of at most 512, or of as many as other
 * contexts' fills leave of the quota of embeds (where that is little, those are waited for). They
 * attend to all that is not hidden then. PIE_BAD_POSITION beyond the model's context. */
/* (waits for the tokenizer) Appends a text; `special` as for pie_tokenize. */
int pie_context_fill(pie_context *context, const char *text, size_t length, bool special);
/* (queued) Appends tokens. The array is copied. */
int pie_context_fill_tokens(pie_context *context, const pie_ref *tokens, uint32_t count);
/* (queued) Appends one token. */
int pie_context_append(pie_context *context, pie_ref token);
/* (waits for the controller) Appends messages as pie_chat renders them. */
int pie_context_chat(pie_context *context, const pie_chat_message *messages, uint32_t count,
                     bool generation_prompt);
/* (local) All tokens; `count` gets how many. They are the context's, until the next call on it. */
const pie_ref *pie_context_tokens(const pie_context *context, uint32_t *count);

/* (queued) Keeps the first `length` tokens and frees the pages of the others. */
int pie_context_trim(pie_context *context, uint32_t length);
/* (queued) Takes the last `tokens` tokens away again. */
int pie_context_rewind(pie_context *context, uint32_t tokens);

/* (queued) Hides the tokens [begin, end) from what comes after them, or shows them again. What was
 * computed before stays as it is, but for the last token, which goes through the model once more.
 * Pages that are shared can be masked too: hidden tokens are left out of what a forward reads. At
 * most 500 runs of tokens are hidden; showing what was evicted is PIE_BAD_ARGUMENT. */
int pie_context_mask(pie_context *context, uint32_t begin, uint32_t end, bool visible);
/* (queued) Hides the tokens [begin, end) for good and frees the pages that hold no others. */
int pie_context_evict(pie_context *context, uint32_t begin, uint32_t end);
/* (queued) A window (StreamingLLM, Xiao et al. 2023): each token generated from now on attends to
 * the first `sink` tokens, to the `recent` ones before it and to itself; what falls out of it is
 * evicted. What is filled in attends to all that is left. `recent` 0: no window. Positions stay
 * absolute, so that the model's max_context ends a text with a window as any other; it bounds
 * memory, not length. */
int pie_context_window(pie_context *context, uint32_t sink, uint32_t recent);

/* (waits) A context with the same tokens, masks and window; yours to destroy. Full pages are
 * shared, the last one is copied, so it costs at most one page. NULL on failure. */
pie_context *pie_context_fork(pie_context *context);
/* (queued) `context` becomes what `branch` is (a fork of it, say) and frees what it was; `branch`
 * is used up. After a failure both are as they were. */
int pie_context_join(pie_context *context, pie_context *branch);

/* (waits) Saves the context under a name for all inferlets of the user, in any language, while this
 * inferlet runs or as long as `lease` says (as of pie_export_kvpage, which also says what name and
 * lease may be). Its pages are shared from then on. A long context is saved in parts of 16384
 * tokens, of which all but the first are named NAME#1, NAME#2 and so on. PIE_BAD_ARGUMENT if the
 * name is in use, or if tokens are masked or evicted; PIE_OVER_QUOTA beyond the user's
 * export_pages. */
int pie_context_save(pie_context *context, const char *name, int64_t lease);
/* (waits) Ends a saved context, whoever saved it. What was restored stays. PIE_NOT_FOUND if there
 * is none. */
int pie_context_unsave(const char *name);
/* (waits) A context that was saved; yours to destroy. NULL on failure: PIE_NOT_FOUND if there is
 * none of that name, PIE_BAD_ARGUMENT if it is none or of another model, PIE_BAD_POSITION if the
 * model's context cannot hold it. */
pie_context *pie_context_restore(uint32_t model, const char *name);

typedef struct {
    uint32_t prompt_tokens;     /* filled in or restored, whatever was trimmed since */
    uint32_t generated_tokens;  /* in all generations, whatever was trimmed since */
    uint32_t pages;             /* held */
    uint32_t shared_pages;      /* of these, that a fork or an export may hold as well */
    double first_token_seconds; /* of the latest generation, from its start; 0: none came */
    double tokens_per_second;   /* of the latest generation, after its first token */
} pie_context_stats;
/* (local) All 0 for NULL. */
pie_context_stats pie_context_get_stats(const pie_context *context);

/* --------------------------------------------------------------------- support: generation --- */

/* Why a generation ended. */
typedef enum {
    PIE_GOING_ON,
    PIE_FINISH_STOP,   /* a stop token or string, `stop_when`, the sampler or the constraint */
    PIE_FINISH_LENGTH, /* max_tokens, or the end of the model's context */
    PIE_FINISH_CLOSED  /* pie_context_stop, another call on the context, or an error */
} pie_finish;

/* How to go on. Zero what is not used. Nothing is copied but the struct: what it points to stays
 * until the generation has ended. Functions may make any call but those on the same context. */
typedef struct {
    uint32_t max_tokens;
    /* How to draw. `stop` ends the text; such a token does not join the context. With a penalty and
     * no `history`, one is made: of the tokens there are for the repetition penalty, and of those
     * that come for all three. `lazy` is the binding's to set. */
    pie_sampling sampling;
    /* Not given out, nor what comes behind; the tokens that make up a stop string stay in the
     * context. UTF-8. */
    const char *const *stop_strings;
    uint32_t stop_string_count;
    /* Asked after each token with all text so far (NUL-terminated): true ends there. */
    bool (*stop_when)(const char *text, size_t length, void *user);
    /* Picks each token from the `sampling.k` most probable (0: 256), which come by
     * `sampling.offset` of ring out; PIE_NO_TOKEN ends the text. Of `sampling`, `stop` and these
     * two count then. With a constraint it gets what that allows of the `sampling.k`, with
     * probabilities that add up to 1. */
    pie_ref (*sampler)(const pie_dist *dist, void *user);
    /* Sets a bit in `allowed` for each token that may come next, least significant first (see
     * pie_pack_token_mask); all are 0 at first. `tokens` are those generated so far. Non-zero ends
     * the text. It lies at `sampling.mask` of ring in. */
    int (*constrain)(const pie_ref *tokens, uint32_t count, uint8_t *allowed, void *user);
    void *user; /* passed to them */
} pie_generation;

typedef struct {
    pie_ref token;     /* PIE_NO_TOKEN where only what is left of the text is given out */
    const char *text;  /* `length` octets, whole characters; no NUL. Until the next call on the
                        * context */
    size_t length;     /* 0 where a character, or perhaps a stop string, is not complete */
    double logprob;    /* with sampling.logprobs, or of a token that a sampler took of its
                        * distribution, by the model's own softmax; else NaN */
    pie_finish finish; /* other than PIE_GOING_ON: this is the last piece */
} pie_piece;

/* (queued) Starts to generate: steps are queued in chains of late-bound tokens, the next before the
 * last has ended, so that the accelerator never waits for this process; with a sampler or a
 * constraint one by one. Contexts that were started together run together. NULL is greedy, and no
 * token. PIE_BAD_POSITION if the model's context is full. */
int pie_context_start(pie_context *context, const pie_generation *how);
/* (waits) The next token and what text it completes, until a piece says why it is the last; from
 * then on there is nothing in it but that. PIE_BAD_MASK if the constraint allows no token, or none
 * of those that a sampler gets: the context is then as it was before it. */
int pie_context_next(pie_context *context, pie_piece *piece);
/* (waits, if anything is queued) Ends the generation behind the token that came last. What goes
 * wrong with steps behind it is no error. */
int pie_context_stop(pie_context *context);

/* Called with each token as it comes; a result other than 0 ends the generation there. It may make
 * any call but those on the same context. */
typedef int (*pie_on_token)(pie_ref token, void *user);
/* (waits) The three above in one: up to `count` tokens. `on_token` may be NULL; NULL for `sampling`
 * is greedy. */
int pie_context_generate(pie_context *context, uint32_t count, const pie_sampling *sampling,
                         pie_on_token on_token, void *user);

/* (waits) Goes on from forks of the context, `n` at once, and keeps the one whose tokens have the
 * highest mean log-probability, which `mean` (or NULL) gets; -infinity for no tokens, or if one has
 * none. With a seed the forks draw by `sampling.seed`, `seed` + 1 and so on; temperature 0, which
 * makes all the same, is PIE_BAD_ARGUMENT. A constraint's masks and a sampler's distributions lie
 * side by side in the rings, one for each fork. After a failure the context is as it was. */
int pie_context_best_of(pie_context *context, uint32_t n, const pie_generation *how, double *mean);

#ifdef __cplusplus
}
#endif

#endif
