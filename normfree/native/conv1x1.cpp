// 1x1 convolutions of stride 1 as matrix products, and their gradients. GELU is applied to pixels as they are read, its
// derivative as they are written. README.md has the tiles and the reasons for the constants.

#include "gelu.h"
#include "kernels.h"
#include "matmul.h"

constexpr int64_t FEW = 300;        // at most so many pixels, and
constexpr int64_t LARGE = 1 << 17;  // at least so many weights: threads share out filters, not pixels
constexpr int64_t CACHED = 150000;  // floats of a block of pixels, which stay in the second-level cache
constexpr int64_t DEPTH = 256;      // input channels of one product
constexpr int64_t PART = 192;       // pixels of one product in the gradient of few filters
constexpr int64_t PIXELS = 768;     // the same for many filters, packed at once
constexpr int64_t BLOCK = 32;       // panels of dY in one task
constexpr int64_t COLUMNS = WIDE * LANES;

// u (in, COLUMNS): `width` filters from `first` on, the rows of w (out, in), or if `transposed` the columns of w (in, out)
static void pack(const float *w, float *u, int64_t in, int64_t out, int64_t first, int64_t width, bool transposed) {
    for (int64_t o = 0; o < width; o += LANES)
        for (int64_t c = 0; c < in; c += LANES) {
            Vec block[LANES];
            for (int l = 0; l < LANES && !transposed; ++l) block[l] = load(w + (first + o + l) * in + c);
            for (int i = 0; i < LANES; ++i) {
                Vec row;
                for (int l = 0; l < LANES && !transposed; ++l) row[l] = block[l][i];
                store(u + (c + i) * COLUMNS + o, transposed ? load(w + (c + i) * out + first + o) : row);
            }
        }
}

// y (num, width) = a (num, in) b (in, width) + bias (or null); rows of y are `out` floats apart
static void multiply(int64_t num, int64_t width, int64_t in, const float *a, const float *b, int64_t ldb,
                     const float *bias, float *y, int64_t out) {
    float rest[ROWS * COLUMNS];  // of rows that are no multiple of ROWS
    const int64_t whole = num / ROWS * ROWS;
    const auto row = [&](int64_t i) { return i < whole ? y + i * out : rest + (i - whole) * COLUMNS; };
    for (int64_t i = 0; i < whole + (whole < num ? ROWS : 0); ++i)
        if (bias) std::copy_n(bias, width, row(i));
        else std::fill_n(row(i), width, 0.0f);
    for (int64_t k = 0; k < in; k += DEPTH) {
        const int64_t depth = std::min(DEPTH, in - k);
        matmul<true>(whole, width, depth, a + k, in, 1, b + k * ldb, ldb, y, out);
        if (whole < num) matmul<true>(ROWS, width, depth, a + whole * in + k, in, 1, b + k * ldb, ldb, rest, COLUMNS);
    }
    for (int64_t i = whole; i < num; ++i) std::copy_n(row(i), width, y + i * out);
}

// y (num, width) *= GELU'(pre_activation); rows of both are `out` floats apart
static void differentiate(int64_t num, int64_t width, const float *pre_activation, float *y, int64_t out) {
    for (int64_t i = 0; i < num; ++i)
        for (int64_t c = i * out; c < i * out + width; c += LANES)
            store(y + c, gelu_gradient(load(pre_activation + c), load(y + c)));
}

struct Convolution {
    const float *x, *w, *bias, *pre_activation;
    float *y;
    int64_t pixels, in, out;
    bool apply_gelu, transposed;
};

// Each thread takes some of the filters, which are read once, and all pixels.
static void few_pixels(const Convolution &c, int32_t threads) {
    const int64_t padded = (c.pixels + ROWS - 1) / ROWS * ROWS;
    const bool as_is = !c.apply_gelu && padded == c.pixels;
    const Scratch inputs(as_is ? 0 : padded * c.in);
#pragma omp parallel num_threads(threads)
    {
        const Scratch panel(c.in * COLUMNS);
#pragma omp for
        for (int64_t i = 0; i < padded; ++i)
            if (i >= c.pixels) std::fill_n(inputs.get() + i * c.in, c.in, 0.0f);
            else if (!as_is) copy(c.x + i * c.in, c.in, c.apply_gelu, inputs.get() + i * c.in);
#pragma omp for schedule(dynamic, 1)
        for (int64_t j = 0; j < c.out; j += COLUMNS) {
            const int64_t width = std::min(COLUMNS, c.out - j);
            if (!c.transposed) pack(c.w, panel.get(), c.in, c.out, j, width, false);
            multiply(c.pixels, width, c.in, as_is ? c.x : inputs.get(), c.transposed ? c.w + j : panel.get(),
                     c.transposed ? c.out : COLUMNS, c.bias ? c.bias + j : nullptr, c.y + j, c.out);
            if (c.pre_activation) differentiate(c.pixels, width, c.pre_activation + j, c.y + j, c.out);
        }
    }
}

