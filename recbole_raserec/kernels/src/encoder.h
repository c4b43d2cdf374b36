/* A causal transformer (SASRec's) over sequences laid end to end, without padding: outputs at chosen positions.
 *
 * Sequences do not see each other, so that a thread takes a group of them through all layers while they are in cache.
 * Layers are post-norm: x <- norm(x + dropout(attention(x))), x <- norm(x + dropout(feed_forward(x))). The last layer
 * has queries at the chosen positions alone. What the backward pass needs is kept on a tape, dropout is drawn again. */
#include "rows.h"

#define GROUP 96 /* tokens of a group, unless one sequence is longer */

typedef struct {
    long tokens, sequences, outputs, items, longest, size, inner, heads, layers;
} shape;

/* Parameters of one layer in the order of the flat array; those of the embedding follow the layers'. */
typedef struct {
    float *q, *q_bias, *k, *k_bias, *v, *v_bias, *o, *o_bias, *gain1, *shift1;
    float *in, *in_bias, *out, *out_bias, *gain2, *shift2;
} layer_weights;

/* Transposed copies: [input][output]. */
typedef struct {
    float *q, *kv, *kv_bias, *o, *in, *out, *q_bias;
} layer_columns;

/* What a layer leaves for its backward pass. x, kv by token; the others by query. */
typedef struct {
    float *x, *kv, *q, *context, *hat1, *inverse1, *inner, *hat2, *inverse2;
} layer_tape;

typedef struct {
    shape s;
    const int64_t *item, *offsets, *chosen, *chosen_offsets;
    const float *table, *positions;
    float *weights;      /* flat; layer_at() finds a layer's */
    float *columns;      /* room for the transposed copies */
    float *tape;
    float epsilon;
    drop hidden, attention;
    int keep_tape;
} encoder;

INLINE long layer_floats(const shape *s) {
    return 4 * (s->size * s->size + s->size) + 2 * s->size * s->inner + s->inner + s->size + 4 * s->size;
}

INLINE long column_floats(const shape *s) { return 4 * s->size * s->size + 2 * s->size * s->inner + 3 * s->size; }

INLINE long tape_floats(const shape *s, long queries) {
    return s->tokens * 3 * s->size + queries * (4 * s->size + s->inner + 2);
}

INLINE long embedding_tape_floats(const shape *s) { return s->tokens * (s->size + 1); }

static layer_weights layer_at(const shape *s, float *flat, long layer) {
    layer_weights w;
    float *p = flat + layer * layer_floats(s);
    const long h = s->size, square = h * h, wide = h * s->inner;
#define TAKE(name, count) w.name = p, p += (count)
    TAKE(q, square), TAKE(q_bias, h), TAKE(k, square), TAKE(k_bias, h), TAKE(v, square), TAKE(v_bias, h);
    TAKE(o, square), TAKE(o_bias, h), TAKE(gain1, h), TAKE(shift1, h), TAKE(in, wide), TAKE(in_bias, s->inner);
    TAKE(out, wide), TAKE(out_bias, h), TAKE(gain2, h), TAKE(shift2, h);
#undef TAKE
    return w;
}

static layer_columns columns_at(const shape *s, float *room, long layer) {
    layer_columns c;
    float *p = room + layer * column_floats(s);
    const long h = s->size;
    c.q = p, p += h * h;
    c.kv = p, p += 2 * h * h;
    c.o = p, p += h * h;
    c.in = p, p += h * s->inner;
    c.out = p, p += h * s->inner;
    c.q_bias = p, p += h;
    c.kv_bias = p;
    return c;
}

static layer_tape tape_at(const encoder *n, long layer) {
    const shape *s = &n->s;
    layer_tape t;
    const int last = layer == s->layers - 1;
    const long queries = last ? s->outputs : s->tokens, h = s->size;
    /* Without a tape the layers before the last share a slot; the last has other queries, so it has its own. */
    float *p = n->tape + embedding_tape_floats(s) + (n->keep_tape ? layer : last) * tape_floats(s, s->tokens);
    t.x = p, p += s->tokens * h;
    t.kv = p, p += s->tokens * 2 * h;
    t.q = p, p += queries * h;
    t.context = p, p += queries * h;
    t.hat1 = p, p += queries * h;
    t.hat2 = p, p += queries * h;
    t.inner = p, p += queries * s->inner;
    t.inverse1 = p, p += queries;
    t.inverse2 = p;
    return t;
}

