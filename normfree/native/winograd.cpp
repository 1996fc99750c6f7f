// 3x3 convolutions by Winograd's transforms: 16 products for what takes 36 at stride 1, 25 at stride 2.
//
// Lavin and Gray 2015 (arXiv 1509.09308). Tiles of inputs d give 2x2 outputs: inputs become V = B'dB, filters U = GwG',
// and for each place of a tile the sum over channels is a small matrix product VU; the outputs are A'(VU)A. The input
// gradient is such a convolution too, with filters rotated by 180 degrees; that of the filters is G'(V'(AdA'))G. At
// stride 2, pixels at even and odd places are convolved separately: along a side the even ones meet two of a filter's
// three taps, which is F(2, 2), 3 products instead of 4, and the odd ones meet one. All factors are 1, -1 and 1/2.
//
// GELU's derivative is applied to the gradient of the input as each pixel is written. README.md has the tiles.

#include "gelu.h"
#include "kernels.h"
#include "matmul.h"

#include <vector>

constexpr int FILTER_SIDE = 4, FILTER_PLACES = FILTER_SIDE * FILTER_SIDE;  // of a transformed filter
constexpr int64_t TILES = 36;  // in one block: their transforms stay in the second-level cache
constexpr int64_t GRADIENT_TILES = 288;  // in the filter gradient, where the sums are in that cache instead

// The transforms along one side of a tile: SIDE input pixels become PLACES numbers, each is multiplied by the number
// `filter_place` of the transformed filter, and they become OUT output pixels.
struct Stride1 {  // and its input gradient: F(2, 3)
    static constexpr int SIDE = 4, PLACES = 4, OUT = 2;

    static int filter_place(int place) { return place; }
    static void input(const Vec *d, Vec *v) {  // B'd
        v[0] = d[0] - d[2];
        v[1] = d[1] + d[2];
        v[2] = d[2] - d[1];
        v[3] = d[1] - d[3];
    }
    static void output(const Vec *m, Vec *y) {  // A'm
        y[0] = m[0] + m[1] + m[2];
        y[1] = m[1] - m[2] - m[3];
    }
    static void output_gradient(const Vec *y, Vec *m) {  // Ay; its second element is the sum
        m[0] = y[0];
        m[1] = y[0] + y[1];
        m[2] = y[0] - y[1];
        m[3] = -y[1];
    }
    static void filter(const Vec *w, Vec *u) {  // Gw
        const Vec even = 0.5f * (w[0] + w[2]), odd = 0.5f * w[1];
        u[0] = w[0];
        u[1] = even + odd;
        u[2] = even - odd;
        u[3] = w[2];
    }
    static void filter_gradient(const Vec *u, Vec *w) {  // G'u
        const Vec even = 0.5f * (u[1] + u[2]);
        w[0] = u[0] + even;
        w[1] = 0.5f * (u[1] - u[2]);
        w[2] = even + u[3];
    }
};

struct Stride2 {
    static constexpr int SIDE = 5, PLACES = 5, OUT = 2;

    static int filter_place(int place) { return std::min(place, 3); }
    static void input(const Vec *d, Vec *v) {
        v[0] = d[0] - d[2];
        v[1] = d[2];
        v[2] = d[4] - d[2];
        v[3] = d[1];
        v[4] = d[3];
    }
    static void output(const Vec *m, Vec *y) {
        y[0] = m[0] + m[1] + m[3];
        y[1] = m[1] + m[2] + m[4];
    }
    static void output_gradient(const Vec *y, Vec *m) {
        m[0] = m[3] = y[0];
        m[1] = y[0] + y[1];
        m[2] = m[4] = y[1];
    }
    static void filter(const Vec *w, Vec *u) {
        u[0] = w[0];
        u[1] = w[0] + w[2];
        u[2] = w[2];
        u[3] = w[1];
    }
    static void filter_gradient(const Vec *u, Vec *w) {
        w[0] = u[0] + u[1];
        w[1] = u[3];
        w[2] = u[1] + u[2];
    }
};

struct Stride2Transposed : Stride2 {  // the input gradient
    static constexpr int SIDE = 3, OUT = 4;

    static void input(const Vec *d, Vec *v) {
        v[0] = d[0] - d[1];
        v[1] = v[3] = d[1];
        v[2] = d[2] - d[1];
        v[4] = d[2];
    }
    static void output(const Vec *m, Vec *y) {
        y[0] = m[0] + m[1];
        y[1] = m[3];
        y[2] = m[1] + m[2];
        y[3] = m[4];
    }
};

