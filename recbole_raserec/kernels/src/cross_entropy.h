/* Softmax cross-entropy over all items with both gradients: products of bfloat16 pairs (AVX512-BF16), sums in float32.
 *
 * Rows are taken BLOCK at a time; their exponentials stay in cache for the gradient of the rows, and are kept, in the
 * order in which the gradient of the items reads them. No float tensor of size rows x items exists.
 *
 * Exponentials lie in [0, 1] and are rounded to bfloat16; what is left of a row (its sum, its target) stays float32.
 * Two copies are made, each as its product reads it: `near` [panel][row in block][16] holds pairs of neighbouring items
 * for the gradient of the rows, `kept` [panel][row pair][16][2] pairs of rows for the gradient of the items. */
#ifndef RASEREC_CROSS_ENTROPY_H
#define RASEREC_CROSS_ENTROPY_H

#include "tile.h"

#define BLOCK 24

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define HAS_BF16 1
#include <immintrin.h>

typedef struct {
    long rows, items, padded, size; /* rows: even, the last may be padding; size: a multiple of 16 */
    const uint32_t *h;              /* [rows][size / 2]: pairs along a vector */
    const uint32_t *columns;        /* [padded / 64][size / 2][64]: pairs along a vector */
    const uint32_t *vectors;        /* [padded / 2][size]: pairs of items */
    const int64_t *targets;
    uint32_t *kept;  /* [padded / 16][rows / 2][16] */
    float *logits;   /* room of one thread: [padded / 16][BLOCK][16] */
    uint16_t *near;  /* room of one thread: [padded / 16][BLOCK][16] */
    float *scales;   /* [rows]: 1 / sum */
    float *losses;   /* [rows] */
    float *products; /* [rows][size]: exponentials times item vectors, or NULL */
} ce16_job;

INLINE __m512 dot16(__m512 c, uint32_t a, __m512i b) {
    return _mm512_dpbf16_ps(c, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
}

/* Rounds 16 floats to bfloat16. */
INLINE __m256i round16(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

/* As tile(), with pairs: depth counts pairs. */
INLINE void tile16(const int rows, const int vectors, long depth, const uint32_t *a, long row, long column,
                   const uint32_t *b, long ldb, __m512 c[6][4]) {
    for (long k = 0; k < depth; k++, a += column, b += ldb) {
        __m512i line[4];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) line[v] = _mm512_loadu_si512(b + v * 16);
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++) {
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) c[i][v] = dot16(c[i][v], a[i * row], line[v]);
        }
    }
}

