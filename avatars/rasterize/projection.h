// From Gaussians to splats and from the gradients of splats to those of Gaussians, V Gaussians at once.
#pragma once

#include "lists.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

// ---------------------------------------------------------------------------------------------- preparation

bool not_finite(const float* values, int64_t count) {
    uint32_t bad = 0;
    for (int64_t i = 0; i < count; ++i) {
        uint32_t word;
        std::memcpy(&word, values + i, 4);
        bad |= (word & 0x7f800000u) == 0x7f800000u;
    }
    return bad != 0;
}

// Bit i is set when check i of common.py fails for Gaussians [begin, end).
uint32_t check(const Input& in, int64_t begin, int64_t end, int64_t color_stride) {
    const int64_t n = end - begin;
    uint32_t wrong = 0;
    wrong |= not_finite(in.means + 3 * begin, 3 * n) << 0;
    wrong |= not_finite(in.quats + 4 * begin, 4 * n) << 1;
    wrong |= not_finite(in.scales + 3 * begin, 3 * n) << 2;
    wrong |= not_finite(in.opacities + begin, n) << 3;
    wrong |= not_finite(in.colors + color_stride * begin, color_stride * n) << 4;
    bool zero = false, negative = false, outside = false;
    for (int64_t i = begin; i < end; ++i) {
        const float* q = in.quats + 4 * i;
        zero |= (q[0] == 0) & (q[1] == 0) & (q[2] == 0) & (q[3] == 0);
    }
    for (int64_t i = 3 * begin; i < 3 * end; ++i) negative |= in.scales[i] < 0;
    for (int64_t i = begin; i < end; ++i) outside |= !(in.opacities[i] >= 0) | !(in.opacities[i] <= 1);
    return wrong | zero << 5 | negative << 6 | outside << 7;
}

// V consecutive elements of an array of `stride` floats an element, one row a component. The last element is
// repeated past the end.
template <int STRIDE>
void gather(const float* source, int64_t begin, int64_t count, F* rows) {
    alignas(64) float lanes[STRIDE][V];
    for (int lane = 0; lane < V; ++lane) {
        const float* p = source + STRIDE * std::min(begin + lane, count - 1);
        for (int c = 0; c < STRIDE; ++c) lanes[c][lane] = p[c];
    }
    for (int c = 0; c < STRIDE; ++c) rows[c] = load(lanes[c]);
}

template <int STRIDE>
void scatter(const F* rows, int64_t begin, int64_t count, float* target) {
    alignas(64) float lanes[STRIDE][V];
    for (int c = 0; c < STRIDE; ++c) store(lanes[c], rows[c]);
    const int end = static_cast<int>(std::min<int64_t>(V, count - begin));
    for (int lane = 0; lane < end; ++lane)
        for (int c = 0; c < STRIDE; ++c) target[STRIDE * (begin + lane) + c] = lanes[c][lane];
}

void rotation_of(const F (&q)[4], F (&R)[9]) {  // of a unit quaternion wxyz
    const F w = q[0], x = q[1], y = q[2], z = q[3];
    R[0] = 1.0f - 2.0f * (y * y + z * z);
    R[1] = 2.0f * (x * y - w * z);
    R[2] = 2.0f * (x * z + w * y);
    R[3] = 2.0f * (x * y + w * z);
    R[4] = 1.0f - 2.0f * (x * x + z * z);
    R[5] = 2.0f * (y * z - w * x);
    R[6] = 2.0f * (x * z - w * y);
    R[7] = 2.0f * (y * z + w * x);
    R[8] = 1.0f - 2.0f * (x * x + y * y);
}

// Unit quaternions and 1 / length. The largest component is divided out first, so no square overflows.
F normalize(F (&q)[4]) {
    F largest = splat(0.0f);
    for (auto& c : q) largest = max(largest, max(c, -c));
    const F inverse_largest = 1.0f / largest;
    F sum = splat(0.0f);
    for (auto& c : q) {
        c *= inverse_largest;
        sum += c * c;
    }
    const F inverse = 1.0f / sqrt(sum);
    for (auto& c : q) c *= inverse;
    return inverse * inverse_largest;
}

