// Pixels: drawing a tile from its list, and the sums of gradients over a tile.
#pragma once

#include "lists.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

struct TileBox {
    int left, top, width, height;
    TileBox(const Lists& lists, int tile)
        : left(tile % lists.tiles_x * TILE), top(tile / lists.tiles_x * TILE),
          width(std::min(TILE, lists.width - left)), height(std::min(TILE, lists.height - top)) {}
    // Position of the middle of the tile.
    float x() const { return left + 0.5f * TILE; }
    float y() const { return top + 0.5f * TILE; }
};

// Calls copy(place in block order, y, x, pixels) for all strips of four pixels of a tile, or what of them is inside.
template <typename Copy>
inline void each_strip(const TileBox& box, const Copy& copy) {
    const auto visit = [&](int y, int x, int pixels) {
        copy((y / BLOCK_H * BLOCKS_X + x / BLOCK_W) * V + y % BLOCK_H * BLOCK_W, y, x, pixels);
    };
    if (box.width == TILE && box.height == TILE) {  // with constants the compiler unrolls it all
        for (int y = 0; y < TILE; ++y)
            for (int x = 0; x < TILE; x += BLOCK_W) visit(y, x, BLOCK_W);
        return;
    }
    for (int y = 0; y < box.height; ++y)
        for (int x = 0; x < box.width; x += BLOCK_W) visit(y, x, std::min(BLOCK_W, box.width - x));
}

inline void to_plane(const Lists& lists, const TileBox& box, const float* values, float* plane) {
    const int64_t stride = lists.width;
    plane += box.top * stride + box.left;
    each_strip(box, [=](int at, int y, int x, int n) {
        if (n == BLOCK_W)
            std::memcpy(plane + y * stride + x, values + at, 4 * BLOCK_W);
        else
            for (int i = 0; i < n; ++i) plane[y * stride + x + i] = values[at + i];
    });
}

inline void from_plane(const Lists& lists, const TileBox& box, const float* plane, float* values) {
    const int64_t stride = lists.width;
    plane += box.top * stride + box.left;
    if (box.width < TILE || box.height < TILE) std::fill_n(values, TILE_PIXELS, 0.0f);
    each_strip(box, [=](int at, int y, int x, int n) {
        if (n == BLOCK_W)
            std::memcpy(values + at, plane + y * stride + x, 4 * BLOCK_W);
        else
            for (int i = 0; i < n; ++i) values[at + i] = plane[y * stride + x + i];
    });
}

// Pixel centres of a tile's first block, and of the others relative to it; the middle of the tile is (0, 0).
struct Lanes {
    alignas(64) float x[V], y[V];
    float block_x[BLOCKS], block_y[BLOCKS];
    constexpr Lanes() : x(), y(), block_x(), block_y() {
        for (int l = 0; l < V; ++l) {
            x[l] = static_cast<float>(l % BLOCK_W) + 0.5f - 0.5f * TILE;
            y[l] = static_cast<float>(l / BLOCK_W) + 0.5f - 0.5f * TILE;
        }
        for (int b = 0; b < BLOCKS; ++b) {
            block_x[b] = static_cast<float>(b % BLOCKS_X * BLOCK_W);
            block_y[b] = static_cast<float>(b / BLOCKS_X * BLOCK_H);
        }
    }
};
constexpr Lanes LANES;

struct Block {  // pixel centres of one block
    F x, y;
    explicit Block(int b) : x(load(LANES.x) + LANES.block_x[b]), y(load(LANES.y) + LANES.block_y[b]) {}
};

// A part of a tile's entries: small enough that splats, lists and sums stay in the first cache.
struct Batch {
    int size;
    alignas(64) Splat splats[BATCH];          // centres relative to the middle of the tile
    alignas(64) float rows[8][BATCH];         // what find_blocks needs of them
    alignas(64) int32_t blocks[BATCH];        // bit b: block b may be lit
    int length[BLOCKS];
    alignas(64) int32_t list[BLOCKS][BATCH + V];  // the entries of each block

    void take(const Splat* all, const Entry* entries, int count, const TileBox& box) {
        size = count;
        for (int i = 0; i < count; ++i) __builtin_prefetch(all + entries[i].rank);
        for (int i = 0; i < count; ++i) {
            Splat s = all[entries[i].rank];
            s.x -= box.x();
            s.y -= box.y();
            splats[i] = s;
            rows[0][i] = s.x;
            rows[1][i] = s.y;
            rows[2][i] = s.slope;
            rows[3][i] = s.k;
            rows[4][i] = s.h;
            rows[5][i] = s.lo;
            rows[6][i] = s.half_x;
            rows[7][i] = s.half_y;
        }
    }

