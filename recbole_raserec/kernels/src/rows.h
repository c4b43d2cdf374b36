/* Operations on rows of activations: bias, dropout, GELU, layer norm. `size`: a multiple of W. */
#ifndef RASEREC_ROWS_H
#define RASEREC_ROWS_H

#include "tile.h"

typedef uint32_t vu __attribute__((vector_size(W * 4), aligned(4)));

/* Dropout of one call: an element is kept where a hash of its number and the seed lies below `threshold`. */
typedef struct {
    uint32_t seed, salt;
    int32_t threshold; /* of 2^31; negative: nothing is dropped */
    float scale;
} drop;

INLINE vu mix(vu x) { /* finaliser of MurmurHash3 */
    x ^= x >> 16;
    x *= 0x85ebca6bu;
    x ^= x >> 13;
    x *= 0xc2b2ae35u;
    return x ^ (x >> 16);
}

/* The factor (0 or scale) of elements number .. number + W - 1. */
INLINE vf kept(const drop *d, uint32_t number) {
    vu lane;
    for (int i = 0; i < W; i++) lane[i] = (uint32_t)i;
    vu x = mix(mix((lane + number) * 0x9e3779b9u + d->seed) ^ d->salt);
    return select_vf((vi)(x >> 1) < d->threshold, fill(d->scale), (vf){0});
}

/* Element number of column 0 of `row` at one of the places of a layer where dropout is applied. */
INLINE uint32_t number_of(uint32_t place, long row, long size) { return place * 0x01000193u + (uint32_t)(row * size); }

static void drop_rows(const drop *d, uint32_t place, long first, long rows, long size, float *x) {
    if (d->threshold < 0) return;
    for (long r = 0; r < rows; r++, x += size) {
        const uint32_t number = number_of(place, first + r, size);
        for (long e = 0; e < size; e += W) store(x + e, load(x + e) * kept(d, number + (uint32_t)e));
    }
}

static void fill_rows(const float *bias, long rows, long size, float *x) {
    for (long r = 0; r < rows; r++) memcpy(x + r * size, bias, (size_t)size * sizeof(float));
}

static void add_rows(const float *from, long count, float *to) {
    for (long e = 0; e < count; e += W) store(to + e, load(to + e) + load(from + e));
}

/* sums[size] += sum of the rows. */
static void sum_rows(const float *x, long rows, long size, float *sums) {
    for (long e = 0; e < size; e += W) {
        vf s = load(sums + e);
        for (long r = 0; r < rows; r++) s += load(x + r * size + e);
        store(sums + e, s);
    }
}

/* Standard normal distribution function and density: Abramowitz and Stegun 7.1.26, absolute error below 1e-7. */
INLINE void normal(vf x, vf *below, vf *density) {
    vf a = select_vf(x < 0, -x, x) * 0.70710678118654752f;
    vf bell = exp_vf(-a * a);
    vf t = 1.0f / (1.0f + 0.3275911f * a);
    vf p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
    vf tail = 0.5f * p * bell;
    *below = select_vf(x < 0, tail, 1.0f - tail);
    *density = bell * 0.39894228040143268f;
}

static void gelu(const float *x, long count, float *y) {
    for (long e = 0; e < count; e += W) {
        vf below, density, v = load(x + e);
        normal(v, &below, &density);
        store(y + e, v * below);
    }
}

/* grad *= derivative of GELU at x; also y = GELU(x). */
static void gelu_backward(const float *x, long count, float *y, float *grad) {
    for (long e = 0; e < count; e += W) {
        vf below, density, v = load(x + e);
        normal(v, &below, &density);
        store(y + e, v * below);
        store(grad + e, load(grad + e) * (below + v * density));
    }
}

/* Rows of x become normalised [rows][size] (in `hat`), with 1 / deviation in `inverse`; y = hat gain + shift. */
static void layer_norm(const float *x, long rows, long size, const float *gain, const float *shift, float epsilon,
                       float *hat, float *inverse, float *y) {
    for (long r = 0; r < rows; r++, x += size, hat += size, y += size) {
        vf sum = {0}, squares = {0};
        for (long e = 0; e < size; e += W) sum += load(x + e);
        const float mean = sum_of(sum) / (float)size;
        for (long e = 0; e < size; e += W) {
            vf c = load(x + e) - mean;
            squares += c * c;
        }
        const float scale = 1.0f / sqrtf(sum_of(squares) / (float)size + epsilon);
        inverse[r] = scale;
        for (long e = 0; e < size; e += W) {
            vf c = (load(x + e) - mean) * scale;
            store(hat + e, c);
            store(y + e, c * load(gain + e) + load(shift + e));
        }
    }
}

/* grad [rows][size] with respect to the output becomes that of the input; those of gain and shift are added to. */
static void layer_norm_backward(const float *hat, const float *inverse, long rows, long size, const float *gain,
                                float *gain_grad, float *shift_grad, float *grad) {
    for (long r = 0; r < rows; r++, hat += size, grad += size) {
        vf sum = {0}, dot = {0};
        for (long e = 0; e < size; e += W) {
            vf g = load(grad + e), x = load(hat + e);
            store(gain_grad + e, load(gain_grad + e) + g * x);
            store(shift_grad + e, load(shift_grad + e) + g);
            g *= load(gain + e);
            store(grad + e, g);
            sum += g;
            dot += g * x;
        }
        const float mean = sum_of(sum) / (float)size, along = sum_of(dot) / (float)size;
        for (long e = 0; e < size; e += W)
            store(grad + e, (load(grad + e) - mean - load(hat + e) * along) * inverse[r]);
    }
}

#endif
