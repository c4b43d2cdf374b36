/* Greedy decoding of patterns by a transformer decoder, and the search for the best item among all.
 *
 * Rows (a sequence in one of its `ways`) are taken a few sequences at a time, all steps of them before the next, so
 * that what they need stays in cache. Rows that have ended leave; a row's result does not depend on the others'.
 *
 * The best of all items is found exactly without all exact products: products of bfloat16 (float32 where the processor
 * has none) give each panel of PANEL items an upper bound, and only panels that may hold the best are computed again.
 */
#include <float.h>
#include <math.h>

#include "cross_entropy.h"
#include "rows.h"

#define PANEL 64
#define BLOCK_ROWS 60

typedef struct {
    long sequences, ways, steps, longest, size, inner, heads, layers, items, least; /* least: items before an end */
    const float *source;     /* [sequences][longest][size]: the encoder's output */
    const int64_t *ids;      /* [sequences][longest]: items, 0 behind the end */
    const uint8_t *unused;   /* [sequences][longest]: may be chosen */
    const uint8_t *own;      /* [sequences][ways][steps]: choose among the sequence's items */
    const float *into;       /* [size][ways * layers * 2 * size], and a bias: keys and values of the source */
    const float *into_bias;
    const float *weights;    /* see layer_of */
    const float *positions;  /* [steps][size] */
    const float *gain, *shift; /* of the embeddings' norm */
    const float *table;      /* [items + 2][size]: items, start, end */
    const void *columns;     /* the items in panels, see product_peaks */
    const float *errors;     /* [panels]: largest |item - its rounding| */
    const float *norms;      /* [panels]: largest |rounded item| */
    float epsilon, unsure;   /* unsure: per |h| */
    int64_t *written;        /* [sequences][ways][steps], zeros */
    uint8_t *close;          /* [sequences][ways], zeros: a choice could have been another in exact arithmetic */
} decoder;

typedef struct {
    const float *qkv, *qkv_bias, *o, *o_bias, *gain1, *shift1, *q, *q_bias, *p, *p_bias, *gain2, *shift2, *in, *in_bias,
        *out, *out_bias, *gain3, *shift3;
} decoder_layer;

typedef struct {
    float best, second;
    int64_t place; /* item; -1: none */
} choice;

static long decoder_layer_floats(const decoder *d) {
    const long h = d->size;
    return 6 * h * h + 2 * h * d->inner + 13 * h + d->inner;
}

/* The parts of a layer's weights in their order; matrices [in][out]. */
static decoder_layer layer_of(const decoder *d, long layer) {
    const float *at = d->weights + layer * decoder_layer_floats(d);
    const long h = d->size, n = d->inner;
    const long sizes[18] = {3 * h * h, 3 * h, h * h, h, h, h, h * h, h, h * h, h, h, h, h * n, n, n * h, h, h, h};
    const float *parts[18];
    for (int i = 0; i < 18; at += sizes[i++]) parts[i] = at;
    decoder_layer w;
    memcpy(&w, parts, sizeof w);
    return w;
}

INLINE float dot(const float *a, const float *b, long size) {
    vf sum = {0};
    for (long e = 0; e < size; e += W) sum += load(a + e) * load(b + e);
    return sum_of(sum);
}

static void affine(long rows, long n, long depth, const float *x, const float *w, const float *bias, float *y) {
    fill_rows(bias, rows, n, y);
    product(rows, n, depth, x, depth, 1, w, n, y, n, 1);
}