    // Blocks in which some pixel centre may lie inside each splat's ellipse, V splats at once.
    void find_blocks() {
        for (int i = 0; i < size; i += V) {
            const F x = load(rows[0] + i), y = load(rows[1] + i), slope = load(rows[2] + i);
            const F h = load(rows[4] + i), level = load(rows[5] + i) - LOG2_ALPHA_MIN;
            const F half_x = load(rows[6] + i), half_y = load(rows[7] + i);
            const F slack = 2e-3f + 1e-6f * (max(x, -x) + max(y, -y) + half_x + half_y);
            const F inverse_k = 1.0f / load(rows[3] + i), inverse_h = 1.0f / h;
            // dy of the rightmost point; the leftmost is opposite
            const F turn = half_x * (slope * inverse_h) / (inverse_k + slope * slope * inverse_h);
            I found = splat_int(0);
            for (int row = 0; row < TILE / BLOCK_H; ++row) {
                const F top = splat(row * BLOCK_H + 0.5f - 0.5f * TILE) - slack - y;
                const F bottom = splat(row * BLOCK_H + BLOCK_H - 0.5f - 0.5f * TILE) + slack - y;
                const F low = max(top, -half_y), high = min(bottom, half_y);
                const F at_right = max(low, min(turn, high)), at_left = max(low, min(-turn, high));
                const F right = x + slope * at_right +
                                sqrt(max(level - h * (at_right * at_right), splat(0.0f)) * inverse_k) + slack;
                const F left = x + slope * at_left -
                               sqrt(max(level - h * (at_left * at_left), splat(0.0f)) * inverse_k) - slack;
                // columns of pixel centres in [left, right]
                const F first = max(left + (0.5f * TILE - 0.5f), splat(0.0f)) + 0.9999f;
                const F last = min(right + (0.5f * TILE - 0.5f), splat(TILE - 1.0f));
                const I columns = (splat_int(2) << (truncate(max(last, splat(0.0f))) >> 2)) -
                                  (splat_int(1) << (truncate(min(first, splat(TILE - 1.0f))) >> 2));
                const M some = both(both(ge(high, low), ge(last, splat(0.0f))), gt(splat(TILE + 0.0f), first));
                found |= select(some, columns & splat_int(15), splat_int(0)) << (row * BLOCKS_X);
            }
            store(blocks + i, found);
        }
    }

    void make_lists(uint32_t wanted) {
        for (int i = size; i % V; ++i) blocks[i] = 0;
        for (int b = 0; b < BLOCKS; ++b) {
            int n = 0;
            if (wanted >> b & 1)
                for (int i = 0; i < size; i += V) n += append_set(load(blocks + i), 1u << b, i, list[b] + n);
            length[b] = n;
        }
    }
};

