/* A 3x3 convolution on a CPU by Winograd's F(4x4, 3x3): what `winograd.py` does, which says what it is, in one pass.

   Pixels, kernels and results are float32, or bfloat16 that is widened as it is read and rounded as it is written; all between
   is float32.

   The transformed inputs are made first, by tiles. Then each thread takes the next BLOCK output channels of TILES tiles: it
   transforms a row of the kernels at a time, for DEPTH input channels, into its own cache, multiplies with what is there, and
   transforms the results, which no other thread needs. The transformed kernels, four times the layer's, are never in memory.

   The products are those of Goto & van de Geijn 2008, "Anatomy of High-Performance Matrix Multiplication", ACM TOMS 34(3): a
   tile of results in the registers, and what it is multiplied with read from end to end. */

#include "vectors.h"

#if defined(__AVX512F__)
enum { VECTORS = 4, ROWS = 6 }; /* ROWS * VECTORS sums stay in the 32 registers; of 16, 12 do */
#else
enum { VECTORS = 2, ROWS = 6 };
#endif
enum {
    OUT = 4,
    SIDE = 6,
    TAPS = 9,
    BLOCK = 64, /* output channels, in PANELS of COLUMNS */
    COLUMNS = LANES * VECTORS,
    PANELS = BLOCK / COLUMNS,
    DEPTH = 128,  /* input channels */
    PARTIAL = 32, /* of a partial sum: the error grows with it, rather than with all */
    TILES = 96,
    SKEW = 16, /* floats between planes, which would else fall on one another in the caches */
    PLANE = TILES * DEPTH + SKEW,
    RESULTS = TILES * BLOCK + SKEW,
};

#define SMALL (2.0 / 3.0) /* the points: 0, +-SMALL, +-LARGE and infinity */
#define LARGE (3.0 / 2.0)
#define F(x) ((float)(x))

typedef struct {
    const void *pixels;  /* (images, OUT rows / scale + 2, OUT columns / scale + 2, channels), contiguous */
    const void *kernels; /* (outputs / BLOCK, channels, TAPS, BLOCK) */
    const float *bias;   /* (outputs) */
    void *out;           /* (images, OUT rows, OUT columns, outputs) */
    float *inputs;       /* room for (blocks of TILES, blocks of DEPTH, SIDE * SIDE, PLANE) */
    int64_t images, rows, columns, channels, outputs;
    int64_t scale;              /* 2: each pixel inside the padding is to be four */
    int64_t out_image, out_row; /* strides of out, in elements */
} call;

/* B^T d, d of every `step` from `from` on. */
INLINE void transform_input(const vector *d, int step, vector *to, int to_step) {
    const float both = F(SMALL * SMALL + LARGE * LARGE), small = F(SMALL * SMALL), large = F(LARGE * LARGE);
    vector d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step], d5 = d[5 * step];
    vector even = d4 - large * d2, odd = F(SMALL) * (d3 - large * d1);
    vector even_large = d4 - small * d2, odd_large = F(LARGE) * (d3 - small * d1);
    to[0] = d0 + d4 - both * d2;
    to[to_step] = even + odd;
    to[2 * to_step] = even - odd;
    to[3 * to_step] = even_large + odd_large;
    to[4 * to_step] = even_large - odd_large;
    to[5 * to_step] = d1 + d5 - both * d3;
}

/* A^T m: six of every `step` -> four. */
INLINE void transform_output(const vector *m, int step, vector *to, int to_step) {
    vector plus = m[step] + m[2 * step], minus = m[step] - m[2 * step];
    vector plus_large = m[3 * step] + m[4 * step], minus_large = m[3 * step] - m[4 * step];
    to[0] = m[0] + plus + plus_large;
    to[to_step] = F(SMALL) * minus + F(LARGE) * minus_large;
    to[2 * to_step] = F(SMALL * SMALL) * plus + F(LARGE * LARGE) * plus_large;
    to[3 * to_step] = m[5 * step] + F(SMALL * SMALL * SMALL) * minus + F(LARGE * LARGE * LARGE) * minus_large;
}

/* Row `row` of G g: of three values, the polynomial's at that point, over the product of its distances from the others. */
INLINE vector at_point(int row, vector g0, vector g1, vector g2) {
    const double small = 2 * SMALL * SMALL * (SMALL * SMALL - LARGE * LARGE),
                 large = 2 * LARGE * LARGE * (LARGE * LARGE - SMALL * SMALL);
    switch (row) {
    case 0: return F(1 / (SMALL * SMALL * LARGE * LARGE)) * g0;
    case 1: return F(1 / small) * g0 + F(SMALL * SMALL / small) * g2 + F(SMALL / small) * g1;
    case 2: return F(1 / small) * g0 + F(SMALL * SMALL / small) * g2 - F(SMALL / small) * g1;
    case 3: return F(1 / large) * g0 + F(LARGE * LARGE / large) * g2 + F(LARGE / large) * g1;
    case 4: return F(1 / large) * g0 + F(LARGE * LARGE / large) * g2 - F(LARGE / large) * g1;
    default: return g2;
    }
}