/* One query over `count` keys, values `size` behind them, `stride` floats apart. */
static void attend_row(const float *q, const float *keys, long stride, long count, long size, long heads, float *scores,
                       float *out) {
    const long dim = size / heads;
    const float scale = 1.0f / sqrtf((float)dim);
    for (long a = 0; a < heads; a++, q += dim, keys += dim, out += dim) {
        float top = -FLT_MAX, sum = 0;
        for (long s = 0; s < count; s++) {
            scores[s] = scale * dot(q, keys + s * stride, dim);
            if (scores[s] > top) top = scores[s];
        }
        for (long s = count; s < ROUND_UP(count, W); s++) scores[s] = -FLT_MAX;
        for (long s = 0; s < count; s += W) store(scores + s, exp_vf(load(scores + s) - top));
        for (long s = 0; s < count; s++) sum += scores[s];
        const float inverse = 1.0f / sum;
        for (long e = 0; e < dim; e += W) {
            vf mixed = {0};
            for (long s = 0; s < count; s++) mixed += scores[s] * load(keys + s * stride + size + e);
            store(out + e, mixed * inverse);
        }
    }
}

INLINE void offer(choice *c, float value, int64_t place) {
    if (value > c->best) {
        c->second = c->best, c->best = value, c->place = place;
    } else if (value > c->second) {
        c->second = value;
    }
}

static int is_written(const int64_t *written, long step, int64_t item) {
    for (long t = 0; t < step; t++)
        if (written[t] == item) return 1;
    return 0;
}

#if HAS_BF16
typedef uint32_t packed; /* pairs along a vector, of bfloat16 */
#define PACK 2
#else
typedef float packed;
#define PACK 1
#endif

/* peaks[row][panel] = largest rounded product in each panel; columns [panels][size / PACK][PANEL]. */
static void product_peaks(const decoder *d, const packed *h, long rows, float *peaks) {
    const long panels = ROUND_UP(d->items, PANEL) / PANEL, depth = d->size / PACK;
    for (long p = 0; p < panels; p++) {
        const packed *b = (const packed *)d->columns + p * depth * PANEL;
        const long real = d->items - p * PANEL < PANEL ? d->items - p * PANEL : PANEL;
        for (long i = 0; i < rows; i += 6) {
            const long n = rows - i < 6 ? rows - i : 6;
#if PACK == 2
            __m512 c[6][4];
            memset(c, 0, sizeof c);
            if (n == 6) {
                tile16(6, 4, depth, h + i * depth, depth, 1, b, PANEL, c);
            } else {
                for (long s = 0; s < n; s++) tile16(1, 4, depth, h + (i + s) * depth, 0, 1, b, PANEL, c + s);
            }
            for (long s = 0; s < n; s++) {
                __m512 top = _mm512_set1_ps(-FLT_MAX);
                for (long v = 0; v * 16 < real; v++) {
                    const long left = real - v * 16;
                    const __mmask16 keep = left < 16 ? (__mmask16)((1u << left) - 1) : (__mmask16)0xffff;
                    top = _mm512_mask_max_ps(top, keep, top, c[s][v]);
                }
                peaks[(i + s) * panels + p] = _mm512_reduce_max_ps(top);
            }
#else
            float c[6][PANEL];
            product(n, PANEL, depth, h + i * depth, depth, 1, b, PANEL, c[0], PANEL, 0);
            for (long s = 0; s < n; s++) {
                float top = -FLT_MAX;
                for (long e = 0; e < real; e++) top = c[s][e] > top ? c[s][e] : top;
                peaks[(i + s) * panels + p] = top;
            }
#endif
        }
    }
}

/* Rounds a row, and returns the length of what is lost. */
static float pack_row(const float *h, long size, packed *to) {
#if PACK == 2
    float lost = 0;
    for (long k = 0; k < size; k += 16) {
        const __m512 x = _mm512_loadu_ps(h + k);
        const __m256i half = round16(x);
        const __m512 back = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
        const __m512 gap = _mm512_sub_ps(x, back);
        lost += _mm512_reduce_add_ps(_mm512_mul_ps(gap, gap));
        _mm256_storeu_si256((__m256i *)(to + k / 2), half);
    }
    return sqrtf(lost);
#else
    memcpy(to, h, (size_t)size * sizeof(float));
    return 0;
#endif
}