/* to[column * width + row] = from[row][column] * factor */
static void transpose(const float *from, long rows, long columns, float factor, float *to, long width) {
    for (long r = 0; r < rows; r += W) /* sizes are multiples of W: whole vectors are written */
        for (long c = 0; c < columns; c++)
            for (long e = 0; e < W; e++) to[c * width + r + e] = from[(r + e) * columns + c] * factor;
}

static void make_columns(const encoder *n, long layer) {
    const shape *s = &n->s;
    const long h = s->size;
    const float scale = 1.0f / sqrtf((float)(h / s->heads));
    const layer_weights w = layer_at(s, n->weights, layer);
    const layer_columns c = columns_at(s, n->columns, layer);
    transpose(w.q, h, h, scale, c.q, h);
    transpose(w.k, h, h, 1, c.kv, 2 * h);
    transpose(w.v, h, h, 1, c.kv + h, 2 * h);
    transpose(w.o, h, h, 1, c.o, h);
    transpose(w.in, s->inner, h, 1, c.in, s->inner);
    transpose(w.out, h, s->inner, 1, c.out, h);
    for (long e = 0; e < h; e++) c.q_bias[e] = w.q_bias[e] * scale;
    memcpy(c.kv_bias, w.k_bias, (size_t)h * sizeof(float));
    memcpy(c.kv_bias + h, w.v_bias, (size_t)h * sizeof(float));
}

/* A group of sequences [first, last), its tokens and the queries of one layer. */
typedef struct {
    long first, last, token, tokens, query, queries;
    int chosen; /* whether queries are the chosen positions, not all */
} group;

static group group_of(const encoder *n, long first, long last, int chosen) {
    const int64_t *o = n->offsets, *c = n->chosen_offsets;
    group g = {first, last, o[first], o[last] - o[first], o[first], o[last] - o[first], chosen};
    if (chosen) g.query = c[first], g.queries = c[last] - c[first];
    return g;
}

/* Softmax of causal attention of one sequence and head: weights [queries][width], zero beyond each query's position. */
static void attention_weights(const encoder *n, const layer_tape *t, const group *g, long sequence, long head,
                              long width, float *room, float *weights) {
    const shape *s = &n->s;
    const long h = s->size, d = h / s->heads, start = n->offsets[sequence], length = n->offsets[sequence + 1] - start;
    const long query = g->chosen ? n->chosen_offsets[sequence] : start;
    const long queries = g->chosen ? n->chosen_offsets[sequence + 1] - query : length;
    memset(room, 0, (size_t)(d * width) * sizeof(float));
    for (long j = 0; j < length; j++)
        for (long e = 0; e < d; e++) room[e * width + j] = t->kv[(start + j) * 2 * h + head * d + e];
    product(queries, width, d, t->q + query * h + head * d, h, 1, room, width, weights, width, 0);
    for (long i = 0; i < queries; i++, weights += width) {
        const long seen = (g->chosen ? n->chosen[query + i] - start : i) + 1;
        for (long j = seen; j < width; j++) weights[j] = -3.0e38f;
        vf top = fill(-3.0e38f), sum = {0};
        for (long j = 0; j < width; j += W) top = larger(top, load(weights + j));
        const float peak = max_of(top);
        for (long j = 0; j < width; j += W) {
            vf x = exp_vf(load(weights + j) - peak);
            sum += x;
            store(weights + j, x);
        }
        const float scale = 1.0f / sum_of(sum);
        for (long j = 0; j < width; j += W) store(weights + j, load(weights + j) * scale);
    }
}