void draw_tile(Lists& lists, const Input& in, int c, int tile, const Output& out) {
    const int tiles = lists.tiles_x * lists.tiles_y;
    const TileBox box(lists, tile);
    const uint64_t* tile_begin = lists.tile_begin.data() + c * static_cast<int64_t>(tiles + 1) + tile;
    const Entry* entries = lists.entries[c].data() + tile_begin[0];
    const bool remember = lists.keep;
    uint32_t* lit = remember ? lists.lit[c].data() + tile_begin[0] : nullptr;
    const int32_t count = static_cast<int32_t>(tile_begin[1] - tile_begin[0]);
    const Splat* splats = lists.splats.data() + c * static_cast<int64_t>(lists.padded);

    alignas(64) float T[TILE_PIXELS], red[TILE_PIXELS] = {}, green[TILE_PIXELS] = {}, blue[TILE_PIXELS] = {};
    alignas(64) float z[TILE_PIXELS] = {};
    alignas(64) int32_t stop[TILE_PIXELS];  // the first entry that the pixel no longer takes
    std::fill_n(T, TILE_PIXELS, 1.0f);
    std::fill_n(stop, TILE_PIXELS, 0);
    uint32_t alive = 0;  // blocks with pixels that are not finished
    each_strip(box, [&](int at, int, int, int n) {
        std::fill_n(stop + at, n, count);
        alive |= 1u << (at / V);
    });

    Batch batch;
    if (remember) std::fill_n(lit, count, 0u);
    for (int32_t begin = 0; begin < count && alive; begin += BATCH) {
        batch.take(splats, entries + begin, std::min(BATCH, count - begin), box);
        batch.find_blocks();
        batch.make_lists(alive);
        for (uint32_t todo = alive; todo; todo &= todo - 1) {
            const int b = __builtin_ctz(todo), at = b * V, length = batch.length[b];
            const int32_t* list = batch.list[b];
            const Block pixel(b);
            F t_now = load(T + at), r = load(red + at), g = load(green + at), bl = load(blue + at), zz = load(z + at);
            M open = ge(load(stop + at), splat_int(begin + 1));
            for (int i = 0; i < length; ++i) {
                const int32_t e = list[i];
                const Splat& s = batch.splats[e];
                const F dy = pixel.y - s.y;
                const F t = (pixel.x - s.x) - s.slope * dy;
                const F exponent = (s.lo - s.h * (dy * dy)) - s.k * (t * t);
                const M active = both(open, ge(exponent, splat(LOG2_ALPHA_MIN)));
                const F alpha = min(exp2(exponent), splat(ALPHA_MAX));
                const F light = alpha * t_now, after = t_now - light;
                const M adds = both(active, gt(after, splat(TRANSMITTANCE_MIN)));
                const F weight = keep(adds, light);
                r += weight * s.r;
                g += weight * s.g;
                bl += weight * s.b;
                zz += weight * s.z;
                t_now = select(adds, after, t_now);
                if (remember) lit[begin + e] |= static_cast<uint32_t>(any(adds)) << b;
                const M stops = without(active, adds);
                if (any(stops)) [[unlikely]] {
                    store(stop + at, select(stops, splat_int(begin + e), load(stop + at)));
                    open = without(open, stops);
                    if (!any(open)) {
                        alive &= ~(1u << b);
                        break;
                    }
                }
            }
            store(T + at, t_now);
            store(red + at, r);
            store(green + at, g);
            store(blue + at, bl);
            store(z + at, zz);
        }
    }

    alignas(64) float alpha[TILE_PIXELS];
    const float* background = in.background ? in.background + 3 * c : nullptr;
    for (int at = 0; at < TILE_PIXELS; at += V) {
        const F left = load(T + at), covered = 1.0f - left;
        store(alpha + at, covered);
        store(z + at, load(z + at) / max(covered, splat(1e-10f)));
        if (background) {
            store(red + at, load(red + at) + left * background[0]);
            store(green + at, load(green + at) + left * background[1]);
            store(blue + at, load(blue + at) + left * background[2]);
        }
    }
    const int64_t plane = static_cast<int64_t>(lists.height) * lists.width;
    to_plane(lists, box, red, out.image + 3 * c * plane);
    to_plane(lists, box, green, out.image + (3 * c + 1) * plane);
    to_plane(lists, box, blue, out.image + (3 * c + 2) * plane);
    to_plane(lists, box, alpha, out.alpha + c * plane);
    to_plane(lists, box, z, out.depth + c * plane);
    if (!remember) return;
    const int64_t state = (c * static_cast<int64_t>(tiles) + tile) * TILE_PIXELS;
    std::memcpy(lists.transmittance.data() + state, T, sizeof(T));
    std::memcpy(lists.depth.data() + state, z, sizeof(z));
    std::memcpy(lists.stop.data() + state, stop, sizeof(stop));
}