/* Best and second of the items in [first, last) that are neither 0 nor written. */
static void exact_panel(const decoder *d, const float *h, const int64_t *written, long step, long panel, choice *c) {
    const long first = panel * PANEL, last = first + PANEL < d->items ? first + PANEL : d->items;
    for (long item = first ? first : 1; item < last; item++)
        if (!is_written(written, step, item)) offer(c, dot(h, d->table + item * d->size, d->size), item);
}

/* Best of all items for one row, from its peaks. The second is right where it lies within `unsure` of the best. */
static choice best_of_all(const decoder *d, const float *h, float length, float lost, float *peaks,
                          const int64_t *written, long step) {
    const long panels = ROUND_UP(d->items, PANEL) / PANEL;
    choice c = {-INFINITY, -INFINITY, -1};
    /* Panels with barred items: their peaks may be those items'. */
    for (long t = -1; t < step; t++) {
        const long p = t < 0 ? 0 : written[t] / PANEL;
        if (peaks[p] == -INFINITY) continue;
        exact_panel(d, h, written, step, p, &c);
        peaks[p] = -INFINITY;
    }
    float floor = c.best;
    for (long p = 0; p < panels; p++) {
        if (peaks[p] == -INFINITY) continue;
        const float bound = length * d->errors[p] + lost * d->norms[p] + 1e-5f * length * (d->norms[p] + d->errors[p]);
        floor = peaks[p] - bound > floor ? peaks[p] - bound : floor;
        peaks[p] += bound; /* now no item of the panel is above */
    }
    floor -= d->unsure * length;
    for (long p = 0; p < panels; p++)
        if (peaks[p] != -INFINITY && peaks[p] >= floor) {
            exact_panel(d, h, written, step, p, &c);
            if (c.best - d->unsure * length > floor) floor = c.best - d->unsure * length;
        }
    return c;
}

/* Floats of a thread's room. */
static long decoder_room(const decoder *d) {
    const long h = d->size, rows = BLOCK_ROWS > d->ways ? BLOCK_ROWS : d->ways;
    const long panels = ROUND_UP(d->items, PANEL) / PANEL;
    return rows * (h * 7 + d->inner + d->layers * d->steps * 2 * h + panels + h + 2) +
           (rows / d->ways) * d->longest * d->ways * d->layers * 2 * h + ROUND_UP(d->longest + d->steps, W) + 4 * W;
}