void prepare(Lists& lists, const Input& in, int64_t begin) {
    const int64_t n = lists.count;
    float* soa = lists.soa.data() + begin;
    const int64_t stride = lists.padded;
    F mean[3], q[4], s[3], R[9];
    gather<3>(in.means, begin, n, mean);
    gather<4>(in.quats, begin, n, q);
    gather<3>(in.scales, begin, n, s);
    F opacity;
    gather<1>(in.opacities, begin, n, &opacity);
    normalize(q);
    rotation_of(q, R);
    for (int c = 0; c < 3; ++c) store(soa + (MX + c) * stride, mean[c]);
    for (int i = 0; i < 9; ++i) store(soa + (M00 + i) * stride, R[i] * s[i % 3]);
    store(soa + OPACITY * stride, opacity);
    store(soa + LOG2_OPACITY * stride, log2(opacity));
}

// ---------------------------------------------------------------------------------------------- forward

void set_camera(Camera& camera, const float* K, const float* pose, const float* center, int height, int width) {
    for (int i = 0; i < 3; ++i) {
        for (int j = 0; j < 3; ++j) camera.R[3 * i + j] = pose[4 * i + j];
        camera.t[i] = pose[4 * i + 3];
        camera.center[i] = center[i];
    }
    camera.fx = K[0];
    camera.fy = K[4];
    camera.cx = K[2];
    camera.cy = K[5];
    const float margin_x = 0.3f * 0.5f * width / camera.fx, margin_y = 0.3f * 0.5f * height / camera.fy;
    camera.x_low = -camera.cx / camera.fx - margin_x;
    camera.x_high = (width - camera.cx) / camera.fx + margin_x;
    camera.y_low = -camera.cy / camera.fy - margin_y;
    camera.y_high = (height - camera.cy) / camera.fy + margin_y;
}

struct Projected {
    M valid;
    F x, y, z, rz, tx, ty;          // camera point, 1/z, clamped x/z and y/z
    F U[9], A[3], B[3];             // camera axes, and the two rows of Jacobian x axes
    F cxx, cxy, cyy, det0, det;     // blurred covariance, determinants before and after the blur
    F opacity, lo;
};

inline F dot(const F (&a)[3], const F (&b)[3]) { return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]; }

inline void project(const Lists& lists, const Camera& camera, int64_t begin, Projected& p) {
    const float* soa = lists.soa.data() + begin;
    const int64_t stride = lists.padded;
    const auto field = [&](int f) { return load(soa + f * stride); };
    const F mx = field(MX), my = field(MY), mz = field(MZ);
    const float* R = camera.R;
    p.x = R[0] * mx + R[1] * my + R[2] * mz + camera.t[0];
    p.y = R[3] * mx + R[4] * my + R[5] * mz + camera.t[1];
    p.z = R[6] * mx + R[7] * my + R[8] * mz + camera.t[2];
    p.opacity = field(OPACITY);
    p.valid = both(both(ge(p.z, splat(NEAR)), ge(splat(FAR), p.z)), ge(p.opacity, splat(ALPHA_MIN)));
    if (!any(p.valid)) return;
    for (int j = 0; j < 3; ++j) {
        const F m0 = field(M00 + j), m1 = field(M10 + j), m2 = field(M20 + j);
        for (int i = 0; i < 3; ++i) p.U[3 * i + j] = R[3 * i] * m0 + R[3 * i + 1] * m1 + R[3 * i + 2] * m2;
    }
    p.rz = 1.0f / p.z;
    p.tx = min(max(p.x * p.rz, splat(camera.x_low)), splat(camera.x_high));
    p.ty = min(max(p.y * p.rz, splat(camera.y_low)), splat(camera.y_high));
    const F jx = camera.fx * p.rz, jy = camera.fy * p.rz;
    for (int j = 0; j < 3; ++j) {
        p.A[j] = jx * (p.U[j] - p.tx * p.U[6 + j]);
        p.B[j] = jy * (p.U[3 + j] - p.ty * p.U[6 + j]);
    }
    const F xx = dot(p.A, p.A), yy = dot(p.B, p.B);
    p.cxy = dot(p.A, p.B);
    // |A x B|² is the determinant before the blur, free of the cancellation in xx * yy - xy²
    const F n0 = p.A[1] * p.B[2] - p.A[2] * p.B[1];
    const F n1 = p.A[2] * p.B[0] - p.A[0] * p.B[2];
    const F n2 = p.A[0] * p.B[1] - p.A[1] * p.B[0];
    p.det0 = n0 * n0 + n1 * n1 + n2 * n2;
    p.det = p.det0 + EPS_2D * (xx + yy) + EPS_2D * EPS_2D;
    p.cxx = xx + EPS_2D;
    p.cyy = yy + EPS_2D;
    p.lo = field(LOG2_OPACITY);
    if (lists.antialiased) {
        const F ratio = p.det0 / p.det;
        p.opacity *= sqrt(ratio);
        p.lo += 0.5f * log2(ratio);
        p.valid = both(p.valid, ge(p.opacity, splat(ALPHA_MIN)));
    }
}