/* Number of the first element of an attention row, for dropout. */
INLINE uint32_t attention_number(const shape *s, uint32_t place, long query, long head) {
    return number_of(place, query * s->heads + head, ROUND_UP(s->longest, W));
}

static void attend(const encoder *n, const layer_tape *t, const group *g, uint32_t place, float *room) {
    const shape *s = &n->s;
    const long h = s->size, d = h / s->heads;
    for (long q = g->first; q < g->last; q++) {
        const long start = n->offsets[q], length = n->offsets[q + 1] - start, width = ROUND_UP(length, W);
        const long query = g->chosen ? n->chosen_offsets[q] : start;
        const long queries = g->chosen ? n->chosen_offsets[q + 1] - query : length;
        float *weights = room + d * width;
        for (long head = 0; head < s->heads && queries; head++) {
            attention_weights(n, t, g, q, head, width, room, weights);
            if (n->attention.threshold >= 0)
                for (long i = 0; i < queries; i++)
                    for (long j = 0; j < width; j += W)
                        store(weights + i * width + j,
                              load(weights + i * width + j) *
                                  kept(&n->attention, attention_number(s, place, query + i, head) + (uint32_t)j));
            product(queries, d, length, weights, width, 1, t->kv + start * 2 * h + h + head * d, 2 * h,
                    t->context + query * h + head * d, h, 0);
        }
    }
}

/* Gradients of q [queries of g][size] and kv [tokens of g][2 size] from that of the context. */
static void attend_backward(const encoder *n, const layer_tape *t, const group *g, uint32_t place, const float *grad,
                            float *room, float *grad_q, float *grad_kv) {
    const shape *s = &n->s;
    const long h = s->size, d = h / s->heads;
    for (long q = g->first; q < g->last; q++) {
        const long start = n->offsets[q], length = n->offsets[q + 1] - start, width = ROUND_UP(length, W);
        const long query = g->chosen ? n->chosen_offsets[q] : start;
        const long queries = g->chosen ? n->chosen_offsets[q + 1] - query : length;
        float *weights = room + d * width, *slope = weights + queries * width;
        for (long head = 0; head < s->heads; head++) {
            float *kv = grad_kv + (start - g->token) * 2 * h + head * d;
            if (!queries) {
                for (long j = 0; j < length; j++)
                    memset(kv + j * 2 * h, 0, (size_t)d * sizeof(float)),
                        memset(kv + j * 2 * h + h, 0, (size_t)d * sizeof(float));
                continue;
            }
            const float *above = grad + (query - g->query) * h + head * d;
            attention_weights(n, t, g, q, head, width, room, weights);
            memset(room, 0, (size_t)(d * width) * sizeof(float));
            for (long j = 0; j < length; j++)
                for (long e = 0; e < d; e++) room[e * width + j] = t->kv[(start + j) * 2 * h + h + head * d + e];
            product(queries, width, d, above, h, 1, room, width, slope, width, 0);
            for (long i = 0; i < queries; i++) {
                float *p = weights + i * width, *z = slope + i * width;
                const uint32_t number = attention_number(s, place, query + i, head);
                vf dot = {0};
                for (long j = 0; j < width; j += W) {
                    vf factor = n->attention.threshold < 0 ? fill(1) : kept(&n->attention, number + (uint32_t)j);
                    vf x = load(z + j) * factor * load(p + j);
                    dot += x;
                    store(z + j, x);
                }
                const float mean = sum_of(dot);
                for (long j = 0; j < width; j += W) {
                    vf factor = n->attention.threshold < 0 ? fill(1) : kept(&n->attention, number + (uint32_t)j);
                    store(z + j, load(z + j) - load(p + j) * mean);
                    store(p + j, load(p + j) * factor);
                }
            }
            product(length, d, queries, weights, 1, width, above, h, kv + h, 2 * h, 0);
            product(queries, d, length, slope, width, 1, t->kv + start * 2 * h + head * d, 2 * h,
                    grad_q + (query - g->query) * h + head * d, h, 0);
            product(length, d, queries, slope, 1, width, t->q + query * h + head * d, h, kv, 2 * h, 0);
        }
    }
}
