// Splats into depth order and into the lists of the tiles that they light.
#pragma once

#include "lists.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

// Stable by depth: equal depths keep the order of the Gaussians. Positive floats sort like their bits.
void sort_by_depth(Key* keys, Key* other, uint32_t count) {
    uint32_t low = 0xffffffffu, high = 0;
    for (uint32_t i = 0; i < count; ++i) {
        low = std::min(low, keys[i].depth);
        high = std::max(high, keys[i].depth);
    }
    constexpr int BITS = 11;
    Key* from = keys;
    Key* to = other;
    for (int shift = 0; count && shift < 32 && (high - low) >> shift; shift += BITS) {
        uint32_t begin[1 << BITS] = {};
        for (uint32_t i = 0; i < count; ++i) ++begin[((from[i].depth - low) >> shift) & ((1 << BITS) - 1)];
        uint32_t sum = 0;
        for (auto& b : begin) {
            const uint32_t n = b;
            b = sum;
            sum += n;
        }
        for (uint32_t i = 0; i < count; ++i)
            to[begin[((from[i].depth - low) >> shift) & ((1 << BITS) - 1)]++] = from[i];
        std::swap(from, to);
    }
    if (from != keys) std::memcpy(keys, from, count * sizeof(Key));
}

// The splat's ellipse, for its extent in x over some rows.
struct Ellipse {
    const Splat& s;
    float level, inverse_k, turn;  // turn: dy of the rightmost point; the leftmost is opposite

    explicit Ellipse(const Splat& splat) : s(splat), level(s.lo - LOG2_ALPHA_MIN), inverse_k(1.0f / s.k) {
        const float tilt = s.slope / s.h;
        turn = s.half_x * tilt / (inverse_k + s.slope * tilt);
    }

    // Extent over rows whose centres lie in [top, bottom]; all are pixel positions.
    void span(float top, float bottom, float& left, float& right) const {
        const float low = std::max(top - s.y, -s.half_y), high = std::min(bottom - s.y, s.half_y);
        const float at_right = std::max(low, std::min(turn, high)), at_left = std::max(low, std::min(-turn, high));
        right = s.x + s.slope * at_right + half(at_right);
        left = s.x + s.slope * at_left - half(at_left);
    }

  private:
    float half(float dy) const { return std::sqrt(std::max(0.0f, (level - s.h * dy * dy) * inverse_k)); }
};

// First and last pixel whose centre lies in [low, high], cut to [0, size).
inline bool pixels(float low, float high, float slack, int size, int& first, int& last) {
    first = static_cast<int>(std::ceil(std::max(low - 0.5f - slack, 0.0f)));
    last = static_cast<int>(std::floor(std::min(high - 0.5f + slack, size - 1.0f) + 1.0f)) - 1;
    return first <= last;
}

// Calls visit(tile) for all tiles that the splat can light, row by row.
template <typename Visit>
inline void each_tile(const Lists& lists, const Splat& s, const Visit& visit) {
    int left, right, top, bottom;
    if (!pixels(s.y - s.half_y, s.y + s.half_y, s.slack, lists.height, top, bottom)) return;
    if (!pixels(s.x - s.half_x, s.x + s.half_x, s.slack, lists.width, left, right)) return;
    const int row_0 = top / TILE, row_1 = bottom / TILE, column_0 = left / TILE, column_1 = right / TILE;
    if (row_0 == row_1 || column_0 == column_1) {  // the box around the ellipse is tight
        for (int row = row_0; row <= row_1; ++row)
            for (int column = column_0; column <= column_1; ++column) visit(row * lists.tiles_x + column);
        return;
    }
    const Ellipse ellipse(s);
    for (int row = row_0; row <= row_1; ++row) {
        float low, high;
        ellipse.span(row * TILE + 0.5f - s.slack, row * TILE + TILE - 0.5f + s.slack, low, high);
        if (!pixels(low, high, s.slack, lists.width, left, right)) continue;
        for (int column = left / TILE; column <= right / TILE; ++column) visit(row * lists.tiles_x + column);
    }
}