constexpr float SH_0 = 0.28209479f, SH_1 = 0.48860251f, SH_2 = 1.09254843f, SH_20 = 0.31539157f;
constexpr float SH_22 = 0.54627421f, SH_3 = 0.59004359f, SH_31 = 0.45704580f, SH_32 = 2.89061144f;
constexpr float SH_30 = 0.37317633f, SH_34 = 1.44530572f;

void sh_basis(int count, float x, float y, float z, float* basis) {
    basis[0] = SH_0;
    if (count < 4) return;
    basis[1] = -SH_1 * y;
    basis[2] = SH_1 * z;
    basis[3] = -SH_1 * x;
    if (count < 9) return;
    basis[4] = SH_2 * x * y;
    basis[5] = -SH_2 * y * z;
    basis[6] = SH_20 * (3 * z * z - 1);
    basis[7] = -SH_2 * x * z;
    basis[8] = SH_22 * (x * x - y * y);
    if (count < 16) return;
    basis[9] = -SH_3 * y * (3 * x * x - y * y);
    basis[10] = SH_32 * x * y * z;
    basis[11] = -SH_31 * y * (5 * z * z - 1);
    basis[12] = SH_30 * z * (5 * z * z - 3);
    basis[13] = -SH_31 * x * (5 * z * z - 1);
    basis[14] = SH_34 * z * (x * x - y * y);
    basis[15] = -SH_3 * x * (x * x - 3 * y * y);
}

// Gradient of sum_k weight[k] basis[k] in the direction.
void sh_gradient(int count, float x, float y, float z, const float* w, float* g) {
    g[0] = g[1] = g[2] = 0;
    if (count < 4) return;
    g[0] -= SH_1 * w[3];
    g[1] -= SH_1 * w[1];
    g[2] += SH_1 * w[2];
    if (count < 9) return;
    g[0] += SH_2 * (y * w[4] - z * w[7]) + 2 * SH_22 * x * w[8];
    g[1] += SH_2 * (x * w[4] - z * w[5]) - 2 * SH_22 * y * w[8];
    g[2] += -SH_2 * (y * w[5] + x * w[7]) + 6 * SH_20 * z * w[6];
    if (count < 16) return;
    g[0] += -6 * SH_3 * x * y * w[9] + SH_32 * y * z * w[10] - SH_31 * (5 * z * z - 1) * w[13] +
            2 * SH_34 * x * z * w[14] - 3 * SH_3 * (x * x - y * y) * w[15];
    g[1] += -3 * SH_3 * (x * x - y * y) * w[9] + SH_32 * x * z * w[10] - SH_31 * (5 * z * z - 1) * w[11] -
            2 * SH_34 * y * z * w[14] + 6 * SH_3 * x * y * w[15];
    g[2] += SH_32 * x * y * w[10] - 10 * SH_31 * y * z * w[11] + SH_30 * (15 * z * z - 3) * w[12] -
            10 * SH_31 * x * z * w[13] + SH_34 * (x * x - y * y) * w[14];
}

