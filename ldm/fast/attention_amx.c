/* softmax(Q K^T / sqrt(d)) V in bfloat16 with a matrix engine (`amx.h`): what `attention.c` does, in the same order, with
   products of tiles.

   Scores are kept as (keys, queries) and results as (features, queries), float32, so that the lanes of every vector are
   queries. Keys and values are A, laid out once for each head; queries and exponentials, rounded, are B, for QUERIES at a time.
 */

#include "amx.h"

enum { QUERIES = 2 * SIDE, KEYS = 128 }; /* of a block */
enum { BLOCKS = 8 };                     /* of queries, that share what is read of keys and values */
#define LIMIT 1e12f                      /* of a sum of weights */

typedef struct {
    int64_t batch, head, row;
} strides; /* in elements; the features of a row are neighbours */

typedef struct {
    const uint16_t *query, *key, *value; /* (batch, heads, queries or keys, width) */
    uint16_t *out;                       /* as the query */
    int64_t batch, heads, queries, keys, width;
    strides of_query, of_key, of_value, of_out;
    int64_t parts; /* that the queries of each head are computed in */
} call;

INLINE int64_t whole(int64_t x, int64_t of) { return (x + of - 1) / of * of; }

INLINE int64_t row_at(const call *c, strides of, int64_t head, int64_t row) {
    return head / c->heads * of.batch + head % c->heads * of.head + row * of.row;
}

/* ---- layout: zeros where there are no more keys or features ---- */

/* Keys -> [16 keys][step of 32 features], a tile each: [key][feature]. */
static void pack_keys(const call *c, int64_t head, uint16_t *to) {
    int64_t steps = whole(c->width, STEP) / STEP;
    memset(to, 0, whole(c->keys, STEP) * steps * STEP * 2);
    for (int64_t k = 0; k < c->keys; k++)
        for (int64_t i = 0; i < c->width; i += STEP) {
            const uint16_t *from = c->key + row_at(c, c->of_key, head, k) + i;
            int64_t count = c->width - i < STEP ? c->width - i : STEP;
            memcpy(to + (k / SIDE * steps + i / STEP) * TILE + k % SIDE * STEP, from, count * 2);
        }
}

/* Values -> [16 features][step of 32 keys], a tile each: [feature][key]. */
static void pack_values(const call *c, int64_t head, uint16_t *to) {
    int64_t steps = whole(c->keys, STEP) / STEP, features = whole(c->width, SIDE);
    memset(to, 0, steps * STEP * features * 2);
    for (int64_t k = 0; k < c->keys; k++) {
        const uint16_t *from = c->value + row_at(c, c->of_value, head, k);
        uint16_t *out = to + k / STEP * TILE + k % STEP;
        for (int64_t f = 0; f < c->width; f++) out[f / SIDE * steps * TILE + f % SIDE * STEP] = from[f];
    }
}

/* Queries -> [step of 32 features][16 queries], a tile each: [pair of features][query][2]. */
static void pack_queries(const call *c, int64_t head, int64_t first, int64_t count, uint16_t *to) {
    memset(to, 0, whole(c->width, STEP) * QUERIES * 2);
    for (int64_t q = 0; q < count; q++) {
        const uint16_t *from = c->query + row_at(c, c->of_query, head, first + q);
        uint16_t *out = to + q / SIDE * TILE + q % SIDE * 2;
        for (int64_t i = 0; i < c->width; i += 2) memcpy(out + i / STEP * 2 * TILE + i % STEP * SIDE, from + i, 4);
    }
}

/* ---- attention ---- */

/* scores [key][QUERIES] of 32 keys. */
INLINE void score(int64_t steps, const uint16_t *keys, const uint16_t *queries, float *scores) {
    zero_sums();
    for (int64_t i = 0; i < steps; i++) {
        const uint16_t *b = queries + i * 2 * TILE;
        add_products(keys + i * TILE, STEP, keys + (steps + i) * TILE, b, b + TILE);
    }
    store_sums(scores, QUERIES);
}

/* The largest of `count` scores [key][QUERIES] of each of 16 queries; NaN where the last is that. */
INLINE __m512 largest(int64_t count, const float *scores) {
    __m512 most[4];
    int64_t k = 0;
    for (int i = 0; i < 4; i++) most[i] = _mm512_set1_ps(-INFINITY);
    for (; k + 4 <= count; k += 4)
        for (int i = 0; i < 4; i++) most[i] = _mm512_max_ps(most[i], _mm512_load_ps(scores + (k + i) * QUERIES));
    for (; k < count; k++) most[0] = _mm512_max_ps(most[0], _mm512_load_ps(scores + k * QUERIES));
    return _mm512_max_ps(_mm512_max_ps(most[0], most[1]), _mm512_max_ps(most[2], most[3]));
}