// y (OUT, OUT) = f along both sides of x (IN, IN)
template <int IN, int OUT, void f(const Vec *, Vec *)>
static inline void transform_2d(const Vec *x, Vec *y) {
    Vec half[OUT * IN];
#pragma GCC unroll 5
    for (int j = 0; j < IN; ++j) {
        Vec from[IN], to[OUT];
        for (int i = 0; i < IN; ++i) from[i] = x[i * IN + j];
        f(from, to);
        for (int i = 0; i < OUT; ++i) half[i * IN + j] = to[i];
    }
#pragma GCC unroll 5
    for (int i = 0; i < OUT; ++i) f(half + i * IN, y + i * OUT);
}

struct Map {
    int64_t images, height, width, channels;
};

// Tiles on a map: `step` pixels apart; the first one starts `top` pixels above and `left` pixels left of the map.
struct Grid {
    int64_t step, top, left;
};

// The tiles of all maps, as many as cover the outputs.
struct Tiles {
    int64_t down, across, count;
    Tiles(const Map &map, const Grid &grid)
        : down((map.height + grid.top + grid.step - 1) / grid.step),
          across((map.width + grid.left + grid.step - 1) / grid.step),
          count(map.images * down * across) {}
};

// Addresses of the SIDE x SIDE pixels of a tile; null outside the map.
template <int SIDE, typename Float>
static void pixels(const Map &map, const Grid &grid, const Tiles &tiles, Float *x, int64_t first, int64_t tile,
                   Float *at[SIDE * SIDE]) {
    const int64_t x0 = tile % tiles.across * grid.step - grid.left, row = tile / tiles.across;
    const int64_t y0 = row % tiles.down * grid.step - grid.top, n = row / tiles.down;
    for (int i = 0; i < SIDE; ++i)
        for (int j = 0; j < SIDE; ++j) {
            const int64_t yy = y0 + i, xx = x0 + j;
            const bool inside = yy >= 0 && yy < map.height && xx >= 0 && xx < map.width;
            at[SIDE * i + j] =
                inside ? x + ((n * map.height + yy) * map.width + xx) * map.channels + first : nullptr;
        }
}

// v (PLACES * PLACES, step, size): the transform f of the SIDE x SIDE pixels of tiles begin to end
template <int SIDE, int PLACES, void f(const Vec *, Vec *)>
static void transform(const Map &map, const Grid &grid, const Tiles &tiles, const float *x, int64_t first, int64_t size,
                      int64_t begin, int64_t end, const float *zeros, float *v, int64_t step) {
    for (int64_t tile = begin; tile < end; ++tile) {
        const float *at[SIDE * SIDE];
        pixels<SIDE>(map, grid, tiles, x, first, tile, at);
        for (auto &p : at)
            if (!p) p = zeros;
        for (int64_t c = 0; c < size; c += LANES) {
            Vec d[SIDE * SIDE], e[PLACES * PLACES];
#pragma GCC unroll 25
            for (int i = 0; i < SIDE * SIDE; ++i) d[i] = load(at[i] + c);
            transform_2d<SIDE, PLACES, f>(d, e);
            float *to = v + (tile - begin) * size + c;
#pragma GCC unroll 25
            for (int i = 0; i < PLACES * PLACES; ++i) store(to + i * step * size, e[i]);
        }
    }
}

// The pixels of y in tiles begin to end from m (PLACES * PLACES, TILES, size): A'MA + bias, or with pre_activation, of
// the shape of y, times GELU'(pre_activation)
template <class Side>
static void outputs(const Map &map, const Grid &grid, const Tiles &tiles, float *y, int64_t first, int64_t size,
                    int64_t begin, int64_t end, const float *bias, const float *pre_activation, const float *m) {
    constexpr int PLACES = Side::PLACES, OUT = Side::OUT;
    for (int64_t tile = begin; tile < end; ++tile) {
        float *at[OUT * OUT];
        pixels<OUT>(map, grid, tiles, y, first, tile, at);
        for (int64_t c = 0; c < size; c += LANES) {
            Vec d[PLACES * PLACES], e[OUT * OUT];
            for (int i = 0; i < PLACES * PLACES; ++i) d[i] = load(m + (i * TILES + tile - begin) * size + c);
            transform_2d<PLACES, OUT, Side::output>(d, e);
            const Vec add = bias ? load(bias + c) : Vec{};
            for (int i = 0; i < OUT * OUT; ++i)
                if (at[i])
                    store(at[i] + c, pre_activation ? gelu_gradient(load(pre_activation + (at[i] - y) + c), e[i])
                                                    : e[i] + add);
        }
    }
}

