// GELU, weight standardization and gates with their gradients, in one pass through memory where PyTorch needs several.

#include "gelu.h"
#include "kernels.h"

#include <cmath>

template <Vec function(Vec, Vec)>
static void map(const float *x, const float *dy, float *out, int64_t n, int32_t threads) {
#pragma omp parallel for num_threads(threads) if (n > 16384)
    for (int64_t begin = 0; begin < n; begin += 4096) {
        const int64_t end = std::min(begin + 4096, n);
        int64_t i = begin;
        for (; i + LANES <= end; i += LANES) store(out + i, function(load(x + i), load(dy + i)));
        if (i < end) {
            float a[LANES] = {}, b[LANES] = {};
            std::copy(x + i, x + end, a);
            std::copy(dy + i, dy + end, b);
            store(a, function(load(a), load(b)));
            std::copy(a, a + (end - i), out + i);
        }
    }
}

void normfree_gelu(const float *x, float *y, int64_t n, int32_t threads) {
    map<gelu>(x, x, y, n, threads);
}

void normfree_gelu_gradient(const float *x, const float *dy, float *dx, int64_t n, int32_t threads) {
    map<gelu_gradient>(x, dy, dx, n, threads);
}

// Sum of f(i) over i: blocks in float lanes, their sum in double.
template <typename F>
static double total(int64_t n, F f) {
    double sum = 0;
    for (int64_t i = 0; i < n; i += 1024) {
        const int64_t end = std::min(i + 1024, n);
        float part = 0;
#pragma omp simd reduction(+ : part)
        for (int64_t j = i; j < end; ++j) part += f(j);
        sum += part;
    }
    return sum;
}

void normfree_standardize(const float *w, const float *gain, float scale, float share, float floor,
                          float eps, int64_t rows, int64_t n, float *out, float *mean, float *r,
                          float *slope, int32_t threads) {
#pragma omp parallel for num_threads(threads) if (rows * n > 16384)
    for (int64_t i = 0; i < rows; ++i) {
        const float *__restrict row = w + i * n;
        float *__restrict to = out + i * n;
        const float m = mean[i] = static_cast<float>(total(n, [=](int64_t j) { return row[j]; }) / n);
        const double square = share * total(n, [=](int64_t j) { return (row[j] - m) * (row[j] - m); });
        const double root = 1 / std::sqrt(std::max(square, static_cast<double>(floor)) + eps);
        r[i] = static_cast<float>(root);
        slope[i] = square < floor ? 0.0f : static_cast<float>(share * root * root * root);
        const float factor = static_cast<float>(root) * gain[i] * scale;
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) to[j] = (row[j] - m) * factor;
    }
}

void normfree_standardize_gradient(const float *w, const float *gain, float scale, const float *mean,
                                   const float *r, const float *slope, const float *dout, int64_t rows,
                                   int64_t n, float *dw, float *dgain, int32_t threads) {
#pragma omp parallel for num_threads(threads) if (rows * n > 16384)
    for (int64_t i = 0; i < rows; ++i) {
        const float *__restrict row = w + i * n, *__restrict d = dout + i * n;
        float *__restrict to = dw + i * n;
        const float m = mean[i];
        const double dot = total(n, [=](int64_t j) { return d[j] * (row[j] - m); });
        const float middle = static_cast<float>(total(n, [=](int64_t j) { return d[j]; }) / n);
        const float along = gain[i] * scale * r[i], back = static_cast<float>(gain[i] * scale * slope[i] * dot);
        dgain[i] = static_cast<float>(scale * r[i] * dot);
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) to[j] = along * (d[j] - middle) - back * (row[j] - m);
    }
}

void normfree_gate_gradient(const float *dy, const float *x, const float *gate, float *dx, float *dgate,
                            int64_t images, int64_t pixels, int64_t channels, int32_t threads) {
    constexpr int64_t CHANNELS = 256, PIXELS = 64;  // partial sums of PIXELS pixels, for CHANNELS channels at a time
#pragma omp parallel for collapse(2) num_threads(threads) if (images * pixels * channels > 16384)
    for (int64_t image = 0; image < images; ++image)
        for (int64_t first = 0; first < channels; first += CHANNELS) {
            const int64_t wide = std::min(CHANNELS, channels - first);
            const float *__restrict factor = gate + image * channels + first;
            float sums[CHANNELS] = {};
            for (int64_t begin = 0; begin < pixels; begin += PIXELS) {
                float part[CHANNELS] = {};
                for (int64_t pixel = begin; pixel < std::min(begin + PIXELS, pixels); ++pixel) {
                    const int64_t at = (image * pixels + pixel) * channels + first;
                    const float *__restrict d = dy + at, *__restrict from = x + at;
                    float *__restrict to = dx + at;
#pragma omp simd
                    for (int64_t j = 0; j < wide; ++j) {
                        part[j] += d[j] * from[j];
                        to[j] = d[j] * factor[j];
                    }
                }
                for (int64_t j = 0; j < wide; ++j) sums[j] += part[j];
            }
            std::copy(sums, sums + wide, dgate + image * channels + first);
        }
}
