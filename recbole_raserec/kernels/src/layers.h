/* The passes through the encoder's layers for one group of sequences. */
#include "encoder.h"

/* Places of a layer where dropout is applied. */
enum { AT_WEIGHTS, AT_ATTENTION, AT_FEED_FORWARD, PLACES };

/* Floats of a thread's room for groups of at most `tokens` tokens. */
static long room_floats(const shape *s, long tokens) {
    const long width = ROUND_UP(s->longest, W);
    return tokens * (6 * s->size + 2 * s->inner) + (s->size / s->heads) * width + 2 * s->longest * width;
}

static long group_limit(const shape *s) { return s->longest > GROUP ? s->longest : GROUP; }

/* Layer inputs at the queries: those of the layer, or a copy of the chosen ones. */
static const float *query_rows(const encoder *n, const layer_tape *t, const group *g, float *room) {
    const long h = n->s.size;
    if (!g->chosen) return t->x + g->token * h;
    for (long i = 0; i < g->queries; i++)
        memcpy(room + i * h, t->x + n->chosen[g->query + i] * h, (size_t)h * sizeof(float));
    return room;
}

static void embed(const encoder *n, const group *g, float *x) {
    const shape *s = &n->s;
    const long h = s->size;
    const float *gain = n->weights + s->layers * layer_floats(s), *shift = gain + h;
    float *hat = n->tape + g->token * h, *inverse = n->tape + s->tokens * h + g->token;
    for (long q = g->first; q < g->last; q++)
        for (long t = n->offsets[q]; t < n->offsets[q + 1]; t++) {
            const float *item = n->table + n->item[t] * h, *position = n->positions + (t - n->offsets[q]) * h;
            float *row = x + t * h;
            for (long e = 0; e < h; e += W) store(row + e, load(item + e) + load(position + e));
        }
    layer_norm(x + g->token * h, g->tokens, h, gain, shift, n->epsilon, hat, inverse, x + g->token * h);
    drop_rows(&n->hidden, (uint32_t)(s->layers * PLACES), g->token, g->tokens, h, x + g->token * h);
}

/* Rows of the layer's output go to `y`, the first row for the group's first query. */
static void forward_layer(const encoder *n, long layer, const group *g, float *room, float *y) {
    const shape *s = &n->s;
    const long h = s->size, inner = s->inner, m = g->queries;
    const layer_weights w = layer_at(s, n->weights, layer);
    const layer_columns c = columns_at(s, n->columns, layer);
    const layer_tape t = tape_at(n, layer);
    const uint32_t place = (uint32_t)(layer * PLACES);
    float *rows = room, *mixed = rows + m * h, *wide = mixed + m * h, *rest = wide + m * inner;
    float *kv = t.kv + g->token * 2 * h, *q = t.q + g->query * h;
    fill_rows(c.kv_bias, g->tokens, 2 * h, kv);
    product(g->tokens, 2 * h, h, t.x + g->token * h, h, 1, c.kv, 2 * h, kv, 2 * h, 1);
    const float *x = query_rows(n, &t, g, rows);
    fill_rows(c.q_bias, m, h, q);
    product(m, h, h, x, h, 1, c.q, h, q, h, 1);
    attend(n, &t, g, place + AT_WEIGHTS, rest);
    fill_rows(w.o_bias, m, h, mixed);
    product(m, h, h, t.context + g->query * h, h, 1, c.o, h, mixed, h, 1);
    drop_rows(&n->hidden, place + AT_ATTENTION, g->query, m, h, mixed);
    add_rows(x, m * h, mixed);
    layer_norm(mixed, m, h, w.gain1, w.shift1, n->epsilon, t.hat1 + g->query * h, t.inverse1 + g->query, mixed);
    float *f = t.inner + g->query * inner;
    fill_rows(w.in_bias, m, inner, f);
    product(m, inner, h, mixed, h, 1, c.in, inner, f, inner, 1);
    gelu(f, m * inner, wide);
    fill_rows(w.out_bias, m, h, rows); /* `rows` may hold x, which is not needed any more */
    product(m, h, inner, wide, inner, 1, c.out, h, rows, h, 1);
    drop_rows(&n->hidden, place + AT_FEED_FORWARD, g->query, m, h, rows);
    add_rows(mixed, m * h, rows);
    layer_norm(rows, m, h, w.gain2, w.shift2, n->epsilon, t.hat2 + g->query * h, t.inverse2 + g->query, y);
}

