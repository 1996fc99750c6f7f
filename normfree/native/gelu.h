// GELU of a vector, in the tanh form of the released networks, and its gradient.

#pragma once

#include "vector.h"

// sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)), which GELU multiplies x by; to two units of the last place
static inline Vec gelu_gate(Vec x) {
    const Vec z = x * (x * x * -0.0713548162726f - 1.5957691216057308f);  // exp(z) = 2^n e^r
    const Vec top = z > 88.0f ? Vec{} + 88.0f : z, t = top < -87.0f ? Vec{} - 87.0f : top;
    const Vec shifted = t * 1.4426950408889634f + 12582912.0f, n = shifted - 12582912.0f;  // n is rounded
    const Vec r = t - n * 0.693145751953125f - n * 1.428606765330187e-6f;
    Vec p = r * (1.0f / 720) + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const Vec e = (Vec)((Ints)p + ((Ints)shifted << 23));  // n into the exponent
    return 1.0f / (1.0f + e);
}

static inline Vec gelu(Vec x, Vec) { return x * gelu_gate(x); }

static inline Vec gelu_gradient(Vec x, Vec dy) {
    const Vec gate = gelu_gate(x);
    return dy * gate * (1.0f + x * (1.0f - gate) * (x * x * 0.2140644488178f + 1.5957691216057308f));
}

// Copies n numbers, a multiple of LANES, or GELU of them.
static inline void copy(const float *from, int64_t n, bool apply_gelu, float *to) {
    if (!apply_gelu) std::memcpy(to, from, n * sizeof *to);
    else for (int64_t i = 0; i < n; i += LANES) store(to + i, gelu(load(from + i), Vec{}));
}