// The number of a transformed filter that place i of a tile is multiplied by.
template <class Side>
static int filter_place(int i) {
    return Side::filter_place(i / Side::PLACES) * FILTER_SIDE + Side::filter_place(i % Side::PLACES);
}

// u (groups, 16, in, out), or if `transposed` (groups, 16, out, in), of filters w (groups * out, 3, 3, in)
template <class Side>
static void filters(const float *w, int64_t groups, int64_t in, int64_t out, bool transposed, float *u) {
#pragma omp for
    for (int64_t o = 0; o < groups * out; o += LANES) {
        const int64_t k = o % out;
        float *base = u + o / out * FILTER_PLACES * in * out;
        for (int64_t c = 0; c < in; c += LANES) {
            float block[FILTER_PLACES][LANES][LANES];
            for (int l = 0; l < LANES; ++l) {
                Vec one[9], all[FILTER_PLACES];
                for (int i = 0; i < 9; ++i) one[i] = load(w + ((o + l) * 9 + (transposed ? 8 - i : i)) * in + c);
                transform_2d<3, FILTER_SIDE, Side::filter>(one, all);
                for (int i = 0; i < FILTER_PLACES; ++i)
                    store(transposed ? base + (i * out + k + l) * in + c : block[i][l], all[i]);
            }
            for (int i = 0; i < FILTER_PLACES && !transposed; ++i)
                for (int j = 0; j < LANES; ++j) {
                    Vec column;
                    for (int l = 0; l < LANES; ++l) column[l] = block[i][l][j];
                    store(base + (i * in + c + j) * out + k, column);
                }
        }
    }
}

// y = x * u (groups, 16, in, out) + bias (or null), or times GELU'(pre_activation)
template <class Side>
static void convolve(const Map &from, const Grid &source, const Map &to, const Grid &result, const float *x,
                     const float *u, const float *bias, const float *pre_activation, float *y, int64_t groups) {
    constexpr int ALL = Side::PLACES * Side::PLACES;
    const int64_t in = from.channels / groups, out = to.channels / groups;
    const Tiles tiles(to, result);
    const int64_t blocks = (tiles.count + TILES - 1) / TILES;
    const std::vector<float> zeros(in);
    const Scratch v(ALL * TILES * in), m(ALL * TILES * out);
    std::fill_n(v.get(), ALL * TILES * in, 0.0f);  // rows past the last tile are computed, too
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < groups * blocks; ++task) {
        const int64_t g = task / blocks, begin = task % blocks * TILES, end = std::min(begin + TILES, tiles.count);
        transform<Side::SIDE, Side::PLACES, Side::input>(from, source, tiles, x, g * in, in, begin, end, zeros.data(),
                                                         v.get(), TILES);
        const int64_t rows = (end - begin + ROWS - 1) / ROWS * ROWS;
        for (int i = 0; i < ALL; ++i)
            matmul<false>(rows, out, in, v.get() + i * TILES * in, in, 1,
                          u + (g * FILTER_PLACES + filter_place<Side>(i)) * in * out, out, m.get() + i * TILES * out,
                          out);
        outputs<Side>(to, result, tiles, y, g * out, out, begin, end, bias ? bias + g * out : nullptr, pre_activation,
                      m.get());
    }
}

void normfree_winograd(float *x, const float *w, const float *bias, const float *pre_activation, float *y,
                       int64_t images, int64_t height, int64_t width, int64_t out_height, int64_t out_width,
                       int64_t groups, int64_t in, int64_t out, int64_t stride, int64_t top, int64_t left,
                       int32_t transposed, int32_t threads) {
    const Map input{images, height, width, groups * in}, output{images, out_height, out_width, groups * out};
    const Scratch u(groups * FILTER_PLACES * in * out);
#pragma omp parallel num_threads(threads)
    {
        (stride == 1 ? filters<Stride1> : filters<Stride2>)(w, groups, in, out, transposed, u.get());
        if (!transposed) {
            const auto by = stride == 1 ? convolve<Stride1> : convolve<Stride2>;
            by(input, {2 * stride, top, left}, output, {2, 0, 0}, x, u.get(), bias, nullptr, y, groups);
        } else if (stride == 1)
            convolve<Stride1>(output, {2, 2 - top, 2 - left}, input, {2, 0, 0}, y, u.get(), nullptr, pre_activation, x,
                              groups);
        else
            convolve<Stride2Transposed>(output, {2, 1, 1}, input, {4, top, left}, y, u.get(), nullptr, pre_activation,
                                        x, groups);
    }
}

