/* options.h -- the command line that both completion inferlets take, and how they give up. */
#ifndef OPTIONS_H
#define OPTIONS_H

#include <errno.h>
#include <inferlet.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct options {
    const char *prompt;
    uint32_t max_tokens;
    pie_sampling sampling;
};

/* A number of at most `most` that takes up all of `text`; false if it is none. */
static inline bool read_count(const char *text, uint64_t most, uint64_t *value)
{
    char *end;
    errno = 0;
    *value = strtoull(text, &end, 10);
    return *text >= '0' && *text <= '9' && !*end && !errno && *value <= most;
}

static inline bool read_real(const char *text, double *value)
{
    char *end;
    *value = strtod(text, &end);
    return end != text && !*end;
}

static inline void print_usage(const char *usage)
{
    for (size_t left = strlen(usage); left;) {
        ssize_t n = write(STDERR_FILENO, usage + strlen(usage) - left, left);
        left -= n < 0 ? left : (size_t)n;
    }
}

/* Reads the arguments. False on bad usage, with `usage` on standard error. */
static inline bool read_options(struct options *o, const char *usage)
{
    bool good = true, prompted = false, counted = false;
    for (uint32_t i = 0; good && pie_get_arg(i); i += 2) {
        const char *name = pie_get_arg(i), *text = pie_get_arg(i + 1);
        uint64_t n = 0;
        if (!text)
            good = false;
        else if (!strcmp(name, "--prompt")) {
            o->prompt = text;
            prompted = true;
        } else if (!strcmp(name, "--max-tokens")) {
            good = counted = read_count(text, UINT32_MAX, &n);
            o->max_tokens = (uint32_t)n;
        } else if (!strcmp(name, "--temperature"))
            good = read_real(text, &o->sampling.temperature) && o->sampling.temperature >= 0 &&
                   o->sampling.temperature <= 1e6;
        else if (!strcmp(name, "--top-p"))
            good = read_real(text, &o->sampling.top_p) && o->sampling.top_p > 0 &&
                   o->sampling.top_p <= 1;
        else if (!strcmp(name, "--seed")) {
            good = o->sampling.seeded = read_count(text, UINT64_MAX, &n);
            o->sampling.seed = n;
        } else
            good = false;
    }
    good = good && prompted && counted;
    if (!good)
        print_usage(usage);
    return good;
}

#endif