/* Scores [key][QUERIES] of 16 queries and `count` keys of 32 -> weights 2^(scale score - offset), rounded, TILE. Returns sum,
   and the weights, before they are rounded, added to it. */
INLINE __m512 exponentials(int64_t count, float scale, const float *scores, __m512 offset, uint16_t *weights, __m512 sum) {
    __m512 by = _mm512_set1_ps(scale), other = _mm512_setzero_ps();
    for (int64_t k = 0; k < STEP; k += 2) {
        __m512 one = _mm512_setzero_ps(), two = one;
        if (k < count) one = power(_mm512_fmsub_ps(_mm512_load_ps(scores + k * QUERIES), by, offset));
        if (k + 1 < count) two = power(_mm512_fmsub_ps(_mm512_load_ps(scores + (k + 1) * QUERIES), by, offset));
        sum = _mm512_add_ps(sum, one);
        other = _mm512_add_ps(other, two);
        _mm512_store_si512(weights + k * SIDE, paired(one, two));
    }
    return _mm512_add_ps(sum, other);
}

/* What is known of 32 queries: their weights are 2^(scale score - offset), and those so far sum up to the totals. */
typedef struct {
    __m512 offsets[2], totals[2];
} softmax;

/* The same with the largest score there is for an offset, and all before, `results` [feature][QUERIES], brought to it. */
static void weigh_anew(int64_t count, float scale, const float *scores, uint16_t *weights, softmax *of, int64_t width,
                       float *results) {
    for (int v = 0; v < 2; v++, scores += SIDE, weights += TILE, results += SIDE) {
        __m512 most = _mm512_mul_ps(largest(count, scores), _mm512_set1_ps(scale)), now = _mm512_max_ps(of->offsets[v], most);
        __m512 shrunk = power(_mm512_sub_ps(of->offsets[v], now)), sum = _mm512_mul_ps(of->totals[v], shrunk);
        for (int64_t f = 0; f < width; f++)
            _mm512_store_ps(results + f * QUERIES, _mm512_mul_ps(_mm512_load_ps(results + f * QUERIES), shrunk));
        for (int64_t k = 0; k < count; k += STEP)
            sum = exponentials(count - k, scale, scores + k * QUERIES, now, weights + k / STEP * 2 * TILE, sum);
        of->offsets[v] = now;
        of->totals[v] = sum;
    }
}

/* The weights of `count` keys, [step of 32 keys][2][TILE]. Any offset gives the same quotients, as long as nothing overflows,
   nor all underflows: so the largest of the first scores stays the offset until weights are larger than LIMIT, and while the
   engine multiplies for the next 32 keys, the exponentials of those before are found. scores: room for `count` keys. */
INLINE void weigh(int first, int64_t count, float scale, int64_t steps, const uint16_t *keys, const uint16_t *queries,
                  float *scores, uint16_t *weights, softmax *of, int64_t width, float *results) {
    softmax next = *of;
    score(steps, keys, queries, scores);
    for (int64_t k = 0; k < count; k += STEP) {
        if (k + STEP < count) score(steps, keys + (k + STEP) / SIDE * steps * TILE, queries, scores + (k + STEP) * QUERIES);
        for (int v = 0; v < 2 && !first; v++)
            next.totals[v] = exponentials(count - k, scale, scores + k * QUERIES + v * SIDE, of->offsets[v],
                                          weights + (k / STEP * 2 + v) * TILE, next.totals[v]);
    }
    __mmask16 large = 0;
    for (int v = 0; v < 2; v++) large |= _mm512_cmp_ps_mask(next.totals[v], _mm512_set1_ps(LIMIT), _CMP_GT_OQ);
    if (first || large)
        weigh_anew(count, scale, scores, weights, of, width, results);
    else
        *of = next;
}

