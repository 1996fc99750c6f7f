// Resizes a box of an 8-bit image with the bits of Pillow 13: bicubic with antialiasing, in fixed point, one pass along
// rows and one along columns, with 8 bits in between.

#include "kernels.h"
#include "vector.h"

#include <cmath>
#include <memory>
#include <vector>

constexpr int PRECISION = 22;  // bits of a weight behind the point; Pillow's

// Output i is a sum of `count[i]` pixels from `first[i]` on, with the weights from `weights[i * size]` on.
struct Taps {
    int64_t size;
    std::vector<int64_t> first, count;
    std::vector<int32_t> weights;
};

// Contracted to fused operations, the weights could differ from Pillow's in their last bit.
#ifdef __clang__
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
#endif

static inline double cubic(double x) {
    x = std::abs(x);
    return x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0;
}

// The taps that resize the interval [begin, end] of `in` pixels to `out` pixels.
static Taps cubic_taps(int64_t in, float begin, float end, int64_t out) {
    const double scale = static_cast<double>(end - begin) / out, wide = std::max(scale, 1.0), reach = 2 * wide;
    const int64_t size = 2 * static_cast<int64_t>(std::ceil(reach)) + 1;
    Taps taps{size, std::vector<int64_t>(out), std::vector<int64_t>(out), std::vector<int32_t>(out * size)};
    std::vector<double> shares(size);
    for (int64_t i = 0; i < out; ++i) {
        const double centre = begin + (i + 0.5) * scale, narrow = 1 / wide;
        const int64_t first = std::max(static_cast<int64_t>(centre - reach + 0.5), int64_t{0});
        const int64_t count = std::min(static_cast<int64_t>(centre + reach + 0.5), in) - first;
        double sum = 0;
        for (int64_t t = 0; t < count; ++t) sum += shares[t] = cubic((t + first - centre + 0.5) * narrow);
        for (int64_t t = 0; t < count; ++t) {
            const double weight = shares[t] / sum * (1 << PRECISION);
            taps.weights[i * size + t] = static_cast<int32_t>(weight + (weight < 0 ? -0.5 : 0.5));
        }
        taps.first[i] = first;
        taps.count[i] = count;
    }
    return taps;
}

#ifndef __clang__
#pragma GCC pop_options
#endif

// The weighted sum of the vectors pixels(0), pixels(1), ..., channel by channel.
template <int CHANNELS, typename F>
static inline Ints weighted(const int32_t *weights, int64_t count, F pixels) {
    Ints sums[CHANNELS], result{};
    for (Ints &sum : sums) sum = Ints{} + (1 << (PRECISION - 1));
    for (int64_t t = 0; t < count; ++t) {
        const Ints vector = pixels(t);
        for (int c = 0; c < CHANNELS; ++c) sums[c] += (vector >> 8 * c & 255) * weights[t];
    }
    for (int c = 0; c < CHANNELS; ++c) {
        const Ints sum = sums[c] >> PRECISION, bright = sum < 0 ? Ints{} : sum;
        result |= (bright > 255 ? Ints{} + 255 : bright) << 8 * c;
    }
    return result;
}

static inline Ints load(const int32_t *p) {
    Ints v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// Four bytes a pixel, channels in the lowest bytes. Rows are padded to whole vectors; LANES rows follow the last one.
struct Image {
    int64_t width, height, pitch;
    std::unique_ptr<int32_t[]> pixels;
    Image(int64_t width, int64_t height)
        : width(width), height(height), pitch((width + LANES - 1) / LANES * LANES),
          pixels(new int32_t[(height + LANES) * pitch]) {}
    int32_t *operator[](int64_t y) const { return pixels.get() + y * pitch; }
};

// Takes LANES rows at once, transposed, so that one vector has the same column of each.
template <int CHANNELS>
static Image along_rows(const Image &in, int64_t left, const Taps &taps) {
    Image out(taps.first.size(), in.height);
    const std::unique_ptr<int32_t[]> transposed(new int32_t[in.width * LANES]);
    for (int64_t y = 0; y < in.height; y += LANES) {
        for (int64_t x = 0; x < in.width; ++x)
            for (int r = 0; r < LANES; ++r) transposed[x * LANES + r] = in[y + r][x];
        for (int64_t x = 0; x < out.width; ++x) {
            const int32_t *from = &transposed[(taps.first[x] - left) * LANES];
            const Ints result = weighted<CHANNELS>(&taps.weights[x * taps.size], taps.count[x],
                                                   [&](int64_t t) { return load(from + t * LANES); });
            for (int r = 0; r < LANES; ++r) out[y + r][x] = result[r];
        }
    }
    return out;
}

template <int CHANNELS>
static Image along_columns(const Image &in, int64_t top, const Taps &taps) {
    Image out(in.width, taps.first.size());
    for (int64_t y = 0; y < out.height; ++y)
        for (int64_t x = 0; x < in.width; x += LANES) {
            const int32_t *from = in[taps.first[y] - top] + x;
            const Ints result = weighted<CHANNELS>(&taps.weights[y * taps.size], taps.count[y],
                                                   [&](int64_t t) { return load(from + t * in.pitch); });
            std::memcpy(out[y] + x, &result, sizeof result);
        }
    return out;
}

template <int CHANNELS, typename Pixel>
static void resample(const Pixel *pixels, int64_t width, int64_t height, const float *box, int64_t px,
                     bool columns_first, bool mirrored, uint8_t *out) {
    const Taps columns = cubic_taps(width, box[0], box[2], px), rows = cubic_taps(height, box[1], box[3], px);
    const int64_t left = columns.first[0], top = rows.first[0];
    Image part(columns.first[px - 1] + columns.count[px - 1] - left, rows.first[px - 1] + rows.count[px - 1] - top);
    for (int64_t y = 0; y < part.height; ++y) std::copy_n(pixels + (top + y) * width + left, part.width, part[y]);
    const Image result = columns_first ? along_rows<CHANNELS>(along_columns<CHANNELS>(part, top, rows), left, columns)
                                       : along_columns<CHANNELS>(along_rows<CHANNELS>(part, left, columns), top, rows);
    for (int c = 0; c < CHANNELS; ++c)
        for (int64_t y = 0; y < px; ++y) {
            uint8_t *__restrict to = out + (c * px + y) * px;
            const int32_t *from = result[y];
            if (mirrored)
                for (int64_t x = 0; x < px; ++x) to[x] = from[px - 1 - x] >> 8 * c;
            else
                for (int64_t x = 0; x < px; ++x) to[x] = from[x] >> 8 * c;
        }
}

void normfree_resample(const void *pixels, int64_t width, int64_t height, int32_t channels, float left,
                       float upper, float right, float lower, int64_t px, int32_t columns_first,
                       int32_t mirrored, uint8_t *out) {
    const float box[4] = {left, upper, right, lower};
    if (channels == 1)
        resample<1>(static_cast<const uint8_t *>(pixels), width, height, box, px, columns_first, mirrored, out);
    else
        resample<3>(static_cast<const int32_t *>(pixels), width, height, box, px, columns_first, mirrored, out);
}