// Each thread takes blocks of pixels that stay in the second-level cache, and all filters, packed into panels.
static void many_pixels(const Convolution &c, int32_t threads) {
    const int64_t most = std::max<int64_t>(8, std::min<int64_t>(32, CACHED / c.in / ROWS)) * ROWS;
    const int64_t even = (c.pixels / (4 * threads) + ROWS - 1) / ROWS * ROWS;
    const int64_t batch = std::min(most, std::max<int64_t>(8 * ROWS, even));
    const Scratch panels((c.out + COLUMNS - 1) / COLUMNS * COLUMNS * c.in);
#pragma omp parallel num_threads(threads)
    {
        const Scratch inputs(batch * c.in);
#pragma omp for
        for (int64_t j = 0; j < c.out; j += COLUMNS)
            pack(c.w, panels.get() + j * c.in, c.in, c.out, j, std::min(COLUMNS, c.out - j), c.transposed);
#pragma omp for schedule(dynamic, 1)
        for (int64_t begin = 0; begin < c.pixels; begin += batch) {
            const int64_t num = std::min(batch, c.pixels - begin), padded = (num + ROWS - 1) / ROWS * ROWS;
            const bool as_is = !c.apply_gelu && padded == num;
            const float *x = c.x + begin * c.in;
            if (!as_is) {
                copy(x, num * c.in, c.apply_gelu, inputs.get());
                std::fill_n(inputs.get() + num * c.in, (padded - num) * c.in, 0.0f);
            }
            float *y = c.y + begin * c.out;
            for (int64_t j = 0; j < c.out; j += COLUMNS)
                multiply(num, std::min(COLUMNS, c.out - j), c.in, as_is ? x : inputs.get(), panels.get() + j * c.in,
                         COLUMNS, c.bias ? c.bias + j : nullptr, y + j, c.out);
            if (c.pre_activation) differentiate(num, c.out, c.pre_activation + begin * c.out, y, c.out);
        }
    }
}

void normfree_conv1x1(const float *x, const float *w, const float *bias, const float *pre_activation, float *y,
                      int64_t pixels, int64_t in, int64_t out, int32_t apply_gelu, int32_t transposed,
                      int32_t threads) {
    const Convolution conv{x, w, bias, pre_activation, y, pixels, in, out, apply_gelu != 0, transposed != 0};
    (pixels <= FEW && in * out >= LARGE ? few_pixels : many_pixels)(conv, threads);
}

// sum (ROWS) += a (depth, ROWS) summed over depth, in LANES parts
static void add_rows(int64_t depth, const float *a, float *sum) {
    Vec parts[ROWS] = {};
    int64_t k = 0;
    for (; k + LANES <= depth; k += LANES)
        for (int i = 0; i < ROWS; ++i) parts[i] += load(a + k * ROWS + i * LANES);
    float total[ROWS] = {};
    for (int i = 0; i < ROWS * LANES; ++i) total[i % ROWS] += parts[i / LANES][i % LANES];
    for (; k < depth; ++k)
        for (int i = 0; i < ROWS; ++i) total[i] += a[k * ROWS + i];
    for (int i = 0; i < ROWS; ++i) sum[i] += total[i];
}

