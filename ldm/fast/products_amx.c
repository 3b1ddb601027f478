/* Linear layers and convolutions in bfloat16 with a matrix engine (`amx.h`): products of matrices whose sums are float32, with
   what follows them done before they are rounded and written.

   A convolution is a linear layer for each of its taps, of inputs that lie so far apart. Its maps have a border of zeros, which
   a row shares with the next and a map with the next: the rows of the product are all their pixels, and what is computed for
   the border is not written.

   A task is a block of rows by a group of PANELs of columns. What it reads again and again stays in a core's second level of
   cache: of the inputs a part of their features at a time. */

#include "amx.h"

enum { PANEL = 2 * SIDE, ROWS = 640, DEPTH = 1024, TAPS = 9, DEPTH_OF_TAPS = 256 };
enum { LARGE = 1 << 21 };   /* elements of results that no cache of a core will keep for whoever reads them */
enum { WEIGHTS = 1 << 18 }; /* elements of a group's, of a part of the features */

typedef struct {
    const uint16_t *inputs;                               /* [row][feature], `stride` elements a row */
    const uint16_t *weights;                              /* [panel][step of 32 features][tap][2][TILE] */
    const float *bias;                                    /* [column] */
    const uint16_t *addend;                               /* as `out`; or NULL */
    uint16_t *out;                                        /* [map][down][across][column] */
    int64_t rows, readable, stride, depth, columns, taps; /* rows: of the product; readable: that `inputs` has */
    int64_t offsets[TAPS];                                /* tap t of row r reads row r + offsets[t] */
    int64_t across, wide, down, high;    /* rows are of maps of across x down pixels, of which wide x high are written */
    int64_t out_map, out_row, out_pixel; /* in elements */
    int64_t gated; /* the first half of each panel is multiplied by GELU of the second, and half as many columns written */
    int64_t threads;
} call;

/* gelu(x) = x P(X <= x), X normal: for x < 0, P = e^(-x x / 2) q(1 / (1 + 0.35 |x|)), q fitted, to 2e-6 of itself. */
INLINE __m512 gelu(__m512 x) {
    static const float q[] = {4.23822514e-2f, -1.77222708e-1f, 2.02088053e-1f, 1.43846186e-2f,
                              1.41497491e-1f, 1.37104461e-1f,  1.39765037e-1f};
    __m512 one = _mm512_set1_ps(1.0f), size = _mm512_abs_ps(x);
    __m512 t = _mm512_div_ps(one, _mm512_fmadd_ps(size, _mm512_set1_ps(0.35f), one)), y = _mm512_set1_ps(q[0]);
    for (int i = 1; i < 7; i++) y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(q[i]));
    y = _mm512_mul_ps(_mm512_mul_ps(y, t), power(_mm512_mul_ps(_mm512_mul_ps(x, x), _mm512_set1_ps((float)(-M_LOG2E / 2)))));
    __mmask16 positive = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ);
    return _mm512_mul_ps(x, _mm512_mask_sub_ps(y, positive, one, y));
}

/* Where in `out` each of 32 rows from `first` on has its first column; -1 for what is not written. */
INLINE void place_rows(const call *c, int64_t first, int64_t *places) {
    int64_t x = first % c->across, y = first / c->across % c->down, map = first / c->across / c->down;
    for (int64_t r = 0; r < 2 * SIDE; r++) {
        int inside = x < c->wide && y < c->high && first + r < c->rows;
        places[r] = inside ? map * c->out_map + y * c->out_row + x * c->out_pixel : -1;
        if (++x == c->across) {
            x = 0;
            if (++y == c->down) y = 0, map++;
        }
    }
}