/* One tile of all channels into its place in every plane of every block of DEPTH. */
INLINE void read_tile(int bfloat, const call *c, int64_t tile) {
    int64_t column = tile % c->columns, row = tile / c->columns % c->rows, image = tile / c->columns / c->rows;
    int64_t scale = c->scale, depths = (c->channels + DEPTH - 1) / DEPTH;
    int64_t width = (OUT * c->columns / scale + 2) * c->channels, height = OUT * c->rows / scale + 2;
    int64_t corner = (image * height + OUT * row / scale) * width + OUT * column / scale * c->channels;
    int64_t at[SIDE]; /* which of the pixels there each one of the tile is */
    for (int i = 0; i < SIDE; i++) at[i] = (i + scale - 1) / scale;
    float *to = c->inputs + tile / TILES * depths * SIDE * SIDE * PLANE + tile % TILES * DEPTH;
    for (int64_t channel = 0; channel < c->channels; channel += LANES) {
        vector d[SIDE * SIDE], half[SIDE * SIDE];
        for (int i = 0; i < SIDE; i++)
            for (int j = 0; j < SIDE; j++)
                d[i * SIDE + j] = read_elements(bfloat, c->pixels, corner + at[i] * width + at[j] * c->channels + channel);
        for (int j = 0; j < SIDE; j++) transform_input(d + j, SIDE, half + j, SIDE);
        for (int i = 0; i < SIDE; i++) transform_input(half + i * SIDE, 1, d + i * SIDE, 1);
        float *plane = to + channel / DEPTH * SIDE * SIDE * PLANE + channel % DEPTH;
        for (int i = 0; i < SIDE * SIDE; i++, plane += PLANE) store(plane, d[i]);
    }
}

/* A row of the kernels' transform: [channel][TAPS][BLOCK] -> [SIDE][PANELS][channel][COLUMNS]. */
INLINE void transform_kernels(int bfloat, int row, int64_t depth, const void *kernels, int64_t first, float *to) {
    for (int64_t i = 0; i < depth; i++, first += TAPS * BLOCK)
        for (int v = 0; v < BLOCK / LANES; v++) {
            vector g[3];
            for (int j = 0; j < 3; j++) {
                vector taps[3];
                for (int k = 0; k < 3; k++) taps[k] = read_elements(bfloat, kernels, first + (3 * k + j) * BLOCK + v * LANES);
                g[j] = at_point(row, taps[0], taps[1], taps[2]);
            }
            float *place = to + (v / VECTORS * depth + i) * COLUMNS + v % VECTORS * LANES;
            for (int j = 0; j < SIDE; j++) store(place + j * depth * BLOCK, at_point(j, g[0], g[1], g[2]));
        }
}

/* `rows` tiles' sums of one panel, in place of what there is, or added to it. */
INLINE void multiply(int rows, int64_t depth, const float *inputs, const float *kernels, float *results, int add) {
    for (int64_t start = 0; start < depth; start += PARTIAL, add = 1) {
        int64_t end = start + PARTIAL < depth ? start + PARTIAL : depth;
        vector sums[ROWS][VECTORS] = {};
        for (int64_t i = start; i < end; i++, kernels += COLUMNS)
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                vector one = inputs[r * DEPTH + i] - (vector){};
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++) sums[r][v] += one * load(kernels + v * LANES);
            }
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < VECTORS; v++) {
                float *to = results + r * BLOCK + v * LANES;
                store(to, add ? load(to) + sums[r][v] : sums[r][v]);
            }
    }
}

static void multiply_all(int64_t tiles, int64_t depth, const float *inputs, const float *kernels, float *results, int add) {
    for (int panel = 0; panel < PANELS; panel++, kernels += depth * COLUMNS)
        for (int64_t first = 0, groups = (tiles + ROWS - 1) / ROWS; groups > 0; groups--) {
            int64_t rows = (tiles - first + groups - 1) / groups; /* as equal as they can be */
            const float *from = inputs + first * DEPTH;
            float *to = results + first * BLOCK + panel * COLUMNS;
            switch (rows) {
            case 1: multiply(1, depth, from, kernels, to, add); break;
            case 2: multiply(2, depth, from, kernels, to, add); break;
            case 3: multiply(3, depth, from, kernels, to, add); break;
            case 4: multiply(4, depth, from, kernels, to, add); break;
            case 5: multiply(5, depth, from, kernels, to, add); break;
            default: multiply(6, depth, from, kernels, to, add); break;
            }
            first += rows;
        }
}