// For few filters: each task sums over some of the pixels.
static void by_pixels(const float *x, const float *dy, float *dw, float *dbias, int64_t pixels, int64_t in, int64_t out,
                      bool apply_gelu, int32_t threads) {
    const int64_t blocks = (pixels + PART - 1) / PART;
    const int64_t parts = std::min<int64_t>(blocks, 32);  // whatever the number of threads
    const int64_t padded = (out + ROWS - 1) / ROWS * ROWS;
    const Scratch sums(parts * padded * in), biases(parts * out);
    std::fill_n(biases.get(), parts * out, 0.0f);
#pragma omp parallel num_threads(threads)
    {
        const Scratch inputs(PART * in), d(PART * out + ROWS);
#pragma omp for schedule(dynamic, 1)
        for (int64_t part = 0; part < parts; ++part) {
            const int64_t first = part * blocks / parts;
            for (int64_t block = first; block < (part + 1) * blocks / parts; ++block) {
                const int64_t begin = block * PART, num = std::min(PART, pixels - begin);
                copy(x + begin * in, num * in, apply_gelu, inputs.get());
                std::copy_n(dy + begin * out, num * out, d.get());
                add_columns(num, out, d.get(), biases.get() + part * out);
                (block > first ? matmul<true> : matmul<false>)(padded, in, num, d.get(), 1, out, inputs.get(), in,
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
                for (int64_t part = 0; part < parts; ++part) sum += load(sums.get() + (part * padded + o) * in + c);
                store(dw + o * in + c, sum);
            }
        }
    }
}

// For many filters: each task computes some of them, over all pixels.
static void by_filters(const float *x, const float *dy, float *dw, float *dbias, int64_t pixels, int64_t in,
                       int64_t out, bool apply_gelu, int32_t threads) {
    const int64_t panels = (out + ROWS - 1) / ROWS, blocks = (panels + BLOCK - 1) / BLOCK;
    const int64_t columns = (in + COLUMNS - 1) / COLUMNS;
    const int64_t most = std::min(pixels, PIXELS);
    const Scratch a(panels * ROWS * most), b(columns * COLUMNS * most);
    const Scratch sums(panels * ROWS);
    std::fill(sums.get(), sums.get() + panels * ROWS, 0.0f);
#pragma omp parallel num_threads(threads)
    for (int64_t first = 0; first < pixels; first += PIXELS) {
        const int64_t depth = std::min(PIXELS, pixels - first);
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t begin = 0; begin < panels; begin += 8) {  // (panels, depth, ROWS)
            const int64_t end = std::min(begin + 8, panels);
            for (int64_t k = 0; k < depth; ++k)
                for (int64_t p = begin; p < end; ++p) {
                    const float *from = dy + (first + k) * out + p * ROWS;
                    float *to = a.get() + (p * depth + k) * ROWS;
                    if ((p + 1) * ROWS <= out) std::memcpy(to, from, ROWS * sizeof *to);
                    else for (int64_t i = 0; i < ROWS; ++i) to[i] = p * ROWS + i < out ? from[i] : 0;
                }
            for (int64_t p = begin; p < end; ++p) add_rows(depth, a.get() + p * ROWS * depth, sums.get() + p * ROWS);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t j = 0; j < columns; ++j) {  // (columns, depth, COLUMNS)
            float *to = b.get() + j * COLUMNS * depth;
            const int64_t width = std::min(COLUMNS, in - j * COLUMNS);
            for (int64_t k = 0; k < depth; ++k, to += COLUMNS) {
                const float *from = x + (first + k) * in + j * COLUMNS;
                copy(from, width, apply_gelu, to);
            }
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < columns * blocks; ++task) {
            const int64_t j = task / blocks, begin = task % blocks * BLOCK, end = std::min(begin + BLOCK, panels);
            const int64_t width = std::min(COLUMNS, in - j * COLUMNS);
            for (int64_t p = begin; p < end; ++p) {
                float tile[ROWS * COLUMNS], *c = dw + p * ROWS * in + j * COLUMNS;
                const bool whole = (p + 1) * ROWS <= out, add = first > 0;
                const int64_t rows = whole ? ROWS : out - p * ROWS, ldc = whole ? in : COLUMNS;
                for (int64_t i = 0; i < rows && add && !whole; ++i) std::copy_n(c + i * in, width, tile + i * ldc);
                (add ? matmul<true> : matmul<false>)(ROWS, width, depth, a.get() + p * depth * ROWS, 1, ROWS,
                                                     b.get() + j * depth * COLUMNS, COLUMNS, whole ? c : tile, ldc);
                for (int64_t i = 0; i < rows && !whole; ++i) std::copy_n(tile + i * ldc, width, c + i * in);
            }
        }
    }
    if (dbias) std::copy_n(sums.get(), out, dbias);
}

void normfree_conv1x1_filter_gradient(const float *x, const float *dy, float *dw, float *dbias,
                                      int64_t pixels, int64_t in, int64_t out, int32_t apply_gelu,
                                      int32_t threads) {
    (in * out <= 8 * pixels ? by_pixels : by_filters)(x, dy, dw, dbias, pixels, in, out, apply_gelu, threads);
}
