/* softmax(Q K^T / sqrt(d)) V on a CPU, with a block of the scores in memory at a time.

   Milakov & Gimelshein 2018, "Online normalizer calculation for softmax", arXiv:1805.02867; Dao et al. 2022, "FlashAttention",
   arXiv:2205.14135, algorithm 1. What is particular here is that the lanes of every vector are queries: scores are kept as
   (keys, queries) and results as (features, queries), so that maxima and sums over the keys are of whole vectors, and
   no head width needs padding.

   Keys and values of a head are first laid out in panels of ROWS rows, which the products read from end to end. With the
   processor's bfloat16 products, two neighbours of the axis that is summed over share an element of 32 bits ("pairs");
   without them, bfloat16 is widened and computed with as float32. Scores, maxima, exponentials and sums are float32. */

#include "vectors.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
enum { HAS_PAIRS = 1 };
#else
enum { HAS_PAIRS = 0 };
#endif

#if defined(__AVX512F__)
enum { ROWS = 8, VECTORS = 3 }; /* ROWS * VECTORS sums stay in the 32 registers; of 16, 12 do */
#else
enum { ROWS = 4, VECTORS = 3 };
#endif
enum { QUERIES = LANES * VECTORS, KEYS = 128 }; /* of a block */
enum { DEPTH = 64 }; /* features of a partial sum: the error grows with it, rather than with the width */

typedef struct {
    int64_t batch, head, row;
} strides; /* in elements; the features of a row are neighbours */

typedef struct {
    const void *query, *key, *value; /* (batch, heads, queries or keys, width) */
    void *out;                       /* as the query */
    int64_t batch, heads, queries, keys, width;
    strides of_query, of_key, of_value, of_out;
    int64_t parts; /* that the queries of each head are computed in */
} call;

/* ---- elements ---- */