/* Tiles of results [SIDE * SIDE][tile][BLOCK] -> out. */
INLINE void write_tiles(int bfloat, const call *c, int64_t first, int64_t tiles, int64_t output, const float *results) {
    for (int64_t t = 0; t < tiles; t++) {
        int64_t tile = first + t, column = tile % c->columns, row = tile / c->columns % c->rows;
        int64_t image = tile / c->columns / c->rows;
        int64_t corner = image * c->out_image + OUT * row * c->out_row + OUT * column * c->outputs + output;
        for (int v = 0; v < BLOCK; v += LANES) {
            vector m[SIDE * SIDE], half[OUT * SIDE], y[OUT * OUT], bias = load(c->bias + output + v);
            for (int i = 0; i < SIDE * SIDE; i++) m[i] = load(results + i * RESULTS + t * BLOCK + v);
            for (int j = 0; j < SIDE; j++) transform_output(m + j, SIDE, half + j, SIDE);
            for (int i = 0; i < OUT; i++) transform_output(half + i * SIDE, 1, y + i * OUT, 1);
            for (int i = 0; i < OUT; i++)
                for (int j = 0; j < OUT; j++)
                    write_elements(bfloat, c->out, corner + i * c->out_row + j * c->outputs + v, y[i * OUT + j] + bias);
        }
    }
}

/* BLOCK outputs of a block of tiles. room: of one thread. */
INLINE void convolve(int bfloat, const call *c, int64_t block, int64_t output, float *room) {
    int64_t all = c->images * c->rows * c->columns, first = block * TILES, tiles = all - first < TILES ? all - first : TILES;
    const float *inputs = c->inputs + block * ((c->channels + DEPTH - 1) / DEPTH) * SIDE * SIDE * PLANE;
    float *results = room, *kernels = room + SIDE * SIDE * RESULTS;
    for (int64_t start = 0; start < c->channels; start += DEPTH, inputs += SIDE * SIDE * PLANE) {
        int64_t depth = c->channels - start < DEPTH ? c->channels - start : DEPTH;
        int64_t taps = (output / BLOCK * c->channels + start) * TAPS * BLOCK;
        for (int i = 0; i < SIDE; i++) {
            switch (i) {
            case 0: transform_kernels(bfloat, 0, depth, c->kernels, taps, kernels); break;
            case 1: transform_kernels(bfloat, 1, depth, c->kernels, taps, kernels); break;
            case 2: transform_kernels(bfloat, 2, depth, c->kernels, taps, kernels); break;
            case 3: transform_kernels(bfloat, 3, depth, c->kernels, taps, kernels); break;
            case 4: transform_kernels(bfloat, 4, depth, c->kernels, taps, kernels); break;
            default: transform_kernels(bfloat, 5, depth, c->kernels, taps, kernels); break;
            }
            for (int j = 0; j < SIDE; j++)
                multiply_all(tiles, depth, inputs + (i * SIDE + j) * PLANE, kernels + j * depth * BLOCK,
                             results + (i * SIDE + j) * RESULTS, start > 0);
        }
    }
    write_tiles(bfloat, c, first, tiles, output, results);
}

/* Floats that `inputs` needs. */
int64_t winograd_room(int64_t tiles, int64_t channels) {
    return (tiles + TILES - 1) / TILES * ((channels + DEPTH - 1) / DEPTH) * SIDE * SIDE * PLANE;
}

INLINE int run(int bfloat, const call *c) {
    int failed = 0;
    int64_t tiles = c->images * c->rows * c->columns, tasks = (tiles + TILES - 1) / TILES * (c->outputs / BLOCK);
#pragma omp parallel reduction(| : failed)
    {
        float *room = aligned_alloc(64, (SIDE * SIDE * RESULTS + SIDE * DEPTH * BLOCK) * 4);
        failed = room == NULL;
#pragma omp for schedule(static)
        for (int64_t tile = 0; tile < tiles; tile++) read_tile(bfloat, c, tile);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < tasks; i++)
            if (room != NULL) convolve(bfloat, c, i / (c->outputs / BLOCK), i % (c->outputs / BLOCK) * BLOCK, room);
        free(room);
    }
    return failed;
}

/* Both return 0, or 1 where there was no memory. channels is a multiple of 16, outputs of BLOCK. */

int winograd_float(const call *c) { return run(0, c); }

int winograd_bfloat16(const call *c) { return run(1, c); }
