/* What the kernels for Intel's matrix engine (AMX) share: its eight tiles of 16 rows of 64 bytes, and a few functions of
   vectors of 16 float32.

   A product adds to 16 x 16 sums, float32, those over 32 features of an A, 16 rows of 32 bfloat16, and a B, 16 pairs of its
   rows: element j of pair i is of rows 2 i and 2 i + 1, one after the other. Tiles 0 to 3 are sums, 4 and 5 are A, 6 and 7 B:
   each tile that is read serves two products.

   Intel 64 and IA-32 Architectures Optimization Reference Manual, chapter "Intel AMX". */

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if !defined(__AMX_BF16__) || !defined(__AVX512BF16__)
#error "no matrix engine for bfloat16"
#endif

#define INLINE static inline __attribute__((always_inline))

enum { SIDE = 16, STEP = 32, TILE = SIDE * STEP }; /* rows, or columns; features of a product; elements of an A or B */

typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} __attribute__((aligned(64))) config;

/* Tiles as they are used here; returns how they were, which `end_tiles` brings back: other code may rely on it. */
INLINE config begin_tiles(void) {
    config before, wanted = {.palette = 1};
    for (int i = 0; i < 8; i++) wanted.bytes[i] = 64, wanted.rows[i] = SIDE;
    _tile_storeconfig(&before);
    _tile_loadconfig(&wanted);
    return before;
}

INLINE void end_tiles(config before) {
    if (before.palette)
        _tile_loadconfig(&before);
    else
        _tile_release();
}

/* The four sums from rows of 32 float32 that are `stride` floats apart, or zero. */
INLINE void load_sums(const float *from, int64_t stride) {
    _tile_loadd(0, from, stride * 4);
    _tile_loadd(1, from + SIDE, stride * 4);
    _tile_loadd(2, from + SIDE * stride, stride * 4);
    _tile_loadd(3, from + SIDE * stride + SIDE, stride * 4);
}

INLINE void zero_sums(void) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

INLINE void store_sums(float *to, int64_t stride) {
    _tile_stored(0, to, stride * 4);
    _tile_stored(1, to + SIDE, stride * 4);
    _tile_stored(2, to + SIDE * stride, stride * 4);
    _tile_stored(3, to + SIDE * stride + SIDE, stride * 4);
}

/* 32 rows of A, those of the first tile `stride` elements apart, the second from `second` on, by 32 columns of B, two tiles. */
INLINE void add_products(const uint16_t *a, int64_t stride, const uint16_t *second, const uint16_t *b, const uint16_t *other) {
    _tile_loadd(4, a, stride * 2);
    _tile_loadd(6, b, 64);
    _tile_loadd(7, other, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, second, stride * 2);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
}

/* 2^x, to 4e-6 of itself, for what is then rounded to bfloat16; x = n + f, 0 <= f < 1, and the polynomial is that of degree 4
   with the least relative error there that is 1 at 0 and 2 at 1. */
INLINE __m512 power(__m512 x) {
    __m512 f = _mm512_reduce_ps(x, 1 | 8); /* less the integer below */
    __m512 y = _mm512_fmadd_ps(f, _mm512_set1_ps(1.35549154e-2f), _mm512_set1_ps(5.20348974e-2f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(2.41377745e-1f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(6.93032442e-1f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(y, x);
}

/* Two vectors, rounded, as one of pairs: in each lane, the first's in the lower half, the second's in the upper. */
INLINE __m512i paired(__m512 first, __m512 second) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                           20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}

/* 16 bfloat16 as float32. */
INLINE __m512 widened(__m256i x) { return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16); }
