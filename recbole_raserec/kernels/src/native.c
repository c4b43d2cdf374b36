/* Kernels called through ctypes; see recbole_raserec/kernels/native.py for what they compute and who checks arguments.
 *
 * No Python, no torch: plain arrays in and out, memory of the caller's. OpenMP's threads, which are torch's own where
 * torch was loaded first. */
#include <math.h>
#include <omp.h>
#include <stdlib.h>

#include "cross_entropy.h"
#include "decode.h"
#include "layers.h"

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

/* Floats in a vector, whether the cross-entropy is there, number of this interface. */
EXPORT void raserec_properties(int64_t *found) {
    found[0] = W;
    found[1] = HAS_BF16;
    found[2] = 3; /* native.py: INTERFACE */
}

#if HAS_BF16
/* The same in bfloat16. Room: columns, vectors [padded][size] uint16; kept [padded][chunk] uint16;
 * scaled [chunk][size] uint16 (and again, for the rows); block [threads][padded][BLOCK] float and uint16. */
EXPORT void raserec_cross_entropy_bf16(long rows, long items, long size, const float *h, const float *table,
                                       const int64_t *targets, const float *weights, uint32_t *columns,
                                       uint32_t *vectors, uint32_t *kept, uint32_t *scaled, uint32_t *pairs,
                                       float *logits, uint16_t *near, float *scales, long chunk, int threads,
                                       float *losses, float *grad_h, float *grad_items) {
    const long padded = ROUND_UP(items, 64);
#pragma omp parallel num_threads(threads)
    {
        const int thread = omp_get_thread_num();
#pragma omp for schedule(static)
        for (long p = 0; p < padded / 64; p++) {
            float line[2][64];
            for (long e = 0; e < 64; e += 2) {
                const long item = p * 64 + e;
                const float *pair[2];
                for (int s = 0; s < 2; s++) {
                    pair[s] = table + (item + s) * size;
                    if (item + s >= items) pair[s] = NULL;
                }
                for (long k = 0; k < size; k += 16) {
                    const __m512 x = pair[0] ? _mm512_loadu_ps(pair[0] + k) : _mm512_setzero_ps();
                    const __m512 y = pair[1] ? _mm512_loadu_ps(pair[1] + k) : _mm512_setzero_ps();
                    _mm512_storeu_si512(vectors + item / 2 * size + k, pair16(x, y));
                    uint32_t row[2][8];
                    _mm256_storeu_si256((__m256i *)row[0], round16(x));
                    _mm256_storeu_si256((__m256i *)row[1], round16(y));
                    for (int q = 0; q < 8; q++)
                        for (int s = 0; s < 2; s++) columns[(p * (size / 2) + k / 2 + q) * 64 + e + s] = row[s][q];
                }
            }
            (void)line;
        }
        for (long start = 0; start < rows; start += chunk) {
            const long count = rows - start < chunk ? rows - start : chunk, even = ROUND_UP(count, 2);
            ce16_job job = {even, items, padded, size, pairs, columns, vectors, targets + start, kept,
                            logits + thread * padded * BLOCK, near + thread * padded * BLOCK, scales, losses + start,
                            grad_h ? grad_h + start * size : NULL};
#pragma omp for schedule(static)
            for (long r = 0; r < count; r++)
                for (long k = 0; k < size; k += 16)
                    _mm256_storeu_si256((__m256i *)(pairs + r * (size / 2) + k / 2),
                                        round16(_mm512_loadu_ps(h + (start + r) * size + k)));
            const long blocks = (count + BLOCK - 1) / BLOCK;
#pragma omp for schedule(dynamic, 1)
            for (long b = 0; b < blocks; b++)
                ce16_rows(&job, b * BLOCK, count - b * BLOCK < BLOCK ? count - b * BLOCK : BLOCK);
            if (grad_items) {
#pragma omp for schedule(static)
                for (long r = 0; r < even; r += 2)
                    for (long k = 0; k < size; k += 16) {
                        const float *x = h + (start + r) * size + k;
                        const __m512 a = _mm512_mul_ps(_mm512_loadu_ps(x),
                                                       _mm512_set1_ps(weights[start + r] * scales[r]));
                        const __m512 b = r + 1 < count ? _mm512_mul_ps(_mm512_loadu_ps(x + size),
                                                                       _mm512_set1_ps(weights[start + r + 1] * scales[r + 1]))
                                                       : _mm512_setzero_ps();
                        _mm512_storeu_si512(scaled + r / 2 * size + k, pair16(a, b));
                    }
#pragma omp for schedule(static)
                for (long p = 0; p < padded / 16; p++)
                    if (p * 16 < items) ce16_items(&job, scaled, p, grad_items);
            }
            if (grad_h) {
#pragma omp for schedule(static)
                for (long r = 0; r < count; r++) {
                    const float *own = table + targets[start + r] * size;
                    float *out = grad_h + (start + r) * size;
                    const float weight = weights[start + r], scale = scales[r], miss = -expm1f(-losses[start + r]);
                    for (long e = 0; e < size; e++) out[e] = weight * (scale * out[e] - miss * own[e]);
                }
            }
        }
    }
    if (grad_items)
        for (long r = 0; r < rows; r++) {
            float *own = grad_items + targets[r] * size;
            const float miss = -expm1f(-losses[r]) * weights[r]; /* 1 - p of the target, exact where p is near 1 */
            for (long e = 0; e < size; e++) own[e] -= miss * h[r * size + e];
        }
}
#endif

