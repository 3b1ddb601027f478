/* GroupNorm with SiLU or without, and LayerNorm, on a CPU: maps whose channels are neighbours, float32 or bfloat16, and all
   between float32.

   `moments` finds what each channel is multiplied by and what is added: means and squares about them are found channel by
   channel, of differences from its first pixel, and joined (Chan et al. 1979, "Updating Formulae and a Pairwise Algorithm for
   Computing Sample Variances", eq. 2.1), so that nothing cancels. `normalise` does it to any part of the map. */

#include "vectors.h"

enum { PIXELS = 128, PARTS = 64 }; /* of a partial sum in float32; of an image, at the most, whose sums are found at a time */

typedef struct {
    const void *pixels;         /* (images, pixels, channels), contiguous */
    const float *weight, *bias; /* (channels) */
    float *scale, *offset;      /* (images, channels) */
    int64_t images, count, channels, groups;
    double eps;
} moments_call;

typedef struct {
    const void *pixels;          /* (images, rows, columns, channels) */
    void *out;                   /* the same */
    const float *scale, *offset; /* (images, channels) */
    int64_t images, rows, columns, channels;
    int64_t image, row, pixel, out_image, out_row, out_pixel; /* strides, in elements; a pixel's channels are neighbours */
    int64_t silu;
} normalise_call;

typedef struct {
    const void *tokens;         /* (count, channels) */
    const float *weight, *bias; /* (channels) */
    void *out;                  /* as the tokens */
    int64_t count, channels;
    double eps;
} layer_call;

/* Of up to PIXELS pixels, sums and squares of differences from `shift`, added to `sums`, [channel][2]. */
INLINE void add_some(int bfloat, const moments_call *c, int64_t first, int64_t count, int64_t shift, double *sums) {
    for (int64_t channel = 0; channel < c->channels; channel += LANES) {
        vector from = read_elements(bfloat, c->pixels, shift + channel), sum = {}, square = {};
        for (int64_t i = 0; i < count; i++) {
            vector x = read_elements(bfloat, c->pixels, first + i * c->channels + channel) - from;
            sum += x;
            square += x * x;
        }
        for (int j = 0; j < LANES; j++) sums[2 * (channel + j)] += sum[j], sums[2 * (channel + j) + 1] += square[j];
    }
}

/* Of one image, and the sums of all its tasks, added up: scale and offset. */
static void join(int bfloat, const moments_call *c, int64_t image, const double *sums) {
    int64_t width = c->channels / c->groups;
    for (int64_t first = 0; first < c->channels; first += width) {
        double mean = 0, square = 0, means[width];
        for (int64_t j = 0; j < width; j++) {
            int64_t at = image * c->count * c->channels + first + j;
            float shift = ((const float *)c->pixels)[bfloat ? 0 : at];
            if (bfloat) {
                uint32_t bits = (uint32_t)((const uint16_t *)c->pixels)[at] << 16;
                memcpy(&shift, &bits, 4);
            }
            means[j] = shift + sums[2 * (first + j)] / c->count;
            mean += means[j] / width;
        }
        for (int64_t j = 0; j < width; j++) {
            double sum = sums[2 * (first + j)];
            square += (sums[2 * (first + j) + 1] - sum * sum / c->count) / c->count + (means[j] - mean) * (means[j] - mean);
        }
        for (int64_t j = 0; j < width; j++) {
            int64_t at = image * c->channels + first + j;
            double scale = c->weight[first + j] / sqrt((square > 0 ? square : square != square ? square : 0) / width + c->eps);
            c->scale[at] = (float)scale;
            c->offset[at] = (float)(c->bias[first + j] - mean * scale);
        }
    }
}

INLINE int find_moments(int bfloat, const moments_call *c) {
    int64_t whole = (c->count + PIXELS - 1) / PIXELS, parts = whole < PARTS ? whole : PARTS, all = 2 * c->channels;
    double *sums = calloc(c->images * parts * all, sizeof *sums); /* of each part, whoever sums it */
    if (sums == NULL) return 1;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < c->images * parts; i++) {
        int64_t image = i / parts, part = i % parts, start = image * c->count * c->channels;
        for (int64_t some = part * whole / parts; some < (part + 1) * whole / parts; some++) {
            int64_t first = some * PIXELS, count = c->count - first < PIXELS ? c->count - first : PIXELS;
            add_some(bfloat, c, start + first * c->channels, count, start, sums + i * all);
        }
    }
    for (int64_t image = 0; image < c->images; image++) {
        double *first = sums + image * parts * all;
        for (int64_t i = all; i < parts * all; i++) first[i % all] += first[i];
        join(bfloat, c, image, first);
    }
    free(sums);
    return 0;
}

INLINE vector silu(vector h) {
    vector most = larger((vector){} - 126.0f, h * (float)M_LOG2E); /* beyond, 2^-x would be infinite, and the result is 0 */
    return h / (1.0f + power((vector){} - most));
}

INLINE void apply(int bfloat, int with_silu, const normalise_call *c) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < c->images * c->rows; i++) {
        int64_t image = i / c->rows, row = i % c->rows, from = image * c->image + row * c->row;
        int64_t to = image * c->out_image + row * c->out_row;
        const float *scale = c->scale + image * c->channels, *offset = c->offset + image * c->channels;
        for (int64_t x = 0; x < c->columns; x++, from += c->pixel, to += c->out_pixel)
            for (int64_t channel = 0; channel < c->channels; channel += LANES) {
                vector h = read_elements(bfloat, c->pixels, from + channel) * load(scale + channel) + load(offset + channel);
                write_elements(bfloat, c->out, to + channel, with_silu ? silu(h) : h);
            }
    }
}

INLINE float sum_of(vector x) {
    float sum = 0;
    for (int j = 0; j < LANES; j++) sum += x[j];
    return sum;
}

INLINE void normalise_tokens(int bfloat, const layer_call *c) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < c->count; i++) {
        int64_t from = i * c->channels;
        vector sum = {}, rest = {}, square = {};
        for (int64_t channel = 0; channel < c->channels; channel += LANES)
            sum += read_elements(bfloat, c->tokens, from + channel);
        float mean = sum_of(sum) / c->channels;
        for (int64_t channel = 0; channel < c->channels; channel += LANES) {
            vector x = read_elements(bfloat, c->tokens, from + channel) - mean;
            rest += x;
            square += x * x;
        }
        float left = sum_of(rest) / c->channels; /* what of the mean is lost where it is rounded */
        float scale = 1.0f / sqrtf(sum_of(square) / c->channels - left * left + (float)c->eps);
        for (int64_t channel = 0; channel < c->channels; channel += LANES) {
            vector x = (read_elements(bfloat, c->tokens, from + channel) - mean - left) * scale;
            write_elements(bfloat, c->out, from + channel, x * load(c->weight + channel) + load(c->bias + channel));
        }
    }
}

/* channels is a multiple of LANES and of groups. The first two return 0, or 1 where there was no memory. */

int moments_float(const moments_call *c) { return find_moments(0, c); }
int moments_bfloat16(const moments_call *c) { return find_moments(1, c); }
void normalise_float(const normalise_call *c) { c->silu ? apply(0, 1, c) : apply(0, 0, c); }
void normalise_bfloat16(const normalise_call *c) { c->silu ? apply(1, 1, c) : apply(1, 0, c); }
void layer_float(const layer_call *c) { normalise_tokens(0, c); }
void layer_bfloat16(const layer_call *c) { normalise_tokens(1, c); }