static void ce16_rows(const ce16_job *j, long first, long count) {
    const long size = j->size, panels = j->padded / 16;
    __m512 top[BLOCK], total[BLOCK];
    float peak[BLOCK], chosen[BLOCK];
    for (long r = 0; r < BLOCK; r++) top[r] = _mm512_set1_ps(-3.0e38f);
    for (long p = 0; p < panels; p += 4) {
        const uint32_t *b = j->columns + p * 16 * (size / 2);
        const long left = j->items - p * 16;
        for (long i = 0; i < count; i += 6) {
            const int n = (int)(count - i < 6 ? count - i : 6);
            const uint32_t *a = j->h + (first + i) * (size / 2);
            __m512 c[6][4];
            memset(c, 0, sizeof c);
            if (n == 6) {
                tile16(6, 4, size / 2, a, size / 2, 1, b, 64, c);
            } else {
                for (int s = 0; s < n; s++) tile16(1, 4, size / 2, a + s * (size / 2), 0, 1, b, 64, c + s);
            }
            for (int s = 0; s < n; s++)
                for (int v = 0; v < 4; v++) {
                    const long real = left - v * 16;
                    if (real < 16) {
                        const __mmask16 keep = real <= 0 ? 0 : (__mmask16)((1u << real) - 1);
                        c[s][v] = _mm512_mask_blend_ps(keep, _mm512_set1_ps(-3.0e38f), c[s][v]);
                    }
                    top[i + s] = _mm512_max_ps(top[i + s], c[s][v]);
                    _mm512_storeu_ps(j->logits + ((p + v) * BLOCK + i + s) * 16, c[s][v]);
                }
        }
    }
    for (long r = 0; r < count; r++) {
        const int64_t t = j->targets[first + r];
        peak[r] = _mm512_reduce_max_ps(top[r]);
        chosen[r] = j->logits[(t / 16 * BLOCK + r) * 16 + t % 16];
        total[r] = _mm512_setzero_ps();
    }
    for (long p = 0; p < panels; p++) {
        const float *line = j->logits + p * BLOCK * 16;
        uint16_t *near = j->near + p * BLOCK * 16;
        uint32_t *kept = j->kept + (p * (j->rows / 2) + first / 2) * 16;
        for (long r = 0; r < count; r += 2, line += 32, near += 32, kept += 16) {
            __m512 x = (__m512)exp_vf((vf)_mm512_sub_ps(_mm512_loadu_ps(line), _mm512_set1_ps(peak[r])));
            __m512 y = _mm512_setzero_ps();
            total[r] = _mm512_add_ps(total[r], x);
            if (r + 1 < count) {
                y = (__m512)exp_vf((vf)_mm512_sub_ps(_mm512_loadu_ps(line + 16), _mm512_set1_ps(peak[r + 1])));
                total[r + 1] = _mm512_add_ps(total[r + 1], y);
            }
            const __m256i a = round16(x), b = round16(y);
            _mm256_storeu_si256((__m256i *)near, a);
            _mm256_storeu_si256((__m256i *)(near + 16), b);
            _mm512_storeu_si512(kept, _mm512_or_si512(_mm512_cvtepu16_epi32(a),
                                                      _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16)));
        }
    }
    for (long r = 0; r < count; r++) {
        const float sum = _mm512_reduce_add_ps(total[r]);
        j->scales[first + r] = 1.0f / sum;
        j->losses[first + r] = peak[r] - chosen[r] + logf(sum);
        /* The target is left out of the products: its share, p - 1, is added by the caller without rounding. */
        const long t = j->targets[first + r];
        j->near[(t / 16 * BLOCK + r) * 16 + t % 16] = 0;
        j->kept[(t / 16 * (j->rows / 2) + (first + r) / 2) * 16 + t % 16] &= r % 2 ? 0xffffu : 0xffff0000u;
    }
    if (!j->products) return;
    for (long i = 0; i < count; i += 6) {
        const int n = (int)(count - i < 6 ? count - i : 6);
        for (long e = 0; e < size; e += 64) {
            const int vectors = (int)(size - e < 64 ? (size - e) / 16 : 4);
            __m512 c[6][4];
            memset(c, 0, sizeof c);
            for (long p = 0; p < panels; p++) {
                const uint32_t *a = (const uint32_t *)(j->near + (p * BLOCK + i) * 16);
                const uint32_t *b = j->vectors + p * 8 * size + e;
                if (n == 6 && vectors == 4) {
                    tile16(6, 4, 8, a, 8, 1, b, size, c);
                } else {
                    for (int s = 0; s < n; s++)
                        for (int v = 0; v < vectors; v++)
                            for (int k = 0; k < 8; k++)
                                c[s][v] = dot16(c[s][v], a[s * 8 + k], _mm512_loadu_si512(b + k * size + v * 16));
                }
            }
            for (int s = 0; s < n; s++)
                for (int v = 0; v < vectors; v++)
                    _mm512_storeu_ps(j->products + (first + i + s) * size + e + v * 16, c[s][v]);
        }
    }
}

/* grad [items][size] += exponentials times `scaled` (pairs of rows [rows / 2][size]), for panel p. */
static void ce16_items(const ce16_job *j, const uint32_t *scaled, long p, float *grad) {
    const long pairs = j->rows / 2, size = j->size;
    const long items = j->items - p * 16 < 16 ? j->items - p * 16 : 16;
    const uint32_t *a = j->kept + p * pairs * 16;
    for (long i = 0; i < items; i += 6) {
        const int n = (int)(items - i < 6 ? items - i : 6);
        for (long e = 0; e < size; e += 64) {
            const int vectors = (int)(size - e < 64 ? (size - e) / 16 : 4);
            float *out = grad + (p * 16 + i) * size + e;
            __m512 c[6][4];
            memset(c, 0, sizeof c);
            if (vectors == 4) {
                if (n == 6) tile16(6, 4, pairs, a + i, 1, 16, scaled + e, size, c);
                else if (n == 5) tile16(5, 4, pairs, a + i, 1, 16, scaled + e, size, c);
                else if (n == 4) tile16(4, 4, pairs, a + i, 1, 16, scaled + e, size, c);
                else
                    for (int s = 0; s < n; s++) tile16(1, 4, pairs, a + i + s, 1, 16, scaled + e, size, c + s);
            } else {
                for (int s = 0; s < n; s++)
                    for (long k = 0; k < pairs; k++)
                        for (int v = 0; v < vectors; v++)
                            c[s][v] = dot16(c[s][v], a[k * 16 + i + s], _mm512_loadu_si512(scaled + k * size + e + v * 16));
            }
            for (int s = 0; s < n; s++)
                for (int v = 0; v < vectors; v++) {
                    float *at = out + s * size + v * 16;
                    _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), c[s][v]));
                }
        }
    }
}

/* Pairs of floats as bfloat16: low half first. */
INLINE __m512i pair16(__m512 low, __m512 high) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(round16(low)),
                           _mm512_slli_epi32(_mm512_cvtepu16_epi32(round16(high)), 16));
}
#else
#define HAS_BF16 0
#endif

#endif
