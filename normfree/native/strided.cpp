// Convolutions of any stride: products of gathered pixels and the filter's places.
//
// Maps are (N, H, W, groups * channels) in memory, filters (groups * out, kh, kw, in); `in` and `out` are multiples of
// LANES. Zeros around the input are never written down. The gradient of the input is, for each of the stride² kinds of
// its pixels, the same sum over those places of the filter that reach such a pixel.
//
// A convolution may be one of GELU(x), which is made of each pixel as it is gathered, and of its gradient as it is written:
// worth it where a pixel is gathered once, by filters of one pixel.

#include "gelu.h"
#include "matmul.h"

#include <vector>

constexpr int64_t PIXELS = 48;           // outputs in flight: what they read of one place stays in the first cache
constexpr int64_t GRADIENT_PIXELS = 192;  // of a filter's gradient

struct Shape {
    int64_t images, height, width, channels;
};

// Pixels of the output a line apart by `step` from `first` on, and how many of them; `at` in the source for each place.
struct Line {
    int64_t first, step, count;
    std::vector<int64_t> place, at;  // which line of the filter, and what is added to i * stride to find its pixel
};

struct Pixel {
    int64_t image, y, x;  // counted among those of two lines
};

static Pixel pixel(const Line &down, const Line &across, int64_t i) {
    return {i / (down.count * across.count), i / across.count % down.count, i % across.count};
}

// (pixels, size): of pixels begin to end, what they see of x from channel `first` on, `dy` and `dx` away
static void gather(const Shape &map, const float *x, int64_t first, int64_t size, const Line &down, const Line &across,
                   int64_t stride, int64_t dy, int64_t dx, int64_t begin, int64_t end, bool activated, float *to) {
    for (int64_t i = begin; i < end; ++i, to += size) {
        const Pixel p = pixel(down, across, i);
        const int64_t y = p.y * stride + dy, at = p.x * stride + dx;
        if (y < 0 || y >= map.height || at < 0 || at >= map.width) std::fill_n(to, size, 0.0f);
        else copy(x + ((p.image * map.height + y) * map.width + at) * map.channels + first, size, activated, to);
    }
}

// The pixels (down x across) of y from those of x, `stride` apart; filters u (groups, kh * kw, in, out) of width kw.
// With `seen`, which lies as y does, times GELU'(seen).
static void convolve(const Shape &from, const Shape &to, const float *x, const float *u, const float *bias,
                     const float *seen, float *y, int64_t groups, int64_t kh, int64_t kw, const Line &down,
                     const Line &across, int64_t stride, bool activated) {
    const int64_t in = from.channels / groups, out = to.channels / groups;
    const int64_t pixels = from.images * down.count * across.count, blocks = (pixels + PIXELS - 1) / PIXELS;
    const Scratch inputs(PIXELS * in), sums(PIXELS * out);
    std::fill_n(inputs.get(), PIXELS * in, 0.0f);  // rows past the last pixel are computed, too
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t task = 0; task < groups * blocks; ++task) {
        const int64_t g = task / blocks, begin = task % blocks * PIXELS, end = std::min(begin + PIXELS, pixels);
        const int64_t rows = (end - begin + ROWS - 1) / ROWS * ROWS;
        for (int64_t i = 0; i < PIXELS; ++i)
            if (bias) std::copy_n(bias + g * out, out, sums.get() + i * out);
            else std::fill_n(sums.get() + i * out, out, 0.0f);
        for (size_t i = 0; i < down.place.size(); ++i)
            for (size_t j = 0; j < across.place.size(); ++j) {
                gather(from, x, g * in, in, down, across, stride, down.at[i], across.at[j], begin, end, activated,
                       inputs.get());
                const int64_t place = down.place[i] * kw + across.place[j];
                matmul<true>(rows, out, in, inputs.get(), in, 1, u + (g * kh * kw + place) * in * out, out, sums.get(),
                             out);
            }
        for (int64_t i = begin; i < end; ++i) {
            const Pixel p = pixel(down, across, i);
            const int64_t row = p.image * to.height + down.first + p.y * down.step;
            const int64_t at = (row * to.width + across.first + p.x * across.step) * to.channels + g * out;
            const float *sum = sums.get() + (i - begin) * out;
            if (!seen) std::memcpy(y + at, sum, out * sizeof *y);
            else for (int64_t c = 0; c < out; c += LANES) put(y + at + c, gelu_gradient(get(seen + at + c), get(sum + c)));
        }
    }
}

// All outputs along one side, whose first one sees the input from `before` pixels before its first on
static Line outputs(int64_t count, int64_t kernel, int64_t before) {
    Line line{0, 1, count, {}, {}};
    for (int64_t i = 0; i < kernel; ++i) line.place.push_back(i), line.at.push_back(i - before);
    return line;
}

// The inputs first, first + stride, ... along one side, and the outputs that see them
static Line inputs(int64_t size, int64_t kernel, int64_t before, int64_t stride, int64_t first) {
    Line line{first, stride, (size - first + stride - 1) / stride, {}, {}};
    for (int64_t i = 0; i < kernel; ++i)
        if (const int64_t from = first + before - i; from % stride == 0)
            line.place.push_back(i), line.at.push_back(from / stride);
    return line;
}

