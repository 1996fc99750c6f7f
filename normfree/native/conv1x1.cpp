// Gradients of filters and bias of a 1x1 convolution of stride 1: the matrix product dW = dY'X over all pixels.

#include "gelu.h"
#include "matmul.h"

constexpr int64_t PIXELS = 512;   // packed at once
constexpr int64_t DEPTH = 128;    // of them, in one product: a panel of X then stays in the first-level cache
constexpr int64_t BLOCK = 32;     // panels of dY in one task
constexpr int64_t COLUMNS = WIDE * LANES;

// sum (ROWS) += the sum of a (depth, ROWS) over depth, in as many parts as there are lanes
static void add_rows(int64_t depth, const float *a, float *sum) {
    Vec parts[ROWS] = {};
    int64_t k = 0;
    for (; k + LANES <= depth; k += LANES)
        for (int i = 0; i < ROWS; ++i) parts[i] += get(a + k * ROWS + i * LANES);
    float total[ROWS] = {};
    for (int i = 0; i < ROWS * LANES; ++i) total[i % ROWS] += parts[i / LANES][i % LANES];
    for (; k < depth; ++k)
        for (int i = 0; i < ROWS; ++i) total[i] += a[k * ROWS + i];
    for (int i = 0; i < ROWS; ++i) sum[i] += total[i];
}

// dw (out, in) and, if not null, dbias (out) of x (pixels, in), or `activated` GELU(x), and dy (pixels, out); `in` is a
// multiple of LANES
extern "C" void normfree_conv1x1_filter_gradient(const float *x, const float *dy, float *dw, float *dbias, int64_t pixels,
                                            int64_t in, int64_t out, int32_t activated, int32_t threads) {
    const int64_t panels = (out + ROWS - 1) / ROWS, blocks = (panels + BLOCK - 1) / BLOCK;
    const int64_t columns = (in + COLUMNS - 1) / COLUMNS;
    const int64_t most = std::min(pixels, PIXELS);
    const Scratch a(panels * ROWS * most), b(columns * COLUMNS * most);
    const Scratch sums(panels * ROWS);
    std::fill(sums.get(), sums.get() + panels * ROWS, 0.0f);
#pragma omp parallel num_threads(threads)
    for (int64_t first = 0; first < pixels; first += PIXELS) {
        const int64_t depth = std::min(PIXELS, pixels - first);
#pragma omp for schedule(dynamic, 4) nowait
        for (int64_t p = 0; p < panels; ++p) {  // (panels, depth, ROWS)
            float *to = a.get() + p * ROWS * depth;
            const int64_t rows = std::min<int64_t>(ROWS, out - p * ROWS);
            for (int64_t k = 0; k < depth; ++k) {
                const float *from = dy + (first + k) * out + p * ROWS;
                if (rows == ROWS) std::memcpy(to + k * ROWS, from, ROWS * sizeof(float));
                else for (int i = 0; i < ROWS; ++i) to[k * ROWS + i] = i < rows ? from[i] : 0;
            }
            add_rows(depth, to, sums.get() + p * ROWS);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t j = 0; j < columns; ++j) {  // (columns, depth, COLUMNS)
            float *to = b.get() + j * COLUMNS * depth;
            const int64_t width = std::min(COLUMNS, in - j * COLUMNS);
            for (int64_t k = 0; k < depth; ++k, to += COLUMNS) {
                const float *from = x + (first + k) * in + j * COLUMNS;
                copy(from, width, activated, to);
            }
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < columns * blocks; ++task) {
            const int64_t j = task / blocks, begin = task % blocks * BLOCK, end = std::min(begin + BLOCK, panels);
            const int64_t width = std::min(COLUMNS, in - j * COLUMNS);
            for (int64_t k = 0; k < depth; k += DEPTH)
                for (int64_t p = begin; p < end; ++p) {
                    float tile[ROWS * COLUMNS], *c = dw + p * ROWS * in + j * COLUMNS;
                    const bool whole = (p + 1) * ROWS <= out, add = first + k > 0;
                    const int64_t rows = whole ? ROWS : out - p * ROWS, ldc = whole ? in : COLUMNS;
                    if (!whole)
                        for (int64_t i = 0; i < rows && add; ++i) std::copy_n(c + i * in, width, tile + i * ldc);
                    (add ? matmul<true> : matmul<false>)(ROWS, width, std::min(DEPTH, depth - k),
                                                         a.get() + (p * depth + k) * ROWS, 1, ROWS,
                                                         b.get() + (j * depth + k) * COLUMNS, COLUMNS,
                                                         whole ? c : tile, ldc);
                    for (int64_t i = 0; i < rows && !whole; ++i)
                        std::copy_n(tile + i * ldc, width, c + i * in);
                }
        }
    }
    if (dbias) std::copy_n(sums.get(), out, dbias);
}