// Sums of all pairs of one tile, each into its slot. `sums` starts at the camera's first slot.
void tile_gradient(const Lists& lists, const Input& in, int c, int tile, const OutputGradient& v, float* sums,
                   float* background_sum) {
    const int tiles = lists.tiles_x * lists.tiles_y;
    const TileBox box(lists, tile);
    const uint64_t* tile_begin = lists.tile_begin.data() + c * static_cast<int64_t>(tiles + 1) + tile;
    const Entry* entries = lists.entries[c].data() + tile_begin[0];
    const uint32_t* lit = lists.lit[c].data() + tile_begin[0];
    const int32_t count = static_cast<int32_t>(tile_begin[1] - tile_begin[0]);
    const Splat* splats = lists.splats.data() + c * static_cast<int64_t>(lists.padded);
    const int64_t state = (c * static_cast<int64_t>(tiles) + tile) * TILE_PIXELS;
    const int32_t* stop = lists.stop.data() + state;

    alignas(64) float T[TILE_PIXELS], behind[TILE_PIXELS] = {};  // light from what was already walked
    alignas(64) float v_r[TILE_PIXELS], v_g[TILE_PIXELS], v_b[TILE_PIXELS], v_z[TILE_PIXELS], v_0[TILE_PIXELS];
    const int64_t plane = static_cast<int64_t>(lists.height) * lists.width;
    from_plane(lists, box, v.image + 3 * c * plane, v_r);
    from_plane(lists, box, v.image + (3 * c + 1) * plane, v_g);
    from_plane(lists, box, v.image + (3 * c + 2) * plane, v_b);
    if (v.alpha) from_plane(lists, box, v.alpha + c * plane, v_0);
    else std::fill_n(v_0, TILE_PIXELS, 0.0f);
    if (v.depth) from_plane(lists, box, v.depth + c * plane, v_z);
    else std::fill_n(v_z, TILE_PIXELS, 0.0f);
    std::memcpy(T, lists.transmittance.data() + state, sizeof(T));

    // image = sum + T background, alpha = 1 - T, depth = sum / alpha and T = 1 - (sum of weights): so a weight's
    // gradient is v_0 + v_rgb . colour + v_z z.
    const float* background = in.background ? in.background + 3 * c : nullptr;
    F bg_r = splat(0.0f), bg_g = bg_r, bg_b = bg_r;
    for (int at = 0; at < TILE_PIXELS; at += V) {
        const F left = load(T + at), covered = 1.0f - left;
        F v_alpha = load(v_0 + at);
        if (v.depth) {
            const F per_weight = load(v_z + at) / max(covered, splat(1e-10f));
            v_alpha -= keep(gt(covered, splat(1e-10f)), per_weight * load(lists.depth.data() + state + at));
            store(v_z + at, per_weight);
        }
        if (background) {
            v_alpha -= load(v_r + at) * background[0] + load(v_g + at) * background[1] +
                       load(v_b + at) * background[2];
            bg_r += left * load(v_r + at);
            bg_g += left * load(v_g + at);
            bg_b += left * load(v_b + at);
        }
        store(v_0 + at, v_alpha);
    }
    const F zero = splat(0.0f);
    if (background) {
        alignas(64) float total[SUMS];
        sum_lanes({bg_r, bg_g, bg_b, zero, zero, zero, zero, zero, zero, zero}, total);
        for (int i = 0; i < 3; ++i) background_sum[i] = total[SUM_LANE[i]];
    }

    for (int32_t e = count - 1; e >= 0; --e) {
        const Entry& ahead = entries[std::max(e - AHEAD, 0)];
        __builtin_prefetch(splats + ahead.rank);
        __builtin_prefetch(sums + SUMS * static_cast<int64_t>(ahead.slot), 1);
        float* slot = sums + SUMS * static_cast<int64_t>(entries[e].slot);
        uint32_t todo = lit[e];
        if (!todo) {
            std::memset(slot, 0, SUMS * sizeof(float));
            continue;
        }
        const Splat s = splats[entries[e].rank];
        const float x = s.x - box.x(), y = s.y - box.y();
        const F dx_0 = load(LANES.x) - x, dy_0 = load(LANES.y) - y;
        const F slope = splat(s.slope), k = splat(s.k), h = splat(s.h), lo = splat(s.lo);
        F sum[10] = {zero, zero, zero, zero, zero, zero, zero, zero, zero, zero};
        for (; todo; todo &= todo - 1) {
            const int b = __builtin_ctz(todo), at = b * V;
            const F dy = dy_0 + LANES.block_y[b];
            const F t = (dx_0 + LANES.block_x[b]) - slope * dy;
            const F exponent = (lo - h * (dy * dy)) - k * (t * t);
            const M active = both(ge(exponent, splat(LOG2_ALPHA_MIN)), ge(load(stop + at), splat_int(e + 1)));
            const F raw = exp2(exponent), alpha = min(raw, splat(ALPHA_MAX));
            const F inverse = 1.0f / (1.0f - alpha);
            const F after = load(T + at), before = after * inverse;
            const F weight = keep(active, alpha * before);
            const F light = load(v_0 + at) + s.r * load(v_r + at) + s.g * load(v_g + at) + s.b * load(v_b + at) +
                            s.z * load(v_z + at);
            const F hidden = load(behind + at);
            const F v_alpha = before * light - hidden * inverse;
            store(T + at, select(active, before, after));
            store(behind + at, hidden + weight * light);
            const F q = keep(both(active, ge(splat(ALPHA_MAX), raw)), -alpha * v_alpha);
            const F qt = q * t, qy = q * dy;
            sum[Q] += q;
            sum[QT] += qt;
            sum[QY] += qy;
            sum[QTT] += qt * t;
            sum[QTY] += qt * dy;
            sum[QYY] += qy * dy;
            sum[WR] += weight * load(v_r + at);
            sum[WG] += weight * load(v_g + at);
            sum[WB] += weight * load(v_b + at);
            sum[WZ] += weight * load(v_z + at);
        }
        sum_lanes(sum, slot);
    }
}

}  // namespace
