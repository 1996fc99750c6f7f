// 3x3 convolutions by Winograd's transforms: 16 products for what takes 36 at stride 1, 25 at stride 2.
//
// Lavin and Gray 2015 (arXiv 1509.09308). Tiles of inputs d give 2x2 outputs: the inputs become V = B'dB, the filters
// U = GwG', and for each place of a tile the sum over channels is a small matrix product VU; the outputs are A'(VU)A.
// The gradient of the input is such a convolution, too, with filters turned by 180 degrees; that of the filters is
// G'(V'(AdA'))G. At stride 2 inputs of even and of odd place are apart: along a side the former see two of a filter's
// three places, which is F(2, 2), 3 products for 4, the latter see one. All factors are 1, -1 and 1/2, and everything is
// float32; maps are (N, H, W, C) in memory. All channels of a group are multiples of LANES, at most 16.
//
// The gradient of the input may be that of GELU's input, which is made as each pixel is written, once.

#include "gelu.h"
#include "matmul.h"

#include <vector>

constexpr int KINDS = 4;  // of a filter's numbers along one side
constexpr int64_t TILES = 36;  // in flight: their transforms stay in the second-level cache
constexpr int64_t GRADIENT_TILES = 288;  // of a filter's gradient the sums do, and then more tiles are better

// The transforms of one side of a tile: SIDE pixels become PLACES numbers, each times one of the KINDS of numbers of a
// filter, and then OUT pixels.
struct Same {  // stride 1, and its gradient: F(2, 3)
    static constexpr int SIDE = 4, PLACES = 4, OUT = 2;

    static int kind(int place) { return place; }
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
    static void output_gradient(const Vec *y, Vec *m) {  // Ay; second, their sum
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

struct Half {  // stride 2
    static constexpr int SIDE = 5, PLACES = 5, OUT = 2;

    static int kind(int place) { return std::min(place, 3); }
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

struct Twice : Half {  // the gradient of the input at stride 2
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

// f along both sides of x (IN, IN) to y (OUT, OUT)
template <int IN, int OUT, void f(const Vec *, Vec *)>
static inline void both(const Vec *x, Vec *y) {
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

// How tiles lie on a map: `step` pixels apart, from `top` pixels above and `left` of its first one on.
struct Grid {
    int64_t step, top, left;
};

// Those of all maps, as many as it takes to cover the outputs.
struct Tiles {
    int64_t down, across, count;
    Tiles(const Map &map, const Grid &grid)
        : down((map.height + grid.top + grid.step - 1) / grid.step),
          across((map.width + grid.left + grid.step - 1) / grid.step),
          count(map.images * down * across) {}
};

// Where the SIDE x SIDE pixels of a tile are; null outside.
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

// (PLACES * PLACES, step, size) of tiles begin to end: the transform f of their SIDE x SIDE pixels
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
            for (int i = 0; i < SIDE * SIDE; ++i) d[i] = get(at[i] + c);
            both<SIDE, PLACES, f>(d, e);
            float *to = v + (tile - begin) * size + c;
#pragma GCC unroll 25
            for (int i = 0; i < PLACES * PLACES; ++i) put(to + i * step * size, e[i]);
        }
    }
}

// y of tiles begin to end from v (PLACES * PLACES, TILES, size): A'MA + bias; with `seen`, which lies as y does, times
// GELU'(seen)
template <class Side>
static void outputs(const Map &map, const Grid &grid, const Tiles &tiles, float *y, int64_t first, int64_t size,
                    int64_t begin, int64_t end, const float *bias, const float *seen, const float *v) {
    constexpr int PLACES = Side::PLACES, OUT = Side::OUT;
    for (int64_t tile = begin; tile < end; ++tile) {
        float *at[OUT * OUT];
        pixels<OUT>(map, grid, tiles, y, first, tile, at);
        for (int64_t c = 0; c < size; c += LANES) {
            Vec d[PLACES * PLACES], e[OUT * OUT];
            for (int i = 0; i < PLACES * PLACES; ++i) d[i] = get(v + (i * TILES + tile - begin) * size + c);
            both<PLACES, OUT, Side::output>(d, e);
            const Vec add = bias ? get(bias + c) : Vec{};
            for (int i = 0; i < OUT * OUT; ++i)
                if (at[i]) put(at[i] + c, seen ? gelu_gradient(get(seen + (at[i] - y) + c), e[i]) : e[i] + add);
        }
    }
}

// Which of a filter's numbers belongs to one of a tile's.
template <class Side>
static int kind(int i) {
    return Side::kind(i / Side::PLACES) * KINDS + Side::kind(i % Side::PLACES);
}

// Filters w (groups * out, 3, 3, in) to u (groups, 16, in, out), or, turned, to (groups, 16, out, in).
template <class Side>
static void filters(const float *w, int64_t groups, int64_t in, int64_t out, bool turned, float *u) {
#pragma omp for
    for (int64_t o = 0; o < groups * out; o += LANES) {
        const int64_t k = o % out;
        float *base = u + o / out * KINDS * KINDS * in * out;
        for (int64_t c = 0; c < in; c += LANES) {
            float block[KINDS * KINDS][LANES][LANES];
            for (int l = 0; l < LANES; ++l) {
                Vec one[9], all[KINDS * KINDS];
                for (int i = 0; i < 9; ++i) one[i] = get(w + ((o + l) * 9 + (turned ? 8 - i : i)) * in + c);
                both<3, KINDS, Side::filter>(one, all);
                for (int i = 0; i < KINDS * KINDS; ++i)
                    put(turned ? base + (i * out + k + l) * in + c : block[i][l], all[i]);
            }
            for (int i = 0; i < KINDS * KINDS && !turned; ++i)
                for (int j = 0; j < LANES; ++j) {
                    Vec column;
                    for (int l = 0; l < LANES; ++l) column[l] = block[i][l][j];
                    put(base + (i * in + c + j) * out + k, column);
                }
        }
    }
}

// y = x * u (groups, 16, in, out) + bias (or null), or times GELU'(seen)
template <class Side>
static void convolve(const Map &from, const Grid &source, const Map &to, const Grid &result, const float *x,
                     const float *u, const float *bias, const float *seen, float *y, int64_t groups) {
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
                          u + (g * KINDS * KINDS + kind<Side>(i)) * in * out, out, m.get() + i * TILES * out, out);
        outputs<Side>(to, result, tiles, y, g * out, out, begin, end, bias ? bias + g * out : nullptr, seen,
                      m.get());
    }
}

