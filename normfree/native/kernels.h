// What the kernels take: the only declaration of each. The .cpp files include it, and native/__init__.py makes the
// ctypes signatures from it, so a declaration has no comment inside and no types but pointers, int64_t, int32_t, float.
//
// Arrays are float32, dense, of the shapes given here: (a, b) has index i * b + j. Feature maps are channels-last, so
// (pixels, channels) with pixels = images * height * width. Outputs need not be initialised. "or null" marks arrays
// that may be left out. `threads` is the number of OpenMP threads; results do not depend on it.

#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// --- pointwise.cpp ---

// y = GELU(x), both (n), with the tanh.
void normfree_gelu(const float *x, float *y, int64_t n, int32_t threads);

// dx = dy * GELU'(x), all (n).
void normfree_gelu_gradient(const float *x, const float *dy, float *dx, int64_t n, int32_t threads);

// Weight standardization, for w and out (rows, n) and gain, mean, r, slope (rows): out = (w - mean) r gain scale with
// r = 1 / sqrt(max(share |w - mean|^2, floor) + eps). slope = -dr/d|w - mean| / |w - mean|, which is share r^3, and 0
// where the floor holds.
void normfree_standardize(const float *w, const float *gain, float scale, float share, float floor, float eps,
                          int64_t rows, int64_t n, float *out, float *mean, float *r, float *slope, int32_t threads);

// Its gradients dw (rows, n) and dgain (rows), from mean, r and slope, and dout, the gradient of out.
void normfree_standardize_gradient(const float *w, const float *gain, float scale, const float *mean, const float *r,
                                   const float *slope, const float *dout, int64_t rows, int64_t n, float *dw,
                                   float *dgain, int32_t threads);

// The gradients of y = shortcut + x * gate, for dy, x, dx (images, pixels, channels) and gate, dgate (images,
// channels), where `pixels` are those of one image: dx = dy * gate, dgate = the sum of dy * x over pixels.
void normfree_gate_gradient(const float *dy, const float *x, const float *gate, float *dx, float *dgate, int64_t images,
                            int64_t pixels, int64_t channels, int32_t threads);

// --- conv1x1.cpp: stride 1, no padding, one group; `in` and `out` are multiples of 16 ---

// y (pixels, out) = x (pixels, in) w' + bias (out, or null), with w (out, in). `apply_gelu`: of GELU(x) instead of x.
// `transposed`: w is (in, out), which makes the gradient of the input from x, that of the output.
// pre_activation (pixels, out, or null): y is multiplied by GELU'(pre_activation).
void normfree_conv1x1(const float *x, const float *w, const float *bias, const float *pre_activation, float *y,
                      int64_t pixels, int64_t in, int64_t out, int32_t apply_gelu, int32_t transposed,
                      int32_t threads);

// dw (out, in) and dbias (out, or null) from x (pixels, in), or with `apply_gelu` GELU(x), and dy (pixels, out).
void normfree_conv1x1_filter_gradient(const float *x, const float *dy, float *dw, float *dbias, int64_t pixels,
                                      int64_t in, int64_t out, int32_t apply_gelu, int32_t threads);

// --- winograd.cpp: 3x3, stride 1 or 2; `in` and `out`, the channels of one group, are multiples of 16 ---

// y (images, out_height, out_width, groups * out) from x (images, height, width, groups * in), w (groups * out, 3, 3,
// in) and bias (groups * out, or null), with `top` and `left` rows and columns of zeros before x.
// `transposed`: x, the gradient of the input, is the output, from y, the gradient of the output, and w, without bias.
// pre_activation (as x, or null): then x is multiplied by GELU'(pre_activation).
void normfree_winograd(float *x, const float *w, const float *bias, const float *pre_activation, float *y,
                       int64_t images, int64_t height, int64_t width, int64_t out_height, int64_t out_width,
                       int64_t groups, int64_t in, int64_t out, int64_t stride, int64_t top, int64_t left,
                       int32_t transposed, int32_t threads);

// dw (groups * out, 3, 3, in) and dbias (groups * out, or null) from x and dy, which has the shape of y above.
void normfree_winograd_filter_gradient(const float *x, const float *dy, float *dw, float *dbias, int64_t images,
                                       int64_t height, int64_t width, int64_t out_height, int64_t out_width,
                                       int64_t groups, int64_t in, int64_t out, int64_t stride, int64_t top,
                                       int64_t left, int32_t threads);

// --- sweep.cpp ---

// A parameter and its update. numpy's ITEM in optim/sweep.py has the same fields in the same order.
typedef struct {
    float *p, *g, *m, *e;     // parameter, gradient; momentum, and the moving average of p, or null
    int64_t numel, unit;      // elements, and elements of one unit of AGC
    float clipping, eps;      // lambda (0: not clipped) and epsilon of AGC
    float lr, momentum, decay;  // decay: of the weights
    float blend;              // share of the new parameter in the average
    int32_t nesterov, pad;
    double clipped, ratio;    // results: units that were clipped, largest ratio of norms
} normfree_item;

// AGC, weight decay, momentum, update and moving average of `count` parameters; without momentum AGC alone, on g.
void normfree_sweep(normfree_item *items, int64_t count, int32_t threads);

// --- resample.cpp ---

// out (channels, px, px), bytes, from the box (left, upper, right, lower), in pixels, of an image (height, width) with
// one byte a pixel (1 channel) or four (3 channels). `columns_first`: of the two passes; `mirrored`: left to right.
void normfree_resample(const void *pixels, int64_t width, int64_t height, int32_t channels, float left, float upper,
                       float right, float lower, int64_t px, int32_t columns_first, int32_t mirrored, uint8_t *out);

#ifdef __cplusplus
}
#endif