/* All steps of sequences first .. first + count - 1. */
static void decode_block(const decoder *d, long first, long count, float *room) {
    const long h = d->size, ways = d->ways, rows = count * ways, steps = d->steps, line = ways * d->layers * 2 * h;
    const long panels = ROUND_UP(d->items, PANEL) / PANEL, cached = d->layers * steps * 2 * h;
    float *x = room, *y = x + rows * h, *mixed = y + rows * h, *q = mixed + rows * h; /* q: queries, keys, values */
    float *context = q + rows * 3 * h, *wide = context + rows * h, *cache = wide + rows * d->inner;
    float *peaks = cache + rows * cached, *scores = peaks + rows * panels;
    float *lengths = scores + ROUND_UP(d->longest + steps, W), *lost = lengths + rows;
    packed *halves = (packed *)(lost + rows);
    float *sources = lost + rows + rows * h;
    long length_of[BLOCK_ROWS], active[BLOCK_ROWS], search[BLOCK_ROWS], n = 0;
    for (long s = 0; s < count; s++) {
        long length = 0;
        const int64_t *ids = d->ids + (first + s) * d->longest;
        while (length < d->longest && ids[length] > 0) length++;
        length_of[s] = length;
        affine(length, line, h, d->source + (first + s) * d->longest * h, d->into, d->into_bias,
               sources + s * d->longest * line);
    }
    for (long r = 0; r < rows; r++)
        if (length_of[r / ways]) active[n++] = r;
    for (long step = 0; step < steps && n; step++) {
        for (long i = 0; i < n; i++) {
            const long token = step ? d->written[(first * ways + active[i]) * steps + step - 1] : d->items;
            for (long e = 0; e < h; e += W)
                store(y + i * h + e, load(d->table + token * h + e) + load(d->positions + step * h + e));
        }
        layer_norm(y, n, h, d->gain, d->shift, d->epsilon, context, lengths, x);
        for (long layer = 0; layer < d->layers; layer++) {
            const decoder_layer w = layer_of(d, layer);
            affine(n, 3 * h, h, x, w.qkv, w.qkv_bias, q);
            for (long i = 0; i < n; i++) {
                float *keys = cache + active[i] * cached + layer * steps * 2 * h;
                memcpy(keys + step * 2 * h, q + i * 3 * h + h, (size_t)(2 * h) * sizeof(float));
                attend_row(q + i * 3 * h, keys, 2 * h, step + 1, h, d->heads, scores, context + i * h);
            }
            affine(n, h, h, context, w.o, w.o_bias, mixed);
            add_rows(x, n * h, mixed);
            layer_norm(mixed, n, h, w.gain1, w.shift1, d->epsilon, context, lengths, x);
            affine(n, h, h, x, w.q, w.q_bias, q);
            for (long i = 0; i < n; i++) {
                const long s = active[i] / ways, way = active[i] % ways;
                const float *keys = sources + s * d->longest * line + (way * d->layers + layer) * 2 * h;
                attend_row(q + i * h, keys, line, length_of[s], h, d->heads, scores, context + i * h);
            }
            affine(n, h, h, context, w.p, w.p_bias, mixed);
            add_rows(x, n * h, mixed);
            layer_norm(mixed, n, h, w.gain2, w.shift2, d->epsilon, context, lengths, x);
            affine(n, d->inner, h, x, w.in, w.in_bias, wide);
            for (long e = 0; e < n * d->inner; e += W) {
                const vf v = load(wide + e);
                store(wide + e, select_vf(v > 0, v, (vf){0}));
            }
            affine(n, h, d->inner, wide, w.out, w.out_bias, mixed);
            add_rows(x, n * h, mixed);
            layer_norm(mixed, n, h, w.gain3, w.shift3, d->epsilon, context, lengths, x);
        }
        long searched = 0, left = 0;
        for (long i = 0; i < n; i++)
            if (!d->own[(first * ways + active[i]) * steps + step]) search[searched++] = i;
        for (long i = 0; i < searched; i++) lost[i] = pack_row(x + search[i] * h, h, halves + i * (h / PACK));
        if (searched) product_peaks(d, halves, searched, peaks);
        for (long i = 0, number = 0; i < n; i++) {
            const long row = first * ways + active[i];
            int64_t *written = d->written + row * steps;
            const float *v = x + i * h, length = sqrtf(dot(v, v, h));
            choice c = {-INFINITY, -INFINITY, -1};
            if (number < searched && search[number] == i) {
                c = best_of_all(d, v, length, lost[number], peaks + number * panels, written, step);
                number++;
            } else {
                const long s = first + active[i] / ways;
                const int64_t *ids = d->ids + s * d->longest;
                for (long t = 0; t < length_of[s - first]; t++)
                    if (d->unused[s * d->longest + t] && !is_written(written, step, ids[t]))
                        offer(&c, dot(v, d->table + ids[t] * h, h), ids[t]);
            }
            float end = dot(v, d->table + (d->items + 1) * h, h);
            if (step < d->least && c.place >= 0) end = -INFINITY;
            const float gap = end > c.best ? end - c.best : c.best - (c.second > end ? c.second : end);
            if (gap <= d->unsure * length) d->close[row] = 1;
            if (c.place < 0 || end > c.best) continue;
            written[step] = c.place;
            active[left++] = active[i];
        }
        n = left;
    }
}