// y (N, out_height, out_width, groups * out) of x (N, height, width, groups * in), filters w (groups * out, 3, 3, in)
// and bias (or null); stride 1 or 2, `top` and `left` zeros before x. Turned: x, the gradient of the input, of y, that
// of the output; with `seen`, of the shape of x, the gradient of `seen` where the input is GELU(seen).
extern "C" void normfree_winograd(float *x, const float *w, const float *bias, const float *seen, float *y,
                                  int64_t images, int64_t height, int64_t width, int64_t out_height, int64_t out_width,
                                  int64_t groups, int64_t in, int64_t out, int64_t stride, int64_t top, int64_t left,
                                  int32_t turned, int32_t threads) {
    const Map input{images, height, width, groups * in}, output{images, out_height, out_width, groups * out};
    const Scratch u(groups * KINDS * KINDS * in * out);
#pragma omp parallel num_threads(threads)
    {
        (stride == 1 ? filters<Same> : filters<Half>)(w, groups, in, out, turned, u.get());
        if (!turned) {
            const auto by = stride == 1 ? convolve<Same> : convolve<Half>;
            by(input, {2 * stride, top, left}, output, {2, 0, 0}, x, u.get(), bias, nullptr, y, groups);
        } else if (stride == 1)
            convolve<Same>(output, {2, 2 - top, 2 - left}, input, {2, 0, 0}, y, u.get(), nullptr, seen, x, groups);
        else
            convolve<Twice>(output, {2, 1, 1}, input, {4, top, left}, y, u.get(), nullptr, seen, x, groups);
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
    const Scratch sums(groups * parts * KINDS * KINDS * padded * in), biases(groups * parts * out);
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
                    const bool add = block > first || i / PLACES == KINDS || i % PLACES == KINDS;
                    const float *vi = v.get() + i * GRADIENT_TILES * in, *di = d.get() + i * GRADIENT_TILES * out;
                    float *sum = sums.get() + (task * KINDS * KINDS + kind<Side>(i)) * padded * in;
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
                Vec s[KINDS * KINDS] = {}, w[9];
                for (int64_t part = 0; part < parts; ++part)
                    for (int i = 0; i < KINDS * KINDS; ++i)
                        s[i] += get(sums.get() + (((g * parts + part) * KINDS * KINDS + i) * padded + k) * in + c);
                both<KINDS, 3, Side::filter_gradient>(s, w);
                for (int i = 0; i < 9; ++i) put(dw + (o * 9 + i) * in + c, w[i]);
            }
        }
    }
}

// dw (groups * out, 3, 3, in) and, if not null, dbias (groups * out) of x and dy, which lies as y does
extern "C" void normfree_winograd_filter_gradient(const float *x, const float *dy, float *dw, float *dbias,
                                                  int64_t images, int64_t height, int64_t width, int64_t out_height,
                                                  int64_t out_width, int64_t groups, int64_t in, int64_t out,
                                                  int64_t stride, int64_t top, int64_t left, int32_t threads) {
    const Map from{images, height, width, groups * in}, to{images, out_height, out_width, groups * out};
    const auto by = stride == 1 ? filter_gradient<Same> : filter_gradient<Half>;
    by(from, {2 * stride, top, left}, to, {2, 0, 0}, x, dy, dw, dbias, groups, threads);
}
