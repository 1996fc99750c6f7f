// Matrix products of blocks that are in the caches. README.md has the tiles.

#pragma once

#include "vector.h"

#include <memory>

// The tile of a product that stays in registers: rows, and columns counted in vectors.
constexpr int ROWS = 6, WIDE = LANES == 16 ? 4 : LANES == 8 ? 2 : 3;

// Uninitialised memory, aligned to cache lines, so that no vector crosses two.
class Scratch {
    const std::unique_ptr<float[]> all;
    float *const start;

   public:
    explicit Scratch(int64_t size)
        : all(new float[size + 16]),
          start(reinterpret_cast<float *>((reinterpret_cast<uintptr_t>(all.get()) + 63) / 64 * 64)) {}
    float *get() const { return start; }
};

// sums (columns) += a (rows, columns) summed over rows, in parts of 16 rows, which keeps rounding errors small
static inline void add_columns(int64_t rows, int64_t columns, const float *a, float *sums) {
    for (int64_t c = 0; c < columns; c += LANES)
        for (int64_t i = 0; i < rows; i += 16) {
            Vec part{};
            for (int64_t k = i; k < std::min(i + 16, rows); ++k) part += load(a + k * columns + c);
            store(sums + c, load(sums + c) + part);
        }
}

// c (ROWS, N * LANES) = or += a (ROWS, depth) b (depth, N * LANES); a[i * a_row + k * a_depth] is its element (i, k)
template <int N, bool add>
static inline void product(int64_t depth, const float *a, int64_t a_row, int64_t a_depth, const float *b, int64_t ldb,
                           float *c, int64_t ldc) {
    Vec sum[ROWS][N];
    for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < N; ++j) sum[i][j] = Vec{};
    for (int64_t k = 0; k < depth; ++k) {
        Vec row[N];
        for (int j = 0; j < N; ++j) row[j] = load(b + k * ldb + j * LANES);
        for (int i = 0; i < ROWS; ++i) {
            const float value = a[i * a_row + k * a_depth];
            for (int j = 0; j < N; ++j) sum[i][j] += value * row[j];
        }
    }
    for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < N; ++j) {
            float *to = c + i * ldc + j * LANES;
            store(to, add ? load(to) + sum[i][j] : sum[i][j]);
        }
}

// c (rows, columns) = or += a (rows, depth) b (depth, columns); rows are a multiple of ROWS, columns of LANES
template <bool add>
static void matmul(int64_t rows, int64_t columns, int64_t depth, const float *a, int64_t a_row, int64_t a_depth,
                   const float *b, int64_t ldb, float *c, int64_t ldc) {
    for (int64_t j = 0; j < columns;) {
        const int64_t left = (columns - j) / LANES;
        for (int64_t i = 0; i < rows; i += ROWS) {
            const float *at = a + i * a_row;
            float *to = c + i * ldc + j;
            if (left >= WIDE) product<WIDE, add>(depth, at, a_row, a_depth, b + j, ldb, to, ldc);
            else if (left >= 2) product<2, add>(depth, at, a_row, a_depth, b + j, ldb, to, ldc);
            else product<1, add>(depth, at, a_row, a_depth, b + j, ldb, to, ldc);
        }
        j += (left >= WIDE ? WIDE : left >= 2 ? 2 : 1) * LANES;
    }
}