/* `grad` [queries][size]: of the output, and overwritten; of the input in `below` [tokens][size]; weights' in `dw`. */
static void backward_layer(const encoder *n, long layer, const group *g, float *room, float *grad, layer_weights dw,
                           float *below) {
    const shape *s = &n->s;
    const long h = s->size, inner = s->inner, m = g->queries;
    const layer_weights w = layer_at(s, n->weights, layer);
    const layer_tape t = tape_at(n, layer);
    const uint32_t place = (uint32_t)(layer * PLACES);
    const float scale = 1.0f / sqrtf((float)(h / s->heads));
    float *rows = room, *mixed = rows + m * h, *part = mixed + m * h, *wide = part + g->tokens * 2 * h;
    float *slope = wide + m * inner, *rest = slope + m * inner;
    layer_norm_backward(t.hat2 + g->query * h, t.inverse2 + g->query, m, h, w.gain2, dw.gain2, dw.shift2, grad);
    memcpy(rows, grad, (size_t)(m * h) * sizeof(float));
    drop_rows(&n->hidden, place + AT_FEED_FORWARD, g->query, m, h, rows);
    sum_rows(rows, m, h, dw.out_bias);
    product(m, inner, h, rows, h, 1, w.out, inner, slope, inner, 0);
    gelu_backward(t.inner + g->query * inner, m * inner, wide, slope);
    product(h, inner, m, rows, 1, h, wide, inner, dw.out, inner, 1);
    const float *hat = t.hat1 + g->query * h;
    for (long r = 0; r < m; r++)
        for (long e = 0; e < h; e += W)
            store(mixed + r * h + e, load(hat + r * h + e) * load(w.gain1 + e) + load(w.shift1 + e));
    sum_rows(slope, m, inner, dw.in_bias);
    product(inner, h, m, slope, 1, inner, mixed, h, dw.in, h, 1);
    product(m, h, inner, slope, inner, 1, w.in, h, grad, h, 1);
    layer_norm_backward(hat, t.inverse1 + g->query, m, h, w.gain1, dw.gain1, dw.shift1, grad);
    memcpy(rows, grad, (size_t)(m * h) * sizeof(float));
    drop_rows(&n->hidden, place + AT_ATTENTION, g->query, m, h, rows);
    sum_rows(rows, m, h, dw.o_bias);
    product(h, h, m, rows, 1, h, t.context + g->query * h, h, dw.o, h, 1);
    product(m, h, h, rows, h, 1, w.o, h, mixed, h, 0); /* gradient of the context */
    attend_backward(n, &t, g, place + AT_WEIGHTS, mixed, rest, rows, part);
    for (long e = 0; e < m * h; e += W) store(rows + e, load(rows + e) * scale);
    sum_rows(rows, m, h, dw.q_bias);
    const float *x = query_rows(n, &t, g, mixed);
    product(h, h, m, rows, 1, h, x, h, dw.q, h, 1);
    product(m, h, h, rows, h, 1, w.q, h, grad, h, 1); /* `grad` held the residual's */
    if (g->chosen) {
        memset(below, 0, (size_t)(g->tokens * h) * sizeof(float));
        for (long i = 0; i < m; i++)
            memcpy(below + (n->chosen[g->query + i] - g->token) * h, grad + i * h, (size_t)h * sizeof(float));
    } else if (below != grad) {
        memcpy(below, grad, (size_t)(m * h) * sizeof(float));
    }
    const float *tokens = t.x + g->token * h;
    for (long r = 0; r < g->tokens; r++)
        for (long e = 0; e < h; e += W) {
            store(dw.k_bias + e, load(dw.k_bias + e) + load(part + r * 2 * h + e));
            store(dw.v_bias + e, load(dw.v_bias + e) + load(part + r * 2 * h + h + e));
        }
    product(h, h, g->tokens, part, 1, 2 * h, tokens, h, dw.k, h, 1);
    product(h, h, g->tokens, part + h, 1, 2 * h, tokens, h, dw.v, h, 1);
    product(g->tokens, h, h, part, 2 * h, 1, w.k, h, below, h, 1);
    product(g->tokens, h, h, part + h, 2 * h, 1, w.v, h, below, h, 1);
}

/* `grad` [tokens of g][size] with respect to the first layer's input becomes that of item + position vectors. */
static void embed_backward(const encoder *n, const group *g, float *gain_grad, float *position_grad, float *grad) {
    const shape *s = &n->s;
    const long h = s->size;
    const float *gain = n->weights + s->layers * layer_floats(s);
    drop_rows(&n->hidden, (uint32_t)(s->layers * PLACES), g->token, g->tokens, h, grad);
    layer_norm_backward(n->tape + g->token * h, n->tape + s->tokens * h + g->token, g->tokens, h, gain, gain_grad,
                        gain_grad + h, grad);
    for (long q = g->first; q < g->last; q++)
        for (long t = n->offsets[q]; t < n->offsets[q + 1]; t++)
            add_rows(grad + (t - g->token) * h, h, position_grad + (t - n->offsets[q]) * h);
}
