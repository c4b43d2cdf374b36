/* Vectors, exp and the register tile that every product of this library is made of.
 *
 * Written with the vector extensions of GCC and Clang: the width follows from the instruction set compiled for. */
#ifndef RASEREC_TILE_H
#define RASEREC_TILE_H

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define W 16 /* floats in a vector */
#define TILE_ROWS 6
#define TILE_VECTORS 4
#else
#define W 8
#define TILE_ROWS 6
#define TILE_VECTORS 2
#endif

typedef float vf __attribute__((vector_size(W * 4), aligned(4)));
typedef int32_t vi __attribute__((vector_size(W * 4), aligned(4)));

#define INLINE static inline __attribute__((always_inline))
#define ROUND_UP(n, to) (((n) + (to) - 1) / (to) * (to))

INLINE vf load(const float *p) { return *(const vf *)p; }
INLINE void store(float *p, vf x) { *(vf *)p = x; }
INLINE vf fill(float x) { return x - (vf){0}; }
INLINE vf select_vf(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }
INLINE vf larger(vf a, vf b) { return select_vf(a > b, a, b); }

INLINE float sum_of(vf x) {
    float s = 0;
    for (int i = 0; i < W; i++) s += x[i];
    return s;
}

INLINE float max_of(vf x) {
    float m = x[0];
    for (int i = 1; i < W; i++) m = x[i] > m ? x[i] : m;
    return m;
}

/* exp(x) for x <= 88; zero below -87. Relative error below 2e-7: Cody-Waite reduction, Taylor to degree 6. */
INLINE vf exp_vf(vf x) {
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    vf n = x * 1.44269504088896341f + shift;
    vi exponent = (vi)n;
    n -= shift;
    vf r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vf p = fill(1.3888889e-3f);
    p = p * r + 8.3333333e-3f;
    p = p * r + 4.1666667e-2f;
    p = p * r + 1.6666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    vf y = (vf)((vi)p + (exponent << 23));
    return select_vf(x < -87.0f, (vf){0}, y);
}

/* C[i][j] (+)= sum_k A[i * row + k * column] B[k][j] for a tile of `rows` x `vectors` registers. */
INLINE void tile(const int rows, const int vectors, long depth, const float *a, long row, long column, const float *b,
                 long ldb, vf c[TILE_ROWS][TILE_VECTORS]) {
    for (long k = 0; k < depth; k++, a += column, b += ldb) {
        vf line[TILE_VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) line[v] = load(b + v * W);
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++) {
            vf x = fill(a[i * row]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) c[i][v] += x * line[v];
        }
    }
}

INLINE void product_tile(const int rows, const int vectors, long depth, const float *a, long row, long column,
                         const float *b, long ldb, float *c, long ldc, int add) {
    vf t[TILE_ROWS][TILE_VECTORS];
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) t[i][v] = add ? load(c + i * ldc + v * W) : (vf){0};
    tile(rows, vectors, depth, a, row, column, b, ldb, t);
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) store(c + i * ldc + v * W, t[i][v]);
}

#define BY_ROWS(vectors)                                                                                               \
    switch (rows) {                                                                                                    \
    case 6: product_tile(6, vectors, depth, a, row, column, b, ldb, c, ldc, add); break;                               \
    case 5: product_tile(5, vectors, depth, a, row, column, b, ldb, c, ldc, add); break;                               \
    case 4: product_tile(4, vectors, depth, a, row, column, b, ldb, c, ldc, add); break;                               \
    case 3: product_tile(3, vectors, depth, a, row, column, b, ldb, c, ldc, add); break;                               \
    case 2: product_tile(2, vectors, depth, a, row, column, b, ldb, c, ldc, add); break;                               \
    default: product_tile(1, vectors, depth, a, row, column, b, ldb, c, ldc, add);                                     \
    }

/* The same for any number of rows (at most TILE_ROWS) and vectors. */
static void any_tile(int rows, int vectors, long depth, const float *a, long row, long column, const float *b, long ldb,
                     float *c, long ldc, int add) {
    if (vectors == TILE_VECTORS) {
        BY_ROWS(TILE_VECTORS)
    } else {
        for (int v = 0; v < vectors; v++, b += W, c += W) BY_ROWS(1)
    }
}

/* C[m][n] (+)= A[m][k] B[k][n]; A by its strides, so that a transposed A costs nothing; n: a multiple of W. */
static void product(long m, long n, long depth, const float *a, long row, long column, const float *b, long ldb,
                    float *c, long ldc, int add) {
    for (long j = 0; j < n; j += TILE_VECTORS * W) {
        int vectors = (int)((n - j) / W < TILE_VECTORS ? (n - j) / W : TILE_VECTORS);
        for (long i = 0; i < m; i += TILE_ROWS) {
            int rows = (int)(m - i < TILE_ROWS ? m - i : TILE_ROWS);
            any_tile(rows, vectors, depth, a + i * row, row, column, b + j, ldb, c + i * ldc + j, ldc, add);
        }
    }
}

#endif