struct Direction {
    float x, y, z, inverse_length;
};

Direction direction_to(const float* mean, const float* center) {
    const float x = mean[0] - center[0], y = mean[1] - center[1], z = mean[2] - center[2];
    const float inverse = 1.0f / std::sqrt(x * x + y * y + z * z);
    return {x * inverse, y * inverse, z * inverse, inverse};
}

void color_of(const Lists& lists, const Input& in, const Camera& camera, uint32_t index, float* rgb) {
    if (!lists.sh) {
        std::memcpy(rgb, in.colors + 3 * static_cast<int64_t>(index), 12);
        return;
    }
    const Direction d = direction_to(in.means + 3 * static_cast<int64_t>(index), camera.center);
    const float* coefficients = in.colors + 3 * static_cast<int64_t>(lists.sh) * index;
    float basis[16];
    sh_basis(lists.sh, d.x, d.y, d.z, basis);
    rgb[0] = rgb[1] = rgb[2] = 0.5f;
    for (int k = 0; k < lists.sh; ++k)
        for (int c = 0; c < 3; ++c) rgb[c] += basis[k] * coefficients[3 * k + c];
    for (int c = 0; c < 3; ++c) rgb[c] = std::max(rgb[c], 0.0f);
}

// Projects one chunk for one camera and appends what can be seen to the chunk's part of `found`.
void project_chunk(Lists& lists, const Input& in, int c, int64_t chunk, int32_t* radii) {
    const Camera& camera = lists.camera[c];
    const int64_t n = lists.count, begin = chunk * CHUNK, end = std::min<int64_t>(begin + CHUNK, n);
    Splat* found = lists.found.data() + c * static_cast<int64_t>(lists.padded) + begin;
    Key* keys = lists.keys_2.data() + c * static_cast<int64_t>(lists.padded) + begin;
    uint32_t count = 0;
    for (int64_t group = begin; group < end; group += V) {
        const int lanes = static_cast<int>(std::min<int64_t>(V, n - group));
        Projected p{};
        project(lists, camera, group, p);
        int32_t* group_radii = radii + 2 * (c * n + group);
        if (!any(p.valid)) {
            std::memset(group_radii, 0, lanes * 8);
            continue;
        }
        const F x = camera.fx * (p.x * p.rz) + camera.cx, y = camera.fy * (p.y * p.rz) + camera.cy;
        const F extent = min(splat(EXTENT_MAX_SQUARED), TWO_LN_2 * (p.lo - LOG2_ALPHA_MIN));
        const F reach = sqrt(max(extent, splat(0.0f)));
        const F rx = reach * sqrt(p.cxx), ry = reach * sqrt(p.cyy);
        const F exact = sqrt(max(TWO_LN_2 * (p.lo - LOG2_ALPHA_MIN), splat(0.0f)));
        alignas(64) float lane[11][V];
        store(lane[0], x);
        store(lane[1], y);
        store(lane[2], p.cxy / p.cyy);
        store(lane[3], HALF_LOG2_E * p.cyy / p.det);
        store(lane[4], HALF_LOG2_E / p.cyy);
        store(lane[5], p.lo);
        store(lane[6], p.z);
        store(lane[7], exact * sqrt(p.cxx));
        store(lane[8], rx);
        store(lane[9], ry);
        store(lane[10], exact * sqrt(p.cyy));
        const M sane = both(gt(rx, splat(0.0f)), both(gt(splat(1e18f), p.det), gt(splat(1e9f), rx + ry)));
        int seen = bits(both(p.valid, sane));
        for (int l = 0; l < lanes; ++l) {
            const float radius_x = std::ceil(lane[8][l]), radius_y = std::ceil(lane[9][l]);
            const bool in_picture = (seen >> l & 1) && lane[0][l] + radius_x > 0 &&
                                    lane[0][l] - radius_x < lists.width && lane[1][l] + radius_y > 0 &&
                                    lane[1][l] - radius_y < lists.height;
            group_radii[2 * l] = in_picture ? static_cast<int32_t>(radius_x) : 0;
            group_radii[2 * l + 1] = in_picture ? static_cast<int32_t>(radius_y) : 0;
            if (!in_picture) continue;
            Splat& s = found[count];
            std::memcpy(&keys[count].depth, &lane[6][l], 4);
            keys[count].position = static_cast<uint32_t>(begin + count);
            ++count;
            s = {lane[0][l], lane[1][l], lane[2][l], lane[3][l], lane[4][l], lane[5][l], lane[7][l], lane[10][l],
                 0, 0, 0, lane[6][l], 0, static_cast<uint32_t>(group + l), 0};
            s.slack = 2e-3f + 1e-6f * (std::abs(s.x) + std::abs(s.y) + s.half_x + s.half_y);
            color_of(lists, in, camera, s.index, &s.r);
        }
    }
    lists.chunk_count[c * ((lists.padded + CHUNK - 1) / CHUNK) + chunk] = count;
}