INLINE float widened(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

INLINE uint16_t rounded(float x) { /* to the nearest bfloat16, ties to even */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0; /* NaN */
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* Element `step` of a row, as it is multiplied with: a float, or a pair of bfloat16. */
INLINE float element(int bfloat, int pairs, const void *row, int64_t step) {
    float x;
    if (pairs)
        memcpy(&x, (const uint16_t *)row + 2 * step, 4);
    else
        x = bfloat ? widened(((const uint16_t *)row)[step]) : ((const float *)row)[step];
    return x;
}

INLINE const void *row_of(const call *c, int bfloat, const void *tensor, strides of, int64_t head, int64_t row) {
    int64_t at = head / c->heads * of.batch + head % c->heads * of.head + row * of.row;
    return (const char *)tensor + at * (bfloat ? 2 : 4);
}

/* ---- vectors ---- */

#if defined(__AVX512BF16__)
/* Two vectors, rounded, as one of pairs: in each lane, the first's in the lower half, the second's in the upper. */
INLINE vector paired(vector first, vector second) {
    static const uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    return (vector)_mm512_permutexvar_epi16(_mm512_loadu_si512(order), both);
}

INLINE vector add_pairs(vector sum, vector a, vector b) {
    return (vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
#else
INLINE vector paired(vector first, vector second) { return first + second; } /* never called, nor is the next */
INLINE vector add_pairs(vector sum, vector a, vector b) { return sum + a * b; }
#endif

/* sums[r][v] += panel[r] lanes[v] at every step. A panel has ROWS elements a step, lanes VECTORS vectors. */
INLINE void products(int pairs, int64_t steps, const float *panel, const vector *lanes, vector sums[ROWS][VECTORS]) {
    for (int64_t i = 0; i < steps; i++, panel += ROWS, lanes += VECTORS)
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            vector one = panel[r] - (vector){};
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++)
                sums[r][v] = pairs ? add_pairs(sums[r][v], one, lanes[v]) : sums[r][v] + one * lanes[v];
        }
}

/* ---- layout ---- */

/* Keys -> [panel][feature, or pair of features][key of ROWS], zero past the last key. */
INLINE void pack_keys(int bfloat, int pairs, const call *c, int64_t head, float *to) {
    int64_t steps = pairs ? c->width / 2 : c->width;
    for (int64_t first = 0; first < c->keys; first += ROWS, to += ROWS * steps)
        for (int64_t r = 0; r < ROWS; r++) {
            int inside = first + r < c->keys;
            const void *row = row_of(c, bfloat, c->key, c->of_key, head, inside ? first + r : first);
            for (int64_t i = 0; i < steps; i++) to[i * ROWS + r] = inside ? element(bfloat, pairs, row, i) : 0.0f;
        }
}

/* Values -> [panel][key, or pair of keys][feature of ROWS], zero past the last key. */
INLINE void pack_values(int bfloat, int pairs, const call *c, int64_t head, float *to) {
    int64_t steps = pairs ? (c->keys + 1) / 2 : c->keys;
    for (int64_t i = 0; i < steps; i++) {
        int64_t key = pairs ? 2 * i : i;
        const void *row = row_of(c, bfloat, c->value, c->of_value, head, key);
        const uint16_t *first = row, *second = first + c->of_value.row;
        int both = key + 1 < c->keys;
        for (int64_t f = 0; f < c->width; f++) {
            float *out = to + (f / ROWS * steps + i) * ROWS + f % ROWS;
            if (pairs) {
                uint32_t pair = first[f] | (both ? (uint32_t)second[f] << 16 : 0);
                memcpy(out, &pair, 4);
            } else
                *out = element(bfloat, 0, row, f);
        }
    }
}

/* Queries `first` to `first` + `count` -> [feature, or pair of features][query of QUERIES], zero past the last. */
INLINE void pack_queries(int bfloat, int pairs, const call *c, int64_t head, int64_t first, int64_t count, float *to) {
    int64_t steps = pairs ? c->width / 2 : c->width;
    memset(to, 0, steps * QUERIES * 4);
    for (int64_t q = 0; q < count; q++) {
        const void *row = row_of(c, bfloat, c->query, c->of_query, head, first + q);
        for (int64_t i = 0; i < steps; i++) to[i * QUERIES + q] = element(bfloat, pairs, row, i);
    }
}

/* ---- attention ---- */

/* scores [key][query] of `count` keys, and of what fills their last panel. */
INLINE void score(int pairs, int64_t count, int64_t steps, const float *keys, const vector *queries, vector *scores) {
    for (int64_t first = 0; first < count; first += ROWS, keys += ROWS * steps) {
        for (int64_t step = 0; step < steps; step += DEPTH) {
            vector sums[ROWS][VECTORS] = {}, *whole = scores + first * VECTORS;
            products(pairs, steps - step < DEPTH ? steps - step : DEPTH, keys + step * ROWS, queries + step * VECTORS, sums);
            for (int r = 0; r < ROWS; r++)
                for (int v = 0; v < VECTORS; v++, whole++) *whole = step ? *whole + sums[r][v] : sums[r][v];
        }
    }
}

/* Scores of `count` keys -> 2^(scale score - offset), in their place; pairs of them, in the first half of it. offset, totals:
   the largest scale score, and the sum, of what came before, and now of this too. Returns what all before is to be multiplied
   by. */
INLINE vector exponentials(int pairs, int64_t count, float scale, vector *scores, vector *offset, vector *totals) {
    vector most = (vector){} - INFINITY, total = {};
    for (int64_t k = 0; k < count; k++) most = larger(scores[k * VECTORS], most);
    vector largest = larger(*offset, most * scale), shrunk = power(*offset - largest);
    if (pairs && count % 2) scores[count * VECTORS] = (vector){} - INFINITY;
    for (int64_t k = 0; k < count; k += pairs ? 2 : 1) {
        vector one = power(scores[k * VECTORS] * scale - largest), two = {};
        if (pairs) two = power(scores[(k + 1) * VECTORS] * scale - largest);
        scores[(pairs ? k / 2 : k) * VECTORS] = pairs ? paired(one, two) : one;
        total += pairs ? one + two : one;
    }
    *offset = largest;
    *totals = *totals * shrunk + total;
    return shrunk;
}

/* A block of queries, and all keys and values: -> results [feature][query]. scores: room for KEYS + ROWS keys. */
INLINE void attend(int pairs, const call *c, const float *keys, const float *values, const vector *queries, vector *scores,
                   vector *results) {
    int64_t key_steps = pairs ? c->width / 2 : c->width, value_steps = pairs ? (c->keys + 1) / 2 : c->keys;
    float scale = (float)(M_LOG2E / sqrt((double)c->width));
    vector offsets[VECTORS], totals[VECTORS], shrunk[VECTORS];
    for (int v = 0; v < VECTORS; v++) offsets[v] = (vector){} - INFINITY, totals[v] = (vector){};
    memset(results, 0, c->width * QUERIES * 4);
    for (int64_t first = 0; first < c->keys; first += KEYS) {
        int64_t count = c->keys - first < KEYS ? c->keys - first : KEYS;
        score(pairs, count, key_steps, keys + first * key_steps, queries, scores);
        for (int v = 0; v < VECTORS; v++) shrunk[v] = exponentials(pairs, count, scale, scores + v, offsets + v, totals + v);
        for (int64_t row = 0; row < c->width; row += ROWS) {
            vector sums[ROWS][VECTORS] = {}, *whole = results + row * VECTORS;
            const float *panel = values + row * value_steps + (pairs ? first / 2 : first) * ROWS;
            products(pairs, pairs ? (count + 1) / 2 : count, panel, scores, sums);
            for (int r = 0; r < ROWS; r++)
                for (int v = 0; v < VECTORS; v++, whole++) *whole = *whole * shrunk[v] + sums[r][v];
        }
    }
    for (int64_t i = 0; i < c->width; i++)
        for (int v = 0; v < VECTORS; v++) results[i * VECTORS + v] /= totals[v];
}

/* One part of the queries of one head, or nothing where the parts before have all. Returns 1 where there is no memory. */
INLINE int attend_part(int bfloat, int pairs, const call *c, int64_t head, int64_t index) {
    int64_t size = ((c->queries + c->parts - 1) / c->parts + QUERIES - 1) / QUERIES * QUERIES, begin = index * size;
    int64_t end = begin + size < c->queries ? begin + size : c->queries, map = c->width * QUERIES;
    int64_t room = 2 * map + (KEYS + ROWS) * QUERIES + (2 * c->keys + ROWS + 1) * c->width; /* elements */
    if (begin >= end) return 0;
    float *queries = aligned_alloc(64, (room * 4 + 63) / 64 * 64);
    if (queries == NULL) return 1;
    float *results = queries + map, *scores = results + map, *keys = scores + (KEYS + ROWS) * QUERIES;
    float *values = keys + (c->keys + ROWS) * c->width;
    pack_keys(bfloat, pairs, c, head, keys);
    pack_values(bfloat, pairs, c, head, values);
    for (int64_t first = begin; first < end; first += QUERIES) {
        int64_t count = end - first < QUERIES ? end - first : QUERIES;
        pack_queries(bfloat, pairs, c, head, first, count, queries);
        attend(pairs, c, keys, values, (const vector *)queries, (vector *)scores, (vector *)results);
        for (int64_t q = 0; q < count; q++) {
            void *out = (void *)row_of(c, bfloat, c->out, c->of_out, head, first + q);
            for (int64_t i = 0; i < c->width; i++)
                if (bfloat)
                    ((uint16_t *)out)[i] = rounded(results[i * QUERIES + q]);
                else
                    ((float *)out)[i] = results[i * QUERIES + q];
        }
    }
    free(queries);
    return 0;
}

/* Both return 0, or 1 where there was no memory. The width is a multiple of 8. */

int attention_float(const call *c) {
    int failed = 0;
#pragma omp parallel for schedule(dynamic, 1) reduction(| : failed)
    for (int64_t i = 0; i < c->batch * c->heads * c->parts; i++) failed |= attend_part(0, 0, c, i / c->parts, i % c->parts);
    return failed;
}

int attention_bfloat16(const call *c) {
    int failed = 0;
#pragma omp parallel for schedule(dynamic, 1) reduction(| : failed)
    for (int64_t i = 0; i < c->batch * c->heads * c->parts; i++)
        failed |= attend_part(1, HAS_PAIRS, c, i / c->parts, i % c->parts);
    return failed;
}