/* results [feature][QUERIES] += values by weights, of a block of `steps` of the values' `of_values` steps. */
INLINE void mix(int64_t features, int64_t steps, int64_t of_values, const uint16_t *values, const uint16_t *weights,
                float *results) {
    for (int64_t f = 0; f < features; f += 2 * SIDE, values += 2 * of_values * TILE, results += 2 * SIDE * QUERIES) {
        if (f + SIDE < features) {
            load_sums(results, QUERIES);
            for (int64_t i = 0; i < steps; i++) {
                const uint16_t *b = weights + i * 2 * TILE;
                add_products(values + i * TILE, STEP, values + (of_values + i) * TILE, b, b + TILE);
            }
            store_sums(results, QUERIES);
        } else {
            _tile_loadd(0, results, QUERIES * 4);
            _tile_loadd(1, results + SIDE, QUERIES * 4);
            for (int64_t i = 0; i < steps; i++) {
                _tile_loadd(4, values + i * TILE, STEP * 2);
                _tile_loadd(6, weights + i * 2 * TILE, 64);
                _tile_loadd(7, weights + (2 * i + 1) * TILE, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
            }
            _tile_stored(0, results, QUERIES * 4);
            _tile_stored(1, results + SIDE, QUERIES * 4);
        }
    }
}

/* `blocks` of queries, and all keys and values: -> results [block][feature][QUERIES]. Each block of keys and values is read
   from the second level of cache once for all of them. */
INLINE void attend(const call *c, int64_t blocks, const uint16_t *keys, const uint16_t *values, const uint16_t *queries,
                   float *scores, uint16_t *weights, float *results) {
    int64_t steps = whole(c->width, STEP) / STEP, features = whole(c->width, SIDE), of_values = whole(c->keys, STEP) / STEP;
    float scale = (float)(M_LOG2E / sqrt((double)c->width));
    softmax of[BLOCKS];
    for (int64_t b = 0; b < blocks; b++)
        for (int v = 0; v < 2; v++) of[b].offsets[v] = _mm512_set1_ps(-INFINITY), of[b].totals[v] = _mm512_setzero_ps();
    memset(results, 0, blocks * features * QUERIES * 4);
    for (int64_t first = 0; first < c->keys; first += KEYS) {
        int64_t count = c->keys - first < KEYS ? c->keys - first : KEYS;
        for (int64_t b = 0; b < blocks; b++) {
            float *result = results + b * features * QUERIES;
            weigh(!first, count, scale, steps, keys + first / SIDE * steps * TILE, queries + b * steps * 2 * TILE, scores,
                  weights, of + b, c->width, result);
            mix(features, whole(count, STEP) / STEP, of_values, values + first / STEP * TILE, weights, result);
        }
    }
    for (int64_t b = 0; b < blocks; b++)
        for (int64_t f = 0; f < c->width; f++)
            for (int v = 0; v < 2; v++) {
                float *at = results + (b * features + f) * QUERIES + v * SIDE;
                _mm512_store_ps(at, _mm512_div_ps(_mm512_load_ps(at), of[b].totals[v]));
            }
}

/* The result of one query -> its row. */
INLINE void write_row(int64_t width, const float *results, uint16_t *out) {
    for (int64_t f = 0; f < width; f += SIDE, out += SIDE) {
        int64_t count = width - f < SIDE ? width - f : SIDE;
        __mmask16 inside = (__mmask16)((1u << count) - 1);
        float row[SIDE];
        for (int64_t i = 0; i < count; i++) row[i] = results[(f + i) * QUERIES];
        _mm256_mask_storeu_epi16(out, inside, (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(inside, row)));
    }
}

/* One part of the queries of one head, or nothing where the parts before have all. Returns 1 where there is no memory. */
static int attend_part(const call *c, int64_t head, int64_t index) {
    int64_t size = whole((c->queries + c->parts - 1) / c->parts, QUERIES), begin = index * size;
    int64_t end = begin + size < c->queries ? begin + size : c->queries, features = whole(c->width, SIDE);
    int64_t width = whole(c->width, STEP), all = whole(c->keys, STEP) * width, map = BLOCKS * width * QUERIES;
    if (begin >= end) return 0;
    float *scores = aligned_alloc(64, (KEYS * QUERIES + map) * 4 + (KEYS * QUERIES + map + 2 * all) * 2);
    if (scores == NULL) return 1;
    float *results = scores + KEYS * QUERIES;
    uint16_t *weights = (uint16_t *)(results + map), *queries = weights + KEYS * QUERIES, *keys = queries + map,
             *values = keys + all;
    pack_keys(c, head, keys);
    pack_values(c, head, values);
    for (int64_t first = begin; first < end; first += BLOCKS * QUERIES) {
        int64_t count = end - first < BLOCKS * QUERIES ? end - first : BLOCKS * QUERIES,
                blocks = whole(count, QUERIES) / QUERIES;
        for (int64_t b = 0; b < blocks; b++) {
            int64_t some = count - b * QUERIES < QUERIES ? count - b * QUERIES : QUERIES;
            pack_queries(c, head, first + b * QUERIES, some, queries + b * width * QUERIES);
        }
        attend(c, blocks, keys, values, queries, scores, weights, results);
        for (int64_t q = 0; q < count; q++)
            write_row(c->width, results + q / QUERIES * features * QUERIES + q % QUERIES,
                      c->out + row_at(c, c->of_out, head, first + q));
    }
    free(scores);
    return 0;
}

/* Returns 0, or 1 where there was no memory. The width is even. */
int attention_bfloat16(const call *c) {
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        config before = begin_tiles();
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < c->batch * c->heads * c->parts; i++) failed |= attend_part(c, i / c->parts, i % c->parts);
        end_tiles(before);
    }
    return failed;
}
