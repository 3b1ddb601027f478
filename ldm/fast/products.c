/* Products of matrices on a CPU, float32: (n, rows, k) (n, k, columns) -> (n, rows, columns), all contiguous.

   Goto & van de Geijn 2008, "Anatomy of High-Performance Matrix Multiplication", ACM TOMS 34(3): a tile of results in the
   registers, and a block of the second matrix in the first level of cache, copied there so that it is read from end to end.
   The sums over k are of blocks of DEPTH, which are then added up, so that the error grows with DEPTH rather than with k. */

#include <stdint.h>
#include <string.h>

#if !defined(__AVX512F__)
#error "with shorter vectors torch's own products are quicker"
#endif
enum { LANES = 16, VECTORS = 4, ROWS = 6, COLUMNS = LANES * VECTORS, DEPTH = 128 };

typedef float vector __attribute__((vector_size(LANES * 4)));
typedef float loose __attribute__((vector_size(LANES * 4), aligned(4), may_alias)); /* wherever a number may be */

#define INLINE static inline __attribute__((always_inline))

/* sums[r] += a[r] times the block [depth][COLUMNS]. */
INLINE void tile(int64_t depth, const float *const a[ROWS], const vector *block, vector sums[ROWS][VECTORS]) {
    for (int64_t i = 0; i < depth; i++, block += VECTORS)
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            vector one = a[r][i] - (vector){};
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) sums[r][v] += one * block[v];
        }
}

/* A row of sums -> `width` numbers, or added to them. */
INLINE void store(const vector sums[VECTORS], int64_t width, int add, float *to) {
    if (width == COLUMNS)
        for (int v = 0; v < VECTORS; v++) ((loose *)to)[v] = (loose)(add ? (vector)((loose *)to)[v] + sums[v] : sums[v]);
    else
        for (int64_t i = 0; i < width; i++) to[i] = (add ? to[i] : 0.0f) + sums[i / LANES][i % LANES];
}

/* Rows first to last of one product. */
static void multiply(const float *a, const float *b, float *out, int64_t first, int64_t last, int64_t k, int64_t columns) {
    vector block[DEPTH * VECTORS];
    for (int64_t column = 0; column < columns; column += COLUMNS) {
        int64_t width = columns - column < COLUMNS ? columns - column : COLUMNS;
        for (int64_t start = 0; start < k; start += DEPTH) {
            int64_t depth = k - start < DEPTH ? k - start : DEPTH;
            if (width < COLUMNS) memset(block, 0, sizeof block);
            for (int64_t i = 0; i < depth; i++)
                memcpy((float *)block + i * COLUMNS, b + (start + i) * columns + column, width * 4);
            for (int64_t row = first; row < last; row += ROWS) {
                int64_t count = last - row < ROWS ? last - row : ROWS;
                const float *rows[ROWS];
                for (int r = 0; r < ROWS; r++) rows[r] = a + (row + (r < count ? r : 0)) * k + start;
                vector sums[ROWS][VECTORS] = {};
                tile(depth, rows, block, sums);
                for (int r = 0; r < ROWS; r++)
                    if (r < count) store(sums[r], width, start > 0, out + (row + r) * columns + column);
            }
        }
    }
}

/* parts: that the rows of each product are computed in. */
void products(const float *a, const float *b, float *out, int64_t n, int64_t rows, int64_t k, int64_t columns, int64_t parts) {
    int64_t part = ((rows + parts - 1) / parts + ROWS - 1) / ROWS * ROWS;
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t i = 0; i < n * parts; i++) {
        int64_t one = i / parts, first = i % parts * part, last = first + part < rows ? first + part : rows;
        multiply(a + one * rows * k, b + one * k * columns, out + one * rows * columns, first, last, k, columns);
    }
}