static encoder encoder_of(const int64_t *numbers, const int64_t *item, const int64_t *offsets, const int64_t *chosen,
                          const int64_t *chosen_offsets, const float *table, const float *positions, float *weights,
                          float *columns, float *tape, const float *settings, const uint32_t *seeds) {
    encoder n = {{numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], numbers[6], numbers[7],
                  numbers[8]},
                 item, offsets, chosen, chosen_offsets, table, positions, weights, columns, tape, settings[0],
                 {seeds[0], seeds[1], -1, 1}, {seeds[2], seeds[3], -1, 1}, (int)numbers[9]};
    drop *drops[2] = {&n.hidden, &n.attention};
    for (int i = 0; i < 2; i++)
        if (settings[1 + i] > 0) {
            const double kept = 2147483648.0 * (1.0 - (double)settings[1 + i]);
            drops[i]->threshold = (int32_t)kept;
            drops[i]->scale = (float)(2147483648.0 / drops[i]->threshold);
        }
    return n;
}

/* First sequence of each group, and at the end the number of sequences; returns the number of groups. */
static long make_groups(const encoder *n, long *first) {
    long groups = 0, tokens = 0;
    for (long q = 0; q < n->s.sequences; q++) {
        const long length = n->offsets[q + 1] - n->offsets[q];
        if (q == 0 || tokens + length > GROUP) {
            first[groups++] = q;
            tokens = 0;
        }
        tokens += length;
    }
    first[groups] = n->s.sequences;
    return groups;
}

/* Floats of the transposed weights and of the tape. */
EXPORT void raserec_encoder_floats(const int64_t *numbers, int64_t *found) {
    const shape s = {numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], numbers[6], numbers[7],
                     numbers[8]};
    const long slots = numbers[9] ? s.layers - 1 : 1;
    found[0] = s.layers * column_floats(&s);
    found[1] = embedding_tape_floats(&s) + slots * tape_floats(&s, s.tokens) + tape_floats(&s, s.outputs);
}

/* Outputs [outputs][size] of the chosen tokens. Returns 0, or 1 where there was no memory. */
EXPORT int raserec_encode(const int64_t *numbers, const int64_t *item, const int64_t *offsets, const int64_t *chosen,
                          const int64_t *chosen_offsets, const float *table, const float *positions, float *weights,
                          float *columns, float *tape, const float *settings, const uint32_t *seeds, int threads,
                          float *out) {
    const encoder n = encoder_of(numbers, item, offsets, chosen, chosen_offsets, table, positions, weights, columns,
                                 tape, settings, seeds);
    const shape *s = &n.s;
    long *first = malloc((size_t)(s->sequences + 1) * sizeof(long));
    const long room_size = room_floats(s, group_limit(s));
    float *room = malloc((size_t)(threads * room_size) * sizeof(float));
    if (!first || !room) {
        free(first), free(room);
        return 1;
    }
    const long groups = make_groups(&n, first), last = s->layers - 1;
    for (long layer = 0; layer < s->layers; layer++) make_columns(&n, layer);
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (long i = 0; i < groups; i++) {
        float *own = room + omp_get_thread_num() * room_size;
        group g = group_of(&n, first[i], first[i + 1], 0);
        embed(&n, &g, tape_at(&n, 0).x);
        for (long layer = 0; layer < last; layer++)
            forward_layer(&n, layer, &g, own, tape_at(&n, layer + 1).x + g.token * s->size);
        g = group_of(&n, first[i], first[i + 1], 1);
        forward_layer(&n, last, &g, own, out + g.query * s->size);
    }
    free(first), free(room);
    return 0;
}

