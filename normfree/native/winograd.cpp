// 3x3 convolutions of stride 1 by Winograd's F(2x2, 3x3): 16 products for what takes 36.
//
// Lavin and Gray 2015 (arXiv 1509.09308). Tiles of 4x4 inputs, two apart, give 2x2 outputs: the inputs become
// V = B'dB, the filters U = GwG', and for each of the 16 places of a tile the sum over channels is a small matrix
// product VU; the outputs are A'(VU)A. The gradient of the input is the same convolution with filters turned by 180
// degrees; that of the filters is G'(V'(AdA'))G. Everything is float32; maps are (N, H, W, C) in memory. All channels
// of a group are multiples of LANES, at most 16.

#include "matmul.h"

#include <vector>

constexpr int M = 2, T = 4, PLACES = T * T;
constexpr int64_t TILES = 36;  // in flight: their transforms stay in the second-level cache
constexpr int64_t GRADIENT_TILES = 192;  // of a filter's gradient the sums do, and then more tiles are better

// The transforms of one line of a tile.
static inline void input_line(const Vec *d, Vec *v) {  // B'd
    v[0] = d[0] - d[2];
    v[1] = d[1] + d[2];
    v[2] = d[2] - d[1];
    v[3] = d[1] - d[3];
}

static inline void output_line(const Vec *m, Vec *y) {  // A'm
    y[0] = m[0] + m[1] + m[2];
    y[1] = m[1] - m[2] - m[3];
}

static inline void gradient_line(const Vec *y, Vec *m) {  // Ay
    m[0] = y[0];
    m[1] = y[0] + y[1];
    m[2] = y[0] - y[1];
    m[3] = -y[1];
}

static inline void filter_line(const Vec *w, Vec *u) {  // Gw
    const Vec even = 0.5f * (w[0] + w[2]), odd = 0.5f * w[1];
    u[0] = w[0];
    u[1] = even + odd;
    u[2] = even - odd;
    u[3] = w[2];
}

static inline void filter_gradient_line(const Vec *u, Vec *w) {  // G'u
    const Vec even = 0.5f * (u[1] + u[2]);
    w[0] = u[0] + even;
    w[1] = 0.5f * (u[1] - u[2]);
    w[2] = even + u[3];
}

// f along both sides of x (IN, IN) to y (OUT, OUT)
template <int IN, int OUT, void f(const Vec *, Vec *)>
static inline void both(const Vec *x, Vec *y) {
    Vec half[OUT * IN];
#pragma GCC unroll 4
    for (int j = 0; j < IN; ++j) {
        Vec from[IN], to[OUT];
        for (int i = 0; i < IN; ++i) from[i] = x[i * IN + j];
        f(from, to);
        for (int i = 0; i < OUT; ++i) half[i * IN + j] = to[i];
    }
#pragma GCC unroll 4
    for (int i = 0; i < OUT; ++i) f(half + i * IN, y + i * OUT);
}

struct Map {
    int64_t images, height, width, channels;
    int64_t down() const { return (height + M - 1) / M; }
    int64_t across() const { return (width + M - 1) / M; }
    int64_t tiles() const { return images * down() * across(); }
};

// Where the SIDE x SIDE pixels of a tile are, from `before` pixels above and left of its outputs on; null outside.
template <int SIDE, typename Float>
static void pixels(const Map &map, Float *x, int64_t first, int64_t tile, int before, Float *at[SIDE * SIDE]) {
    const int64_t x0 = tile % map.across() * M - before, y0 = tile / map.across() % map.down() * M - before;
    const int64_t n = tile / (map.across() * map.down());
    for (int i = 0; i < SIDE; ++i)
        for (int j = 0; j < SIDE; ++j) {
            const int64_t yy = y0 + i, xx = x0 + j;
            const bool inside = yy >= 0 && yy < map.height && xx >= 0 && xx < map.width;
            at[SIDE * i + j] =
                inside ? x + ((n * map.height + yy) * map.width + xx) * map.channels + first : nullptr;
        }
}

// (PLACES, step, size) of tiles begin to end: the transform f of their SIDE x SIDE pixels
template <int SIDE, void f(const Vec *, Vec *)>
static void transform(const Map &map, const float *x, int64_t first, int64_t size, int64_t begin, int64_t end,
                      int before, const float *zeros, float *v, int64_t step) {
    for (int64_t tile = begin; tile < end; ++tile) {
        const float *at[SIDE * SIDE];
        pixels<SIDE>(map, x, first, tile, before, at);
        for (auto &p : at)
            if (!p) p = zeros;
        for (int64_t c = 0; c < size; c += LANES) {
            Vec d[SIDE * SIDE], e[PLACES];
#pragma GCC unroll 16
            for (int i = 0; i < SIDE * SIDE; ++i) d[i] = get(at[i] + c);
            both<SIDE, T, f>(d, e);
            float *to = v + (tile - begin) * size + c;
#pragma GCC unroll 16
            for (int i = 0; i < PLACES; ++i) put(to + i * step * size, e[i]);
        }
    }
}

// y of tiles begin to end from v (PLACES, TILES, size): A'MA + bias
static void outputs(const Map &map, float *y, int64_t first, int64_t size, int64_t begin, int64_t end,
                    const float *bias, const float *v) {
    for (int64_t tile = begin; tile < end; ++tile) {
        float *at[M * M];
        pixels<M>(map, y, first, tile, 0, at);
        for (int64_t c = 0; c < size; c += LANES) {
            Vec d[PLACES], e[M * M];
            for (int i = 0; i < PLACES; ++i) d[i] = get(v + (i * TILES + tile - begin) * size + c);
            both<T, M, output_line>(d, e);
            const Vec add = bias ? get(bias + c) : Vec{};
            for (int i = 0; i < M * M; ++i)
                if (at[i]) put(at[i] + c, e[i] + add);
        }
    }
}