// ---------------------------------------------------------------------------------------------- backward

// Adds camera c's part of the gradients of Gaussians [begin, begin + V) to `gradient` (and SH to `v_colors`).
void project_gradient(const Lists& lists, const Input& in, int c, int64_t begin, const float* sums, float* gradient,
                      float* v_colors) {
    const int64_t stride = lists.padded;
    const uint32_t* slot_begin = lists.slot_begin.data() + c * (stride + 1) + begin;
    if (slot_begin[0] == slot_begin[V]) return;
    alignas(64) float lane[10][V];
    bool touched = false;
    for (int l = 0; l < V; ++l) {
        alignas(64) float total[SUMS] = {};
        for (uint32_t slot = slot_begin[l]; slot < slot_begin[l + 1]; ++slot)
            for (int i = 0; i < SUMS; i += V)
                store(total + i, load(total + i) + load(sums + SUMS * static_cast<int64_t>(slot) + i));
        for (int i = 0; i < 10; ++i) {
            lane[i][l] = total[SUM_LANE[i]];
            touched |= lane[i][l] != 0;
        }
    }
    if (!touched) return;

    const Camera& camera = lists.camera[c];
    const auto add = [&](int field, F value) {
        float* p = gradient + field * stride + begin;
        store(p, load(p) + value);
    };
    const int v_color = FIELDS;
    alignas(64) float v_mean_sh[3][V] = {};
    if (!lists.sh) {
        for (int i = 0; i < 3; ++i) add(v_color + i, load(lane[WR + i]));
    } else {
        for (int l = 0; l < V; ++l) {
            if (slot_begin[l] == slot_begin[l + 1]) continue;
            const int64_t index = begin + l;
            const Direction d = direction_to(in.means + 3 * index, camera.center);
            const float* coefficients = in.colors + 3 * lists.sh * index;
            float* v_coefficients = v_colors + 3 * lists.sh * index;
            float basis[16], weight[16], g[3], rgb[3] = {0.5f, 0.5f, 0.5f};
            sh_basis(lists.sh, d.x, d.y, d.z, basis);
            for (int k = 0; k < lists.sh; ++k)
                for (int i = 0; i < 3; ++i) rgb[i] += basis[k] * coefficients[3 * k + i];
            const float v_rgb[3] = {rgb[0] > 0 ? lane[WR][l] : 0, rgb[1] > 0 ? lane[WG][l] : 0,
                                    rgb[2] > 0 ? lane[WB][l] : 0};
            for (int k = 0; k < lists.sh; ++k) {
                weight[k] = 0;
                for (int i = 0; i < 3; ++i) {
                    v_coefficients[3 * k + i] += basis[k] * v_rgb[i];
                    weight[k] += coefficients[3 * k + i] * v_rgb[i];
                }
            }
            sh_gradient(lists.sh, d.x, d.y, d.z, weight, g);
            const float along = g[0] * d.x + g[1] * d.y + g[2] * d.z;
            v_mean_sh[0][l] = (g[0] - along * d.x) * d.inverse_length;
            v_mean_sh[1][l] = (g[1] - along * d.y) * d.inverse_length;
            v_mean_sh[2][l] = (g[2] - along * d.z) * d.inverse_length;
        }
    }

    Projected p{};
    project(lists, camera, begin, p);
    alignas(64) int32_t slots[V];
    for (int l = 0; l < V; ++l) slots[l] = static_cast<int32_t>(slot_begin[l + 1] - slot_begin[l]);
    const M valid = ge(load(slots), splat_int(1));  // the others may hold infinities

    // conic = (a, b, d): sigma = (a dx² + 2 b dx dy + d dy²) / 2, and conic (dx, dy) = (a t, b t + dy / cyy)
    const F a = p.cyy / p.det, b = -p.cxy / p.det, e = 1.0f / p.cyy;
    const F qt = load(lane[QT]), qy = load(lane[QY]);
    const F qtt = load(lane[QTT]), qty = load(lane[QTY]), qyy = load(lane[QYY]);
    const F v_x = -a * qt, v_y = -(b * qt + e * qy);
    F v_xx = -0.5f * a * a * qtt;
    F v_xy = -a * (b * qtt + e * qty);  // of both off-diagonal elements together
    F v_yy = -0.5f * (b * b * qtt + 2.0f * b * e * qty + e * e * qyy);
    F v_opacity = -load(lane[Q]) / p.opacity;
    F v_A[3], v_B[3];
    if (lists.antialiased) {
        const F original = load(lists.soa.data() + OPACITY * stride + begin);
        const F factor = sqrt(p.det0 / p.det);  // opacity = original * factor
        const F v_det0_part = v_opacity * original * 0.5f / (factor * p.det);
        const F n0 = p.A[1] * p.B[2] - p.A[2] * p.B[1];
        const F n1 = p.A[2] * p.B[0] - p.A[0] * p.B[2];
        const F n2 = p.A[0] * p.B[1] - p.A[1] * p.B[0];
        const F ratio = p.det0 / p.det;
        const F v_det0 = v_det0_part * (1.0f - ratio);
        v_xx -= v_det0_part * ratio * EPS_2D;
        v_yy -= v_det0_part * ratio * EPS_2D;
        v_A[0] = 2.0f * v_det0 * (p.B[1] * n2 - p.B[2] * n1);
        v_A[1] = 2.0f * v_det0 * (p.B[2] * n0 - p.B[0] * n2);
        v_A[2] = 2.0f * v_det0 * (p.B[0] * n1 - p.B[1] * n0);
        v_B[0] = 2.0f * v_det0 * (n1 * p.A[2] - n2 * p.A[1]);
        v_B[1] = 2.0f * v_det0 * (n2 * p.A[0] - n0 * p.A[2]);
        v_B[2] = 2.0f * v_det0 * (n0 * p.A[1] - n1 * p.A[0]);
        v_opacity *= factor;
    } else {
        for (int j = 0; j < 3; ++j) v_A[j] = v_B[j] = splat(0.0f);
    }
    for (int j = 0; j < 3; ++j) {
        v_A[j] += 2.0f * v_xx * p.A[j] + v_xy * p.B[j];
        v_B[j] += 2.0f * v_yy * p.B[j] + v_xy * p.A[j];
    }
    const F jx = camera.fx * p.rz, jy = camera.fy * p.rz;
    // A = jx (U0 - tx U2), B = jy (U1 - ty U2)
    F v_U[9], v_tx = splat(0.0f), v_ty = v_tx, v_rz = v_tx;
    for (int j = 0; j < 3; ++j) {
        v_U[j] = jx * v_A[j];
        v_U[3 + j] = jy * v_B[j];
        v_U[6 + j] = -p.tx * v_U[j] - p.ty * v_U[3 + j];
        v_tx -= v_U[j] * p.U[6 + j];
        v_ty -= v_U[3 + j] * p.U[6 + j];
        v_rz += (v_A[j] * p.A[j] + v_B[j] * p.B[j]) * p.z;
    }
    const F ux = p.x * p.rz, uy = p.y * p.rz;  // tx = clamp(ux), and the centre is at f u + c
    const M free_x = both(ge(ux, splat(camera.x_low)), ge(splat(camera.x_high), ux));
    const M free_y = both(ge(uy, splat(camera.y_low)), ge(splat(camera.y_high), uy));
    const F v_ux = camera.fx * v_x + keep(free_x, v_tx), v_uy = camera.fy * v_y + keep(free_y, v_ty);
    v_rz += v_ux * p.x + v_uy * p.y;
    const F v_cx = v_ux * p.rz, v_cy = v_uy * p.rz, v_cz = load(lane[WZ]) - v_rz * p.rz * p.rz;

    const float* R = camera.R;
    for (int j = 0; j < 3; ++j)
        add(MX + j, keep(valid, R[j] * v_cx + R[3 + j] * v_cy + R[6 + j] * v_cz + load(v_mean_sh[j])));
    for (int i = 0; i < 3; ++i)
        for (int j = 0; j < 3; ++j)
            add(M00 + 3 * i + j,
                keep(valid, R[i] * v_U[j] + R[3 + i] * v_U[3 + j] + R[6 + i] * v_U[6 + j]));
    add(OPACITY, keep(valid, v_opacity));
}