// (groups, kh * kw, in, out) from w (groups * out, kh * kw, in), or, turned, (groups, kh * kw, out, in)
static void pack(const float *w, float *u, int64_t groups, int64_t places, int64_t in, int64_t out, bool turned) {
#pragma omp for
    for (int64_t task = 0; task < groups * out / LANES; ++task) {
        const int64_t g = task / (out / LANES), o = task % (out / LANES) * LANES;
        for (int64_t p = 0; p < places; ++p) {
            const float *from = w + ((g * out + o) * places + p) * in;
            float *to = u + (g * places + p) * in * out + (turned ? o * in : o);
            for (int64_t l = 0; l < LANES && turned; ++l) std::copy_n(from + l * places * in, in, to + l * in);
            for (int64_t c = 0; c < in && !turned; ++c)
                for (int64_t l = 0; l < LANES; ++l) to[c * out + l] = from[l * places * in + c];
        }
    }
}

// y (N, out_height, out_width, groups * out) of x (N, height, width, groups * in), w and bias (or null); `top` and
// `left` zeros before x; `activated`: of GELU(x). Turned: x (N, height, width, ..) = the gradient of the input, of y = that
// of the output; with `seen`, of the shape of x, which then is the gradient of GELU(seen), that of `seen`.
extern "C" void normfree_strided(float *x, const float *w, const float *bias, const float *seen, float *y, int64_t images,
                                 int64_t height, int64_t width, int64_t out_height, int64_t out_width, int64_t groups,
                                 int64_t in, int64_t out, int64_t kh, int64_t kw, int64_t stride, int64_t top,
                                 int64_t left, int32_t activated, int32_t turned, int32_t threads) {
    const Shape source{images, height, width, groups * in}, result{images, out_height, out_width, groups * out};
    const Scratch u(groups * kh * kw * in * out);
#pragma omp parallel num_threads(threads)
    {
        pack(w, u.get(), groups, kh * kw, in, out, turned);
        if (!turned)
            convolve(source, result, x, u.get(), bias, nullptr, y, groups, kh, kw, outputs(out_height, kh, top),
                     outputs(out_width, kw, left), stride, activated);
        for (int64_t i = 0; i < stride * stride && turned; ++i)
            convolve(result, source, y, u.get(), nullptr, seen, x, groups, kh, kw,
                     inputs(height, kh, top, stride, i / stride), inputs(width, kw, left, stride, i % stride), 1, false);
    }
}

// dw (groups * out, kh, kw, in) and, if not null, dbias (groups * out) of x, or `activated` GELU(x), and dy (N, out_height,
// out_width, groups * out)
extern "C" void normfree_strided_filter_gradient(const float *x, const float *dy, float *dw, float *dbias,
                                                 int64_t images, int64_t height, int64_t width, int64_t out_height, int64_t out_width,
                                                 int64_t groups, int64_t in, int64_t out, int64_t kh, int64_t kw,
                                                 int64_t stride, int64_t top, int64_t left, int32_t activated,
                                                 int32_t threads) {
    const Shape from{images, height, width, groups * in}, to{images, out_height, out_width, groups * out};
    const Line down = outputs(out_height, kh, top), across = outputs(out_width, kw, left);
    const int64_t pixels = images * out_height * out_width, places = kh * kw;
    const int64_t blocks = (pixels + GRADIENT_PIXELS - 1) / GRADIENT_PIXELS;
    const int64_t padded = (out + ROWS - 1) / ROWS * ROWS;
    const int64_t parts = std::min(blocks, (32 + groups * places - 1) / (groups * places));  // for any number of threads
    const Scratch sums(groups * places * parts * padded * in), biases(groups * parts * out);
    std::fill_n(biases.get(), groups * parts * out, 0.0f);
#pragma omp parallel num_threads(threads)
    {
        const Scratch seen(GRADIENT_PIXELS * in), d(GRADIENT_PIXELS * out + ROWS);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < groups * places * parts; ++task) {
            const int64_t part = task % parts, place = task / parts % places, g = task / (parts * places);
            const int64_t first = part * blocks / parts;
            for (int64_t block = first; block < (part + 1) * blocks / parts; ++block) {
                const int64_t begin = block * GRADIENT_PIXELS, end = std::min(begin + GRADIENT_PIXELS, pixels);
                gather(from, x, g * in, in, down, across, stride, down.at[place / kw], across.at[place % kw], begin, end,
                       activated, seen.get());
                for (int64_t i = begin; i < end; ++i)
                    std::memcpy(d.get() + (i - begin) * out, dy + i * to.channels + g * out, out * sizeof *dy);
                if (dbias && place == 0) add_columns(end - begin, out, d.get(), biases.get() + (g * parts + part) * out);
                (block > first ? matmul<true> : matmul<false>)(padded, in, end - begin, d.get(), 1, out, seen.get(), in,
                                                               sums.get() + task * padded * in, in);
            }
        }
#pragma omp for
        for (int64_t o = 0; o < groups * out; ++o) {
            if (dbias) {
                float bias = 0;
                for (int64_t part = 0; part < parts; ++part) bias += biases.get()[(o / out * parts + part) * out + o % out];
                dbias[o] = bias;
            }
            for (int64_t place = 0; place < places; ++place)
                for (int64_t c = 0; c < in; c += LANES) {
                    Vec sum{};
                    for (int64_t part = 0; part < parts; ++part)
                        sum += get(sums.get() + (((o / out * places + place) * parts + part) * padded + o % out) * in + c);
                    put(dw + (o * places + place) * in + c, sum);
                }
        }
    }
}
