/* Vectors of float32 as wide as the processor has them, and bfloat16 that is widened as it is read and rounded as it is
   written. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
enum { LANES = 16 };
#elif defined(__AVX2__)
enum { LANES = 8 };
#else
#error "no vectors to speak of: torch's own kernels are as quick"
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float vector __attribute__((vector_size(LANES * 4)));
typedef uint32_t integers __attribute__((vector_size(LANES * 4)));
typedef int32_t signed_integers __attribute__((vector_size(LANES * 4)));
typedef uint16_t halves __attribute__((vector_size(LANES * 2)));
typedef float loose __attribute__((vector_size(LANES * 4), aligned(4), may_alias)); /* wherever a number may be */

INLINE vector load(const float *from) { return (vector) * (const loose *)from; }
INLINE void store(float *to, vector x) { *(loose *)to = (loose)x; }

/* LANES elements of either type, from element `at` on. */
INLINE vector read_elements(int bfloat, const void *from, int64_t at) {
    if (!bfloat) return load((const float *)from + at);
    halves short_ones;
    memcpy(&short_ones, (const uint16_t *)from + at, sizeof short_ones);
    return (vector)(__builtin_convertvector(short_ones, integers) << 16);
}

INLINE void write_elements(int bfloat, void *to, int64_t at, vector x) {
    if (!bfloat) {
        store((float *)to + at, x);
        return;
    }
    integers bits = (integers)x, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16; /* to nearest, ties to even */
    integers nan = (integers)(x != x);
    halves short_ones = __builtin_convertvector((rounded & ~nan) | (0x7fc0 & nan), halves);
    memcpy((uint16_t *)to + at, &short_ones, sizeof short_ones);
}

INLINE vector larger(vector a, vector b) { /* b where either is NaN */
    signed_integers more = a > b;
    return (vector)((more & (signed_integers)a) | (~more & (signed_integers)b));
}

/* 2^x for x <= 127, to 8e-8 of itself, and no less than 2^-126; NaN of NaN. x = n + f, |f| <= 1/2, and the polynomial is that
   of degree 6 with the least relative error there, 1.9e-9 before rounding. */
INLINE vector power(vector x) {
    const float magic = 12582912.0f + 127.0f; /* with 1.5 * 2^23 added, a number's last bits are the nearest integer */
    x = larger((vector){} - 126.0f, x);
    vector shifted = x + magic, f = x - (shifted - magic);
    vector y = f * 1.53458119e-4f + 1.33999312e-3f;
    y = y * f + 9.61848896e-3f;
    y = y * f + 5.55032878e-2f;
    y = y * f + 2.40226469e-1f;
    y = y * f + 6.93147206e-1f;
    y = y * f + 1.0f;
    return y * (vector)((integers)shifted << 23);
}