/* 32 rows of sums, [row][PANEL] -> out; past: the caches. */
INLINE void finish(const call *c, int past, const int64_t *places, int64_t panel, const float *sums) {
    int64_t first = panel * PANEL, at = c->gated ? first / 2 : first, left = c->gated ? SIDE : c->columns - first;
    __mmask32 inside = left >= PANEL ? 0xffffffff : (1u << left) - 1;
    __m512 bias = _mm512_loadu_ps(c->bias + first), other = _mm512_loadu_ps(c->bias + first + SIDE);
    for (int r = 0; r < 2 * SIDE; r++, sums += PANEL) {
        if (places[r] < 0) continue;
        __m512 one = _mm512_add_ps(_mm512_load_ps(sums), bias), two = _mm512_add_ps(_mm512_load_ps(sums + SIDE), other);
        if (c->gated) one = _mm512_mul_ps(one, gelu(two));
        if (c->addend) {
            __m512i more = _mm512_maskz_loadu_epi16(inside, c->addend + places[r] + at);
            one = _mm512_add_ps(one, widened(_mm512_castsi512_si256(more)));
            two = _mm512_add_ps(two, widened(_mm512_extracti64x4_epi64(more, 1)));
        }
        __m512i both = (__m512i)_mm512_cvtne2ps_pbh(two, one);
        if (past)
            _mm512_stream_si512((void *)(c->out + places[r] + at), both);
        else
            _mm512_mask_storeu_epi16(c->out + places[r] + at, inside, both);
    }
}

/* Rows `first` to `last`, panels `from` to `to`. sums: [32 rows][panel][row][PANEL]; few: room for 32 rows of a part of the
 * features. */
static void multiply(const call *c, int64_t first, int64_t last, int64_t from, int64_t to, float *sums, uint16_t *few) {
    int64_t depth = c->taps > 1 ? DEPTH_OF_TAPS : DEPTH, steps = c->depth / STEP;
    int whole = !c->gated && c->columns % PANEL == 0 && c->out_pixel % PANEL == 0 && (uintptr_t)c->out % 64 == 0; /* lines */
    int past = whole && c->rows * c->columns >= LARGE;
    for (int64_t start = 0; start < c->depth; start += depth) {
        int64_t end = start + depth < c->depth ? start + depth : c->depth;
        for (int64_t row = first; row < last; row += 2 * SIDE)
            for (int64_t panel = from; panel < to; panel++) {
                const uint16_t *weights = c->weights + (panel * steps + start / STEP) * c->taps * 2 * TILE;
                const uint16_t *inputs = c->inputs + row * c->stride + start;
                float only[2 * SIDE * PANEL] __attribute__((aligned(64)));
                float *place =
                    c->depth > depth ? sums + ((row - first) * (to - from) + (panel - from) * 2 * SIDE) * PANEL : only;
                int64_t stride = c->stride, places[2 * SIDE];
                if (end == c->depth) {
                    place_rows(c, row, places);
                    for (int r = 0; r < 2 * SIDE; r++) /* so that what is written to is in the cache by then */
                        if (!past && places[r] >= 0)
                            __builtin_prefetch(c->out + places[r] + panel * PANEL / (c->gated ? 2 : 1), 1);
                }
                if (row + 2 * SIDE > c->readable) { /* of a linear layer: the rest are zeros */
                    stride = end - start;
                    memset(few, 0, 2 * SIDE * stride * 2);
                    for (int64_t r = row; r < c->readable; r++)
                        memcpy(few + (r - row) * stride, c->inputs + r * c->stride + start, stride * 2);
                    inputs = few;
                }
                if (start)
                    load_sums(place, PANEL);
                else
                    zero_sums();
                for (int64_t i = start; i < end; i += STEP, inputs += STEP)
                    for (int64_t t = 0; t < c->taps; t++, weights += 2 * TILE) {
                        const uint16_t *a = inputs + c->offsets[t] * stride;
                        add_products(a, stride, a + SIDE * stride, weights, weights + TILE);
                    }
                store_sums(place, PANEL);
                if (end == c->depth) finish(c, past, places, panel, place);
            }
    }
    _mm_sfence(); /* what went past the caches is there for everybody */
}