template <class Side>
static void filter_gradient(const Map &from, const Grid &source, const Map &to, const Grid &result, const float *x,
                            const float *dy, float *dw, float *dbias, int64_t groups, int32_t threads) {
    constexpr int PLACES = Side::PLACES, ALL = PLACES * PLACES;
    const int64_t in = from.channels / groups, out = to.channels / groups;
    const Tiles tiles(to, result);
    const int64_t blocks = (tiles.count + GRADIENT_TILES - 1) / GRADIENT_TILES;
    const int64_t padded = (out + ROWS - 1) / ROWS * ROWS;
    const int64_t parts = std::min(blocks, (16 + groups - 1) / groups);  // whatever the number of threads
    const Scratch sums(groups * parts * FILTER_PLACES * padded * in), biases(groups * parts * out);
    std::fill_n(biases.get(), groups * parts * out, 0.0f);
#pragma omp parallel num_threads(threads)
    {
        const std::vector<float> zeros(std::max(in, out));
        const Scratch v(ALL * GRADIENT_TILES * in), d(ALL * GRADIENT_TILES * out + ROWS);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < groups * parts; ++task) {
            const int64_t g = task / parts, part = task % parts, first = part * blocks / parts;
            for (int64_t block = first; block < (part + 1) * blocks / parts; ++block) {
                const int64_t begin = block * GRADIENT_TILES, end = std::min(begin + GRADIENT_TILES, tiles.count);
                transform<Side::SIDE, PLACES, Side::input>(from, source, tiles, x, g * in, in, begin, end, zeros.data(),
                                                           v.get(), GRADIENT_TILES);
                transform<Side::OUT, PLACES, Side::output_gradient>(to, result, tiles, dy, g * out, out, begin, end,
                                                                    zeros.data(), d.get(), GRADIENT_TILES);
                for (int i = 0; i < ALL; ++i) {  // (out, in) = or += (tiles, out)' (tiles, in)
                    const bool add = block > first || i / PLACES == FILTER_SIDE || i % PLACES == FILTER_SIDE;
                    const float *vi = v.get() + i * GRADIENT_TILES * in, *di = d.get() + i * GRADIENT_TILES * out;
                    float *sum = sums.get() + (task * FILTER_PLACES + filter_place<Side>(i)) * padded * in;
                    (add ? matmul<true> : matmul<false>)(padded, in, end - begin, di, 1, out, vi, in, sum, in);
                    if (dbias && i == PLACES + 1)  // AdA' has the sum of a tile's pixels in its second row and column
                        add_columns(end - begin, out, di, biases.get() + task * out);
                }
            }
        }
#pragma omp for
        for (int64_t o = 0; o < groups * out; ++o) {
            const int64_t g = o / out, k = o % out;
            if (dbias) {
                float bias = 0;
                for (int64_t part = 0; part < parts; ++part) bias += biases.get()[(g * parts + part) * out + k];
                dbias[o] = bias;
            }
            for (int64_t c = 0; c < in; c += LANES) {
                Vec s[FILTER_PLACES] = {}, w[9];
                for (int64_t part = 0; part < parts; ++part)
                    for (int i = 0; i < FILTER_PLACES; ++i)
                        s[i] += load(sums.get() + (((g * parts + part) * FILTER_PLACES + i) * padded + k) * in + c);
                transform_2d<FILTER_SIDE, 3, Side::filter_gradient>(s, w);
                for (int i = 0; i < 9; ++i) store(dw + (o * 9 + i) * in + c, w[i]);
            }
        }
    }
}

void normfree_winograd_filter_gradient(const float *x, const float *dy, float *dw, float *dbias, int64_t images,
                                       int64_t height, int64_t width, int64_t out_height, int64_t out_width,
                                       int64_t groups, int64_t in, int64_t out, int64_t stride, int64_t top,
                                       int64_t left, int32_t threads) {
    const Map from{images, height, width, groups * in}, to{images, out_height, out_width, groups * out};
    const auto by = stride == 1 ? filter_gradient<Stride1> : filter_gradient<Stride2>;
    by(from, {2 * stride, top, left}, to, {2, 0, 0}, x, dy, dw, dbias, groups, threads);
}