/* After raserec_encode with a tape: gradients of the flat weights, the position and the item table, added to. */
EXPORT int raserec_encode_backward(const int64_t *numbers, const int64_t *item, const int64_t *offsets,
                                   const int64_t *chosen, const int64_t *chosen_offsets, const float *table,
                                   const float *positions, float *weights, float *columns, float *tape,
                                   const float *settings, const uint32_t *seeds, int threads, const float *grad,
                                   float *grad_weights, float *grad_positions, float *grad_table) {
    const encoder n = encoder_of(numbers, item, offsets, chosen, chosen_offsets, table, positions, weights, columns,
                                 tape, settings, seeds);
    const shape *s = &n.s;
    const long h = s->size, flat = s->layers * layer_floats(s) + 2 * h, summed = flat + s->longest * h;
    const long limit = group_limit(s), room_size = room_floats(s, limit), last = s->layers - 1;
    long *first = malloc((size_t)(s->sequences + 1) * sizeof(long));
    float *room = malloc((size_t)(threads * room_size) * sizeof(float));
    float *sums = calloc((size_t)(threads * summed), sizeof(float));
    float *rows = malloc((size_t)(s->tokens * h) * sizeof(float));
    if (!first || !room || !sums || !rows) {
        free(first), free(room), free(sums), free(rows);
        return 1;
    }
    const long groups = make_groups(&n, first);
#pragma omp parallel num_threads(threads)
    {
        float *own = room + omp_get_thread_num() * room_size;
        float *above = own, *below = above + limit * h, *rest = below + limit * h;
#pragma omp for schedule(static, 1)
        for (int slot = 0; slot < threads; slot++) /* sums by slot: the same bits however many threads are granted */
            for (long i = slot; i < groups; i += threads) {
                float *sum = sums + slot * summed;
                group g = group_of(&n, first[i], first[i + 1], 1);
                memcpy(above, grad + g.query * h, (size_t)(g.queries * h) * sizeof(float));
                backward_layer(&n, last, &g, rest, above, layer_at(s, sum, last), below);
                g = group_of(&n, first[i], first[i + 1], 0);
                for (long layer = last - 1; layer >= 0; layer--)
                    backward_layer(&n, layer, &g, rest, below, layer_at(s, sum, layer), below);
                embed_backward(&n, &g, sum + s->layers * layer_floats(s), sum + flat, below);
                memcpy(rows + g.token * h, below, (size_t)(g.tokens * h) * sizeof(float));
            }
    }
    for (int t = 0; t < threads; t++) { /* in this order whatever the threads did first: results repeat */
        add_rows(sums + t * summed, flat, grad_weights);
        add_rows(sums + t * summed + flat, s->longest * h, grad_positions);
    }
    for (long t = 0; t < s->tokens; t++) add_rows(rows + t * h, h, grad_table + item[t] * h);
    free(first), free(room), free(sums), free(rows);
    return 0;
}

/* Patterns of sequences, see decode.h; `closeness`: epsilon of the norms, and `unsure`. Returns 0, or 1 where there was
 * no memory. */
EXPORT int raserec_decode(const int64_t *numbers, const float *source, const int64_t *ids, const uint8_t *unused,
                          const uint8_t *own, const float *into, const float *into_bias, const float *weights,
                          const float *positions, const float *gain, const float *shift, const float *table,
                          const void *columns, const float *errors, const float *norms, const float *settings,
                          int threads, int64_t *written, uint8_t *close) {
    const decoder d = {numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], numbers[6], numbers[7],
                       numbers[8], numbers[9], source, ids, unused, own, into, into_bias, weights, positions, gain,
                       shift, table, columns, errors, norms, settings[0], settings[1], written, close};
    const long each = BLOCK_ROWS > d.ways ? BLOCK_ROWS / d.ways : 1, blocks = (d.sequences + each - 1) / each;
    const long room_size = decoder_room(&d);
    float *room = malloc((size_t)(threads * room_size) * sizeof(float));
    if (!room) return 1;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (long b = 0; b < blocks; b++)
        decode_block(&d, b * each, d.sequences - b * each < each ? d.sequences - b * each : each,
                     room + omp_get_thread_num() * room_size);
    free(room);
    return 0;
}
