// One pass over parameters: adaptive gradient clipping, weight decay, momentum, update and moving average.
//
// A unit (a filter, a row or a whole vector) is read for its norms and again for its update, when it is in the cache:
// every array moves through memory once. optim/agc.py and optim/sgd.py have the arithmetic.

#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

using Item = normfree_item;

static double wide_squares(const float *a, int64_t begin, int64_t end) {
    double sum = 0;
    for (int64_t j = begin; j < end; ++j) sum += static_cast<double>(a[j]) * a[j];
    return sum;
}

// Sums of squares of two arrays: blocks in float lanes, their sum in double, as are blocks that overflow float.
static std::pair<double, double> squares(const float *a, const float *b, int64_t n) {
    double sum_a = 0, sum_b = 0;
    for (int64_t i = 0; i < n; i += 1024) {
        const int64_t end = std::min(i + 1024, n);
        float x = 0, y = 0;
#pragma omp simd reduction(+ : x, y)
        for (int64_t j = i; j < end; ++j) {
            x += a[j] * a[j];
            y += b[j] * b[j];
        }
        sum_a += std::isfinite(x) ? x : wide_squares(a, i, end);
        sum_b += std::isfinite(y) ? y : wide_squares(b, i, end);
    }
    return {sum_a, sum_b};
}

// The maximum; NaN as soon as a value is NaN.
static void keep_largest(double &largest, double value) {
    if (std::isnan(value) || value > largest) largest = value;
}

template <bool nesterov, bool average>
static void update(const Item &t, float factor, int64_t begin, int64_t end) {
    float *__restrict p = t.p, *__restrict m = t.m, *__restrict e = t.e;
    const float *__restrict g = t.g;
    const float lr = t.lr, momentum = t.momentum, decay = t.decay, blend = t.blend;
#pragma omp simd
    for (int64_t j = begin; j < end; ++j) {
        const float d = g[j] * factor + decay * p[j];
        const float v = momentum * m[j] + d;
        m[j] = v;
        const float q = p[j] - lr * (nesterov ? d + momentum * v : v);
        p[j] = q;
        if (average) e[j] += blend * (q - e[j]);
    }
}

void normfree_sweep(Item *items, int64_t count, int32_t threads) {
    struct Task {
        int64_t item, begin, end;
    };
    std::vector<Task> tasks;
    for (int64_t i = 0; i < count; ++i) {
        const Item &t = items[i];
        const int64_t step = t.unit * std::max<int64_t>(1, 16384 / t.unit);
        for (int64_t begin = 0; begin < t.numel; begin += step)
            tasks.push_back({i, begin, std::min(begin + step, t.numel)});
        items[i].clipped = items[i].ratio = 0;
    }
    const int64_t num_tasks = static_cast<int64_t>(tasks.size());
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t k = 0; k < num_tasks; ++k) {
        Item &t = items[tasks[k].item];
        double clipped = 0, largest = 0;
        for (int64_t begin = tasks[k].begin; begin < tasks[k].end; begin += t.unit) {
            const int64_t end = std::min(begin + t.unit, tasks[k].end);
            float factor = 1;
            if (t.clipping > 0) {
                const auto sums = squares(t.p + begin, t.g + begin, end - begin);
                const double weight = std::max(std::sqrt(sums.first), static_cast<double>(t.eps));
                const double grad = std::sqrt(sums.second), limit = weight * t.clipping;
                if (grad > limit && std::isfinite(grad)) {
                    factor = static_cast<float>(limit / std::max(grad, 1e-6));
                    clipped += 1;
                }
                keep_largest(largest, grad / weight);
            }
            if (t.m == nullptr) {
                if (factor != 1)
                    for (int64_t j = begin; j < end; ++j) t.g[j] *= factor;
            } else if (t.nesterov) {
                t.e ? update<true, true>(t, factor, begin, end) : update<true, false>(t, factor, begin, end);
            } else {
                t.e ? update<false, true>(t, factor, begin, end) : update<false, false>(t, factor, begin, end);
            }
        }
#pragma omp critical
        {
            t.clipped += clipped;
            keep_largest(t.ratio, largest);
        }
    }
}