// Filters w (groups * out, 3, 3, in) to u (groups, 16, in, out), or, turned, to (groups, 16, out, in).
extern "C" void normfree_winograd_filters(const float *w, int64_t groups, int64_t in, int64_t out, int32_t turned,
                                          float *u, int32_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t o = 0; o < groups * out; o += LANES) {
        const int64_t k = o % out;
        float *base = u + o / out * PLACES * in * out;
        for (int64_t c = 0; c < in; c += LANES) {
            float block[PLACES][LANES][LANES];
            for (int l = 0; l < LANES; ++l) {
                Vec one[9], places[PLACES];
                for (int i = 0; i < 9; ++i) one[i] = get(w + ((o + l) * 9 + (turned ? 8 - i : i)) * in + c);
                both<3, T, filter_line>(one, places);
                for (int i = 0; i < PLACES; ++i)
                    put(turned ? base + (i * out + k + l) * in + c : block[i][l], places[i]);
            }
            for (int i = 0; i < PLACES && !turned; ++i)
                for (int j = 0; j < LANES; ++j) {
                    Vec column;
                    for (int l = 0; l < LANES; ++l) column[l] = block[i][l][j];
                    put(base + (i * in + c + j) * out + k, column);
                }
        }
    }
}

// y (N, H, W, groups * out) = x (N, H, W, groups * in) * u (groups, 16, in, out) + bias (or null)
extern "C" void normfree_winograd(const float *x, const float *u, const float *bias, float *y, int64_t images,
                                  int64_t height, int64_t width, int64_t groups, int64_t in, int64_t out,
                                  int32_t threads) {
    const Map from{images, height, width, groups * in}, to{images, height, width, groups * out};
    const int64_t tiles = from.tiles(), blocks = (tiles + TILES - 1) / TILES;
#pragma omp parallel num_threads(threads)
    {
        const std::vector<float> zeros(in);
        const Scratch v(PLACES * TILES * in), m(PLACES * TILES * out);
        std::fill(v.get(), v.get() + PLACES * TILES * in, 0.0f);  // rows past the last tile are computed, too
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < groups * blocks; ++task) {
            const int64_t g = task / blocks, begin = task % blocks * TILES, end = std::min(begin + TILES, tiles);
            transform<T, input_line>(from, x, g * in, in, begin, end, 1, zeros.data(), v.get(), TILES);
            const int64_t rows = (end - begin + ROWS - 1) / ROWS * ROWS;
            for (int i = 0; i < PLACES; ++i)
                matmul<false>(rows, out, in, v.get() + i * TILES * in, in, 1, u + (g * PLACES + i) * in * out, out,
                              m.get() + i * TILES * out, out);
            outputs(to, y, g * out, out, begin, end, bias ? bias + g * out : nullptr, m.get());
        }
    }
}

// dw (groups * out, 3, 3, in) and, if not null, dbias (groups * out) of x (N, H, W, groups * in) and dy (N, H, W,
// groups * out)
extern "C" void normfree_winograd_filter_gradient(const float *x, const float *dy, float *dw, float *dbias,
                                                  int64_t images, int64_t height, int64_t width, int64_t groups,
                                                  int64_t in, int64_t out, int32_t threads) {
    const Map from{images, height, width, groups * in}, to{images, height, width, groups * out};
    const int64_t tiles = from.tiles(), blocks = (tiles + GRADIENT_TILES - 1) / GRADIENT_TILES;
    const int64_t padded = (out + ROWS - 1) / ROWS * ROWS;
    const int64_t parts = std::min(blocks, (16 + groups - 1) / groups);  // whatever the number of threads
    const Scratch sums(groups * parts * PLACES * padded * in), biases(groups * parts * out);
    std::fill_n(biases.get(), groups * parts * out, 0.0f);
#pragma omp parallel num_threads(threads)
    {
        const std::vector<float> zeros(std::max(in, out));
        const Scratch v(PLACES * GRADIENT_TILES * in), d(PLACES * GRADIENT_TILES * out + ROWS);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < groups * parts; ++task) {
            const int64_t g = task / parts, part = task % parts, first = part * blocks / parts;
            for (int64_t block = first; block < (part + 1) * blocks / parts; ++block) {
                const int64_t begin = block * GRADIENT_TILES, end = std::min(begin + GRADIENT_TILES, tiles);
                transform<T, input_line>(from, x, g * in, in, begin, end, 1, zeros.data(), v.get(), GRADIENT_TILES);
                transform<M, gradient_line>(to, dy, g * out, out, begin, end, 0, zeros.data(), d.get(), GRADIENT_TILES);
                if (dbias)  // AdA' has the sum of a tile's pixels in its second row and column
                    add_columns(end - begin, out, d.get() + (T + 1) * GRADIENT_TILES * out, biases.get() + task * out);
                for (int i = 0; i < PLACES; ++i)  // (out, in) = or += (tiles, out)' (tiles, in)
                    (block > first ? matmul<true> : matmul<false>)(
                        padded, in, end - begin, d.get() + i * GRADIENT_TILES * out, 1, out,
                        v.get() + i * GRADIENT_TILES * in, in, sums.get() + (task * PLACES + i) * padded * in, in);
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
                Vec s[PLACES] = {}, w[9];
                for (int64_t part = 0; part < parts; ++part)
                    for (int i = 0; i < PLACES; ++i)
                        s[i] += get(sums.get() + (((g * parts + part) * PLACES + i) * padded + k) * in + c);
                both<T, 3, filter_gradient_line>(s, w);
                for (int i = 0; i < 9; ++i) put(dw + (o * 9 + i) * in + c, w[i]);
            }
        }
    }
}