// From the gradient of the axes (rotation x scales) to quaternions and scales, and out of the rows.
void finish_gradient(const Lists& lists, const Input& in, int64_t begin, const float* gradient,
                     const InputGradient& out) {
    const int64_t stride = lists.padded, n = lists.count;
    const auto field = [&](int f) { return load(gradient + f * stride + begin); };
    F q[4], s[3], R[9], v_R[9], v_s[3], v_mean[3], v_rgb[3];
    gather<4>(in.quats, begin, n, q);
    gather<3>(in.scales, begin, n, s);
    const F inverse_length = normalize(q);
    rotation_of(q, R);
    for (int j = 0; j < 3; ++j) {
        v_mean[j] = field(MX + j);
        v_rgb[j] = field(FIELDS + j);
        v_s[j] = splat(0.0f);
        for (int i = 0; i < 3; ++i) {
            const F v = field(M00 + 3 * i + j);
            v_R[3 * i + j] = v * s[j];
            v_s[j] += v * R[3 * i + j];
        }
    }
    const F w = q[0], x = q[1], y = q[2], z = q[3];
    F v_q[4];
    v_q[0] = 2.0f * (x * (v_R[7] - v_R[5]) + y * (v_R[2] - v_R[6]) + z * (v_R[3] - v_R[1]));
    v_q[1] = 2.0f * (y * (v_R[1] + v_R[3]) + z * (v_R[2] + v_R[6]) + w * (v_R[7] - v_R[5]) -
                     2.0f * x * (v_R[4] + v_R[8]));
    v_q[2] = 2.0f * (x * (v_R[1] + v_R[3]) + z * (v_R[5] + v_R[7]) + w * (v_R[2] - v_R[6]) -
                     2.0f * y * (v_R[0] + v_R[8]));
    v_q[3] = 2.0f * (x * (v_R[2] + v_R[6]) + y * (v_R[5] + v_R[7]) + w * (v_R[3] - v_R[1]) -
                     2.0f * z * (v_R[0] + v_R[4]));
    const F along = v_q[0] * w + v_q[1] * x + v_q[2] * y + v_q[3] * z;
    for (int i = 0; i < 4; ++i) v_q[i] = (v_q[i] - along * q[i]) * inverse_length;
    scatter<3>(v_mean, begin, n, out.means);
    scatter<4>(v_q, begin, n, out.quats);
    scatter<3>(v_s, begin, n, out.scales);
    const F v_opacity = field(OPACITY);
    scatter<1>(&v_opacity, begin, n, out.opacities);
    if (!lists.sh) scatter<3>(v_rgb, begin, n, out.colors);
}

}  // namespace