/* Returns 0, or 1 where there was no memory. The depth is a multiple of 32. */
int products(const call *c) {
    int failed = 0;
    int64_t whole = (c->rows + 2 * SIDE - 1) / (2 * SIDE), panels = (c->columns + PANEL - 1) / PANEL;
    int64_t blocks = (c->rows + ROWS - 1) / ROWS, block = (whole + blocks - 1) / blocks; /* of 32 rows */
    int64_t depth = c->taps > 1 ? DEPTH_OF_TAPS : DEPTH, part = c->depth < depth ? c->depth : depth;
    int64_t group = WEIGHTS / (part * c->taps * PANEL);
    group = group < 1 ? 1 : group < panels ? group : panels;
    blocks = (whole + block - 1) / block;
    while (group > 1 && blocks * ((panels + group - 1) / group) < 8 * c->threads) group--;
    int64_t groups = (panels + group - 1) / group;
#pragma omp parallel reduction(| : failed)
    {
        config before = begin_tiles();
        float *sums = aligned_alloc(64, group * block * 2 * SIDE * PANEL * 4 + 2 * SIDE * DEPTH * 2);
        failed = sums == NULL;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < blocks * groups; i++)
            if (sums != NULL) {
                int64_t first = i / groups * block, last = first + block < whole ? first + block : whole;
                int64_t from = i % groups * group, to = from + group < panels ? from + group : panels;
                multiply(c, first * 2 * SIDE, last * 2 * SIDE, from, to, sums,
                         (uint16_t *)(sums + group * block * 2 * SIDE * PANEL));
            }
        free(sums);
        end_tiles(before);
    }
    return failed;
}

typedef struct {
    const void *weights; /* [output][input][tap] */
    uint16_t *to;        /* as `call.weights` */
    int64_t outputs, inputs, taps;
    int64_t gated; /* each panel has 16 of the first half of the outputs, and then the same of the second */
} pack_call;

/* Of one output's weights 32 that are `stride` apart, rounded, as 16 pairs. */
INLINE __m512i pairs_of(int bfloat, const void *weights, int64_t at, int64_t stride) {
    if (bfloat) {
        uint16_t pairs[STEP] __attribute__((aligned(64)));
        for (int i = 0; i < STEP; i++) pairs[i] = ((const uint16_t *)weights)[at + i * stride];
        return _mm512_load_si512(pairs);
    }
    const float *from = (const float *)weights + at;
    const __m512i order = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m512i apart = _mm512_mullo_epi32(order, _mm512_set1_epi32((int)stride));
    __m512 first = _mm512_i32gather_ps(apart, from, 4), second = _mm512_i32gather_ps(apart, from + SIDE * stride, 4);
    return (__m512i)_mm512_cvtne2ps_pbh(second, first);
}

/* All inputs and taps of 16 outputs from `output` on, of which there are `count` -> their half of a panel. */
INLINE void pack_half(int bfloat, const pack_call *c, int64_t output, int64_t count, uint32_t *to) {
    for (int64_t step = 0; step < c->inputs / STEP; step++)
        for (int64_t t = 0; t < c->taps; t++, to += TILE) {
            uint32_t columns[SIDE][SIDE] __attribute__((aligned(64))) = {};
            for (int64_t j = 0; j < count; j++) {
                int64_t at = ((output + j) * c->inputs + step * STEP) * c->taps + t;
                _mm512_store_si512(columns[j], pairs_of(bfloat, c->weights, at, c->taps));
            }
            for (int i = 0; i < SIDE; i++)
                for (int j = 0; j < SIDE; j++) to[i * SIDE + j] = columns[j][i];
        }
}

INLINE void pack(int bfloat, const pack_call *c) {
    int64_t panels = (c->outputs + PANEL - 1) / PANEL, size = c->inputs * c->taps * PANEL;
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t i = 0; i < 2 * panels; i++) {
        int64_t panel = i / 2, half = i % 2, output = panel * PANEL + half * SIDE;
        if (c->gated) output = half * c->outputs / 2 + panel * SIDE;
        int64_t left = c->outputs - output, count = left < 0 ? 0 : left < SIDE ? left : SIDE;
        pack_half(bfloat, c, output, count, (uint32_t *)(c->to + panel * size + half * TILE));
    }
}

void pack_float(const pack_call *c) { pack(0, c); }
void pack_bfloat16(const pack_call *c) { pack(1, c); }
