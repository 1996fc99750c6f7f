// 1x1 convolutions of stride 1, which are a matrix product for each pixel, and of filters and bias over all pixels.
//
// A convolution may be one of GELU(x), which is made of each pixel as it is read, and of its gradient as it is written.

#include "gelu.h"
#include "matmul.h"

constexpr int64_t CACHED = 150000;  // inputs in flight: they stay in the second-level cache
constexpr int64_t FEW = 600;      // pixels for which it does not pay to copy filters that lie well enough
constexpr int64_t PART = 192;     // for gradients of few filters
constexpr int64_t PIXELS = 768;   // for those of many, packed at once
constexpr int64_t DEPTH = 256;    // of a product at a time
constexpr int64_t BLOCK = 32;     // panels of dY in one task
constexpr int64_t COLUMNS = WIDE * LANES;

// w (out, in), or `turned` (in, out), to panels (columns, in, COLUMNS) of what then are columns
static void pack(const float *w, float *u, int64_t in, int64_t out, bool turned) {
#pragma omp for
    for (int64_t o = 0; o < out; o += LANES) {
        float *to = u + o / COLUMNS * in * COLUMNS + o % COLUMNS;
        for (int64_t c = 0; c < in; c += LANES) {
            Vec block[LANES];
            for (int l = 0; l < LANES && !turned; ++l) block[l] = get(w + (o + l) * in + c);
            for (int i = 0; i < LANES; ++i) {
                Vec row;
                for (int l = 0; l < LANES && !turned; ++l) row[l] = block[l][i];
                put(to + (c + i) * COLUMNS, turned ? get(w + (c + i) * out + o) : row);
            }
        }
    }
}

// y (pixels, out) of x (pixels, in), or `activated` GELU(x), and w (out, in), or `turned` (in, out), + bias (or null); with
// `seen` (pixels, out) times GELU'(seen). `in` and `out` are multiples of LANES.
extern "C" void normfree_conv1x1(const float *x, const float *w, const float *bias, const float *seen, float *y,
                                 int64_t pixels, int64_t in, int64_t out, int32_t activated, int32_t turned,
                                 int32_t threads) {
    const int64_t panels = (out + COLUMNS - 1) / COLUMNS;
    const int64_t most = std::max<int64_t>(8, std::min<int64_t>(32, CACHED / in / ROWS)) * ROWS;
    const int64_t batch = std::min(most, std::max<int64_t>(8 * ROWS, (pixels / (4 * threads) + ROWS - 1) / ROWS * ROWS));
    const bool packed = !turned || pixels > FEW;
    const Scratch u(packed ? panels * in * COLUMNS : 0);
#pragma omp parallel num_threads(threads)
    {
        if (packed) pack(w, u.get(), in, out, turned);
        const Scratch inputs(batch * in);
#pragma omp for schedule(dynamic, 1)
        for (int64_t begin = 0; begin < pixels; begin += batch) {
            const int64_t num = std::min(batch, pixels - begin), whole = num / ROWS * ROWS;
            const float *a = x + begin * in;
            if (activated || whole < num) {
                copy(a, num * in, activated, inputs.get());
                if (whole < num) std::fill_n(inputs.get() + num * in, (whole + ROWS - num) * in, 0.0f);
                a = inputs.get();
            }
            for (int64_t j = 0; j < out; j += COLUMNS) {
                const int64_t width = std::min(COLUMNS, out - j);
                float rest[ROWS * COLUMNS], *to = y + begin * out + j;
                const auto row = [&](int64_t i) { return i < whole ? to + i * out : rest + (i - whole) * COLUMNS; };
                for (int64_t i = 0; i < (whole < num ? whole + ROWS : num); ++i)
                    if (bias) std::copy_n(bias + j, width, row(i));
                    else std::fill_n(row(i), width, 0.0f);
                for (int64_t k = 0; k < in; k += DEPTH) {
                    const int64_t depth = std::min(DEPTH, in - k);
                    const float *panel = packed ? u.get() + j * in + k * COLUMNS : w + k * out + j;
                    const int64_t ldb = packed ? COLUMNS : out;
                    matmul<true>(whole, width, depth, a + k, in, 1, panel, ldb, to, out);
                    if (whole < num)
                        matmul<true>(ROWS, width, depth, a + whole * in + k, in, 1, panel, ldb, rest, COLUMNS);
                }
                for (int64_t i = whole; i < num; ++i) std::copy_n(row(i), width, to + i * out);
            }
            for (int64_t i = begin * out; i < (begin + num) * out && seen; i += LANES)
                put(y + i, gelu_gradient(get(seen + i), get(y + i)));
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
                copy(from, width, activated, to);
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

// dw (out, in) and, if not null, dbias (out) of x (pixels, in), or `activated` GELU(x), and dy (pixels, out); `in` is a
// multiple of LANES
extern "C" void normfree_conv1x1_filter_gradient(const float *x, const float *dy, float *dw, float *dbias, int64_t pixels,
                                                 int64_t in, int64_t out, int32_t activated, int32_t threads) {
    (in * out <= 8 * pixels ? by_pixels : by_filters)(x, dy, dw, dbias, pixels, in, out, activated, threads);
}
