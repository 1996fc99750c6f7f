// 1x1 convolutions of stride 1, which are a matrix product for each pixel, and of filters and bias over all pixels.
//
// A convolution may be one of GELU(x), which is made of each pixel as it is read, and of its gradient as it is written.

#include "gelu.h"
#include "matmul.h"

constexpr int64_t BATCH = 48;     // pixels in flight: they stay in the first-level cache
constexpr int64_t PART = 192;     // for gradients of few filters
constexpr int64_t PIXELS = 512;   // for those of many, packed at once
constexpr int64_t DEPTH = 128;    // of them, in one product: a panel of X then stays in the first-level cache
constexpr int64_t BLOCK = 32;     // panels of dY in one task
constexpr int64_t COLUMNS = WIDE * LANES;

// y (pixels, out) of x (pixels, in), or `activated` GELU(x), and w (out, in), or `turned` (in, out), + bias (or null); with
// `seen` (pixels, out) times GELU'(seen). `in` and `out` are multiples of LANES.
extern "C" void normfree_conv1x1(const float *x, const float *w, const float *bias, const float *seen, float *y,
                                 int64_t pixels, int64_t in, int64_t out, int32_t activated, int32_t turned,
                                 int32_t threads) {
    const int64_t batches = (pixels + BATCH - 1) / BATCH;
    const Scratch columns(turned ? 0 : in * out);  // w in the order of its turned one
    const float *const u = turned ? w : columns.get();
#pragma omp parallel num_threads(threads)
    {
        const Scratch inputs(BATCH * in), sums(BATCH * out);
        std::fill_n(inputs.get(), BATCH * in, 0.0f);  // rows past the last pixel are computed, too
#pragma omp for
        for (int64_t o = 0; o < out; o += LANES)
            for (int64_t c = 0; c < in && !turned; ++c)
                for (int64_t l = 0; l < LANES; ++l) columns.get()[c * out + o + l] = w[(o + l) * in + c];
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < batches; ++task) {
            const int64_t begin = task * BATCH, num = std::min(BATCH, pixels - begin);
            copy(x + begin * in, num * in, activated, inputs.get());
            for (int64_t i = 0; i < num; ++i)
                if (bias) std::copy_n(bias, out, sums.get() + i * out);
                else std::fill_n(sums.get() + i * out, out, 0.0f);
            matmul<true>((num + ROWS - 1) / ROWS * ROWS, out, in, inputs.get(), in, 1, u, out, sums.get(), out);
            const float *sum = sums.get(), *at = seen ? seen + begin * out : nullptr;
            float *to = y + begin * out;
            if (!seen) std::memcpy(to, sum, num * out * sizeof *y);
            else for (int64_t i = 0; i < num * out; i += LANES) put(to + i, gelu_gradient(get(at + i), get(sum + i)));
        }
    }
}

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

// The sums of each thread are over some of the pixels: for few filters.
static void by_pixels(const float *x, const float *dy, float *dw, float *dbias, int64_t pixels, int64_t in, int64_t out,
                      bool activated, int32_t threads) {
    const int64_t blocks = (pixels + PART - 1) / PART, parts = std::min<int64_t>(blocks, 32);  // for any number of threads
    const int64_t padded = (out + ROWS - 1) / ROWS * ROWS;
    const Scratch sums(parts * padded * in), biases(parts * out);
    std::fill_n(biases.get(), parts * out, 0.0f);
#pragma omp parallel num_threads(threads)
    {
        const Scratch seen(PART * in), d(PART * out + ROWS);
#pragma omp for schedule(dynamic, 1)
        for (int64_t part = 0; part < parts; ++part) {
            const int64_t first = part * blocks / parts;
            for (int64_t block = first; block < (part + 1) * blocks / parts; ++block) {
                const int64_t begin = block * PART, num = std::min(PART, pixels - begin);
                copy(x + begin * in, num * in, activated, seen.get());
                std::copy_n(dy + begin * out, num * out, d.get());
                add_columns(num, out, d.get(), biases.get() + part * out);
                (block > first ? matmul<true> : matmul<false>)(padded, in, num, d.get(), 1, out, seen.get(), in,
                                                               sums.get() + part * padded * in, in);
            }
        }
#pragma omp for
        for (int64_t o = 0; o < out; ++o) {
            float bias = 0;
            for (int64_t part = 0; part < parts; ++part) bias += biases.get()[part * out + o];
            if (dbias) dbias[o] = bias;
            for (int64_t c = 0; c < in; c += LANES) {
                Vec sum{};
                for (int64_t part = 0; part < parts; ++part) sum += get(sums.get() + (part * padded + o) * in + c);
                put(dw + o * in + c, sum);
            }
        }
    }
}

// Each thread has some of the filters, of which there are many.
static void by_filters(const float *x, const float *dy, float *dw, float *dbias, int64_t pixels, int64_t in, int64_t out,
                       bool activated, int32_t threads) {
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

// dw (out, in) and, if not null, dbias (out) of x (pixels, in), or `activated` GELU(x), and dy (pixels, out); `in` is a
// multiple of LANES
extern "C" void normfree_conv1x1_filter_gradient(const float *x, const float *dy, float *dw, float *dbias, int64_t pixels,
                                                 int64_t in, int64_t out, int32_t activated, int32_t threads) {
    const bool few = in * out <= 32 * pixels && out % LANES == 0;
    (few ? by_pixels : by_filters)(x, dy, dw, dbias, pixels, in, out, activated, threads);
}
