// The constants of splatting, what goes in and out, and the lists that a forward makes.
#pragma once

#include "memory.h"
#include "simd.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <deque>
#include <vector>

using namespace simd;

namespace {

constexpr float NEAR = 0.01f, FAR = 1e10f, EPS_2D = 0.3f;
constexpr float ALPHA_MAX = 0.999f, ALPHA_MIN = 1.0f / 255.0f, TRANSMITTANCE_MIN = 1e-4f;
constexpr float EXTENT_MAX_SQUARED = 3.33f * 3.33f;
constexpr float LOG2_ALPHA_MIN = -7.99435344f;
constexpr float HALF_LOG2_E = 0.72134752f, TWO_LN_2 = 1.38629436f;

constexpr int TILE = 16, TILE_PIXELS = TILE * TILE;
constexpr int BLOCK_W = 4, BLOCK_H = V / BLOCK_W;
constexpr int BLOCKS_X = TILE / BLOCK_W, BLOCKS = TILE_PIXELS / V;
constexpr int CHUNK = 1024;           // Gaussians that one task projects
constexpr int MIN_RANKS = 1024, MAX_RANK_CHUNKS = 32;  // visible Gaussians that one task sorts into tiles
constexpr int BATCH = 128;           // entries of a tile that are worked on together
constexpr int AHEAD = 8;              // entries that are fetched before they are needed
constexpr int SUMS = 16;              // floats of one pair's slot: ten sums, padded to a cache line
static_assert(CHUNK % V == 0 && BLOCKS <= 32);

// What the sums of a pair are. q is the gradient of the exponent's argument sigma, w the Gaussian's weight.
enum Sum { Q, QT, QY, QTT, QTY, QYY, WR, WG, WB, WZ };

struct Input {
    const float *means, *quats, *scales, *opacities, *colors, *K, *world_to_camera, *centers, *background;
};

struct Output {
    float *image, *alpha, *depth;
    int32_t* radii;
};

struct OutputGradient {
    const float *image, *alpha, *depth;  // alpha and depth may be null
};

struct InputGradient {
    float *means, *quats, *scales, *opacities, *colors, *background;
};

struct alignas(64) Splat {  // a projected Gaussian, one cache line
    float x, y;                 // centre, pixels
    float slope, k, h, lo;      // alpha = 2^(lo - k (dx - slope dy)² - h dy²)
    float half_x, half_y;       // where alpha falls to 1/255, pixels from the centre
    float r, g, b, z;
    float slack;                // of pixel positions against rounding
    uint32_t index, tiles;      // its number, and how many tiles it lights
};

struct Entry {  // one (tile, Gaussian) pair
    uint32_t rank;  // in the camera's depth order
    uint32_t slot;  // where its sums go: each Gaussian's slots lie side by side
};

struct Key {
    uint32_t depth, position;
};

struct Camera {
    float R[9], t[3], fx, fy, cx, cy, center[3];
    float x_low, x_high, y_low, y_high;  // clamp of x / z and y / z in the Jacobian
};

enum Field { MX, MY, MZ, M00, M01, M02, M10, M11, M12, M20, M21, M22, OPACITY, LOG2_OPACITY, FIELDS };

// Everything that the backward needs from the forward.
struct Lists {
    int cameras, count, padded, sh, height, width, tiles_x, tiles_y;
    bool antialiased, keep;            // keep: a backward will follow
    std::vector<Camera> camera;
    Buffer<float> soa;                // [FIELDS][padded]: means, axes (rotation x scales) and opacities
    Buffer<Splat> found, splats;      // [cameras][padded]: as projected, and in depth order
    Buffer<Key> keys, keys_2;         // [cameras][padded]
    Buffer<uint32_t> cursor;          // [cameras][rank chunks][tiles]
    std::vector<std::vector<uint32_t>> lit_tiles;  // [cameras][rank chunks], of each rank in turn
    int ranks, rank_chunks;           // Gaussians in a rank chunk, and chunks that a camera has at most
    Buffer<uint64_t> tile_begin;      // [cameras][tiles + 1], into the camera's entries
    std::deque<Buffer<Entry>> entries;  // of each camera
    std::vector<uint32_t> visible;
    std::vector<uint64_t> entry_begin;  // [cameras + 1]
    Buffer<uint32_t> chunk_count;
    // Only for a backward:
    Buffer<uint32_t> slot_begin;      // [cameras][padded + 1], by Gaussian
    std::deque<Buffer<uint32_t>> lit; // of each camera: blocks that received light, one mask an entry
    Buffer<float> transmittance, depth;  // [cameras][tiles][256], block order
    Buffer<int32_t> stop;             // the first entry of the tile that the pixel no longer takes

    size_t bytes() const {
        size_t pairs = 0;
        for (const auto& buffer : entries) pairs += buffer.bytes();
        for (const auto& buffer : lit) pairs += buffer.bytes();
        return pairs + soa.bytes() + found.bytes() + splats.bytes() + keys.bytes() + keys_2.bytes() + cursor.bytes() +
               tile_begin.bytes() + chunk_count.bytes() + slot_begin.bytes() +
               transmittance.bytes() + depth.bytes() + stop.bytes();
    }
};

struct Scratch {  // of one backward
    Buffer<float> sums;         // [slots of a camera group][SUMS]
    Buffer<float> gradient;     // [FIELDS + 3][padded]
    Buffer<float> background;   // [cameras][tiles][3]
};

}  // namespace