// Depth order of one camera.
void order_camera(Lists& lists, int c) {
    const int64_t base = c * static_cast<int64_t>(lists.padded);
    const int64_t chunks = (lists.padded + CHUNK - 1) / CHUNK;
    Key* keys = lists.keys.data() + base;
    Key* found = lists.keys_2.data() + base;
    uint32_t count = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const uint32_t in_chunk = lists.chunk_count[c * chunks + chunk];
        std::memcpy(keys + count, found + chunk * CHUNK, in_chunk * sizeof(Key));
        count += in_chunk;
    }
    lists.visible[c] = count;
    sort_by_depth(keys, found, count);
    if (lists.keep)
        std::fill_n(lists.slot_begin.data() + c * static_cast<int64_t>(lists.padded + 1), lists.padded + 1, 0u);
}

// Puts one chunk of a camera's splats in depth order and notes the tiles that they light.
void find_tiles(Lists& lists, int c, int chunk) {
    const int64_t base = c * static_cast<int64_t>(lists.padded);
    const int tiles = lists.tiles_x * lists.tiles_y, part = c * lists.rank_chunks + chunk;
    const uint32_t begin = chunk * lists.ranks, end = std::min<uint32_t>(begin + lists.ranks, lists.visible[c]);
    const Key* keys = lists.keys.data() + base;
    const Splat* found = lists.found.data() + base;
    uint32_t* slots = lists.slot_begin.data() + c * static_cast<int64_t>(lists.padded + 1);
    uint32_t* counts = lists.cursor.data() + part * static_cast<int64_t>(tiles);
    std::vector<uint32_t>& lit_tiles = lists.lit_tiles[part];
    std::fill_n(counts, tiles, 0u);
    lit_tiles.clear();
    for (uint32_t rank = begin; rank < end; ++rank) {
        if (rank + AHEAD < end) __builtin_prefetch(found + keys[rank + AHEAD].position);
        Splat& s = lists.splats[base + rank] = found[keys[rank].position];
        const size_t before = lit_tiles.size();
        each_tile(lists, s, [&](int tile) {
            ++counts[tile];
            lit_tiles.push_back(tile);
        });
        s.tiles = static_cast<uint32_t>(lit_tiles.size() - before);
        if (lists.keep) slots[s.index] = s.tiles;
    }
}

// Where every tile's and every chunk's part of the entries begins. Returns the number of the camera's entries.
uint64_t lay_out_camera(Lists& lists, int c) {
    const int tiles = lists.tiles_x * lists.tiles_y;
    const int chunks = static_cast<int>((lists.visible[c] + lists.ranks - 1) / lists.ranks);
    uint32_t* cursor = lists.cursor.data() + static_cast<int64_t>(c) * lists.rank_chunks * tiles;
    uint64_t* tile_begin = lists.tile_begin.data() + c * static_cast<int64_t>(tiles + 1);
    uint64_t sum = 0;
    for (int tile = 0; tile < tiles; ++tile) {
        tile_begin[tile] = sum;
        for (int chunk = 0; chunk < chunks; ++chunk) {
            const uint32_t count = cursor[chunk * static_cast<int64_t>(tiles) + tile];
            cursor[chunk * static_cast<int64_t>(tiles) + tile] = static_cast<uint32_t>(sum);
            sum += count;
        }
    }
    tile_begin[tiles] = sum;
    if (!lists.keep) return sum;
    uint32_t* slots = lists.slot_begin.data() + c * static_cast<int64_t>(lists.padded + 1);
    uint32_t begin = 0;
    for (int64_t i = 0; i <= lists.padded; ++i) {
        const uint32_t count = slots[i];
        slots[i] = begin;
        begin += count;
    }
    return sum;
}

void fill_tiles(Lists& lists, int c, int chunk) {
    const int tiles = lists.tiles_x * lists.tiles_y, part = c * lists.rank_chunks + chunk;
    const uint32_t begin = chunk * lists.ranks, end = std::min<uint32_t>(begin + lists.ranks, lists.visible[c]);
    const uint32_t* slot_begin = lists.slot_begin.data() + c * static_cast<int64_t>(lists.padded + 1);
    const Splat* splats = lists.splats.data() + c * static_cast<int64_t>(lists.padded);
    uint32_t* cursor = lists.cursor.data() + part * static_cast<int64_t>(tiles);
    Entry* entries = lists.entries[c].data();
    const uint32_t* tile = lists.lit_tiles[part].data();
    for (uint32_t rank = begin; rank < end; ++rank) {
        const uint32_t slot = lists.keep ? slot_begin[splats[rank].index] : 0;
        for (uint32_t i = 0; i < splats[rank].tiles; ++i) entries[cursor[*tile++]++] = {rank, slot + i};
    }
}

}  // namespace
