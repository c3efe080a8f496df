// The compiled CPU rasterizer: forward and backward of 3D Gaussian splatting for several cameras in one call.
//
// The rules are gsplat's (Ye et al. 2024, arXiv 2409.06765); avatars/rasterize/reference.py says them in plain
// torch and is what this file is tested against. How it is made fast:
//
//   * Every picture is cut into tiles of 16 x 16 pixels and every tile into blocks of V pixels (4 x 4 with AVX-512),
//     so that one block is one vector.
//   * Along a row the exponent is lo - k t² - h dy² with t = dx - slope dy: the same quadric as the conic's, without
//     the cancellation that large or needle-thin Gaussians cause there, and never negative.
//   * The forward goes through a tile's list in batches: which blocks each Gaussian meets is found for V Gaussians at
//     once, and then every block walks its own list with its pixels in registers.
//   * It remembers, per pair, the blocks that received light; the backward walks only those, from back to front, with
//     each Gaussian's ten sums in registers over all blocks of a tile.
//   * Each pair owns a slot for its sums and each Gaussian's slots lie side by side, so nothing is atomic and the
//     result does not depend on the number of threads.

#include "binning.h"
#include "lists.h"
#include "memory.h"
#include "projection.h"
#include "team.h"
#include "tiles.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>

namespace {

constexpr int64_t GROUP_BYTES = 2 << 20;
constexpr int OUT_OF_MEMORY = -1, TOO_MANY_PAIRS = -2;

Pool<Lists> lists_pool;
Pool<Scratch> scratch_pool;

}  // namespace

extern "C" {

// Draws all cameras. Returns 0 and the lists that a backward needs, or a negative error, or a positive bit mask of
// the checks of common.py that failed. `sh`: coefficients a colour, 0 for RGB. `background` may be null. `result` too:
// then no backward can follow, and nothing is done for it.
int headsplat_forward(int cameras, int count, int sh, int height, int width, int antialiased, int threads,
                      const float* means, const float* quats, const float* scales, const float* opacities,
                      const float* colors, const float* K, const float* world_to_camera, const float* centers,
                      const float* background, float* image, float* alpha, float* depth, int32_t* radii,
                      void** result) {
    const Input in{means, quats, scales, opacities, colors, K, world_to_camera, centers, background};
    const Output out{image, alpha, depth, radii};
    Lists* lists = nullptr;
    std::atomic<uint32_t> wrong{0};
    std::atomic<int> error{0};
    if (result) *result = nullptr;
    try {
        lists = lists_pool.take();
        Lists& l = *lists;
        l.cameras = cameras;
        l.count = count;
        l.padded = (count + V - 1) / V * V;
        l.sh = sh;
        l.height = height;
        l.width = width;
        l.antialiased = antialiased != 0;
        l.keep = result != nullptr;
        l.tiles_x = (width + TILE - 1) / TILE;
        l.tiles_y = (height + TILE - 1) / TILE;
        const int64_t padded = l.padded, tiles = static_cast<int64_t>(l.tiles_x) * l.tiles_y;
        const int64_t chunks = (padded + CHUNK - 1) / CHUNK;
        l.camera.resize(cameras);
        for (int c = 0; c < cameras; ++c)
            set_camera(l.camera[c], K + 9 * c, world_to_camera + 16 * c, centers + 3 * c, height, width);
        l.visible.assign(cameras, 0);
        l.entry_begin.assign(cameras + 1, 0);
        l.soa.resize(FIELDS * padded);
        l.found.resize(cameras * padded);
        l.splats.resize(cameras * padded);
        l.keys.resize(cameras * padded);
        l.keys_2.resize(cameras * padded);
        l.ranks = std::max(MIN_RANKS, static_cast<int>((padded + MAX_RANK_CHUNKS - 1) / MAX_RANK_CHUNKS));
        l.rank_chunks = static_cast<int>((padded + l.ranks - 1) / l.ranks);
        l.cursor.resize(cameras * l.rank_chunks * tiles);
        if (l.entries.size() < static_cast<size_t>(cameras)) l.entries.resize(cameras);
        if (l.lit.size() < static_cast<size_t>(cameras)) l.lit.resize(cameras);
        l.lit_tiles.resize(static_cast<size_t>(cameras) * l.rank_chunks);
        l.tile_begin.resize(cameras * (tiles + 1));
        l.chunk_count.resize(cameras * chunks);
        if (l.keep) {
            l.slot_begin.resize(cameras * (padded + 1));
            l.transmittance.resize(cameras * tiles * TILE_PIXELS);
            l.depth.resize(cameras * tiles * TILE_PIXELS);
            l.stop.resize(cameras * tiles * TILE_PIXELS);
        }

        // Cameras are taken together as far as their lists stay in the second cache, but one for every thread.
        const int64_t camera_bytes = padded * (2 * sizeof(Splat) + 2 * sizeof(Key)) + 1;
        const int group = static_cast<int>(std::max<int64_t>(threads, GROUP_BYTES / camera_bytes));
        Team team(threads);
        team.run([&] {
            team.each(chunks, [&](int64_t chunk) {
                const int64_t begin = chunk * CHUNK, end = std::min<int64_t>(begin + CHUNK, count);
                wrong.fetch_or(check(in, begin, end, sh ? 3 * sh : 3));
                for (int64_t i = begin; i < end; i += V) prepare(l, in, i);
            });
            if (wrong.load()) return;
            for (int first = 0; first < cameras; first += group) {
                const int of = std::min(group, cameras - first);  // cameras
                const auto each_rank_chunk = [&](const auto& work) {
                    team.each(static_cast<int64_t>(of) * l.rank_chunks, [&](int64_t i) {
                        const int c = first + static_cast<int>(i / l.rank_chunks);
                        const int chunk = static_cast<int>(i % l.rank_chunks);
                        if (static_cast<uint32_t>(chunk) * l.ranks < l.visible[c]) work(c, chunk);
                    });
                };
                team.each(of * chunks, [&](int64_t i) {
                    project_chunk(l, in, first + static_cast<int>(i / chunks), i % chunks, out.radii);
                });
                team.each(of, [&](int64_t i) { order_camera(l, first + static_cast<int>(i)); });
                each_rank_chunk([&](int c, int chunk) {
                    try {
                        find_tiles(l, c, chunk);
                    } catch (const std::bad_alloc&) {
                        team.fail();
                    }
                });
                team.once([&] {
                    for (int c = first; c < first + of && !team.failed(); ++c) {
                        const uint64_t entries = lay_out_camera(l, c);
                        if (entries >= 0x7fffffffu) {
                            error = TOO_MANY_PAIRS;
                            team.fail();
                            break;
                        }
                        l.entry_begin[c + 1] = l.entry_begin[c] + entries;
                        l.entries[c].resize(entries);
                        if (l.keep) l.lit[c].resize(entries);
                    }
                });
                if (team.failed()) return;
                each_rank_chunk([&](int c, int chunk) { fill_tiles(l, c, chunk); });
                team.each(of * tiles, [&](int64_t i) {
                    draw_tile(l, in, first + static_cast<int>(i / tiles), static_cast<int>(i % tiles), out);
                });
            }
        });
        if (team.failed() && !error) error = OUT_OF_MEMORY;
    } catch (const std::bad_alloc&) {
        error = OUT_OF_MEMORY;
    }
    if (result && !wrong && !error)
        *result = lists;
    else if (lists)
        lists_pool.give(lists);
    return wrong ? static_cast<int>(wrong.load()) : error.load();
}

// Gradients of everything that the forward drew; every output is overwritten. `v_alpha` and `v_depth` may be null.
int headsplat_backward(const void* state, int threads, const float* means, const float* quats, const float* scales,
                       const float* colors, const float* background, const float* v_image, const float* v_alpha,
                       const float* v_depth, float* v_means, float* v_quats, float* v_scales, float* v_opacities,
                       float* v_colors, float* v_background) {
    const Lists& l = *static_cast<const Lists*>(state);
    const Input in{means, quats, scales, nullptr, colors, nullptr, nullptr, nullptr, background};
    const OutputGradient v{v_image, v_alpha, v_depth};
    const InputGradient out{v_means, v_quats, v_scales, v_opacities, v_colors, v_background};
    const int64_t padded = l.padded, tiles = static_cast<int64_t>(l.tiles_x) * l.tiles_y;
    const int64_t chunks = (padded + CHUNK - 1) / CHUNK;
    constexpr uint64_t GROUP_SLOTS = 1 << 17;  // cameras are taken together up to 8 MiB of sums
    Scratch* scratch = nullptr;
    int error = 0;
    try {
        scratch = scratch_pool.take();
        std::vector<int> group_begin{0};
        uint64_t most = 0;
        for (int c = 0; c < l.cameras; ++c) {
            if (l.entry_begin[c + 1] - l.entry_begin[group_begin.back()] > GROUP_SLOTS && c > group_begin.back())
                group_begin.push_back(c);
            most = std::max(most, l.entry_begin[c + 1] - l.entry_begin[group_begin.back()]);
        }
        group_begin.push_back(l.cameras);
        float* sums = scratch->sums.resize(most * SUMS + SUMS);
        float* gradient = scratch->gradient.resize((FIELDS + 3) * padded);
        float* background_sums = scratch->background.resize(l.cameras * tiles * 3);

        Team team(threads);
        team.run([&] {
            team.each(chunks, [&](int64_t chunk) {
                const int64_t begin = chunk * CHUNK, size = std::min<int64_t>(CHUNK, padded - begin);
                for (int f = 0; f < FIELDS + 3; ++f) std::fill_n(gradient + f * padded + begin, size, 0.0f);
                if (l.sh) {
                    const int64_t real = std::min<int64_t>(CHUNK, l.count - begin);
                    std::fill_n(out.colors + 3 * l.sh * begin, 3 * l.sh * real, 0.0f);
                }
            });
            for (size_t g = 0; g + 1 < group_begin.size(); ++g) {
                const int first = group_begin[g], end = group_begin[g + 1];
                const auto camera_sums = [&](int c) {
                    return sums + SUMS * (l.entry_begin[c] - l.entry_begin[first]);
                };
                team.each((end - first) * tiles, [&](int64_t i) {
                    const int c = first + static_cast<int>(i / tiles), tile = static_cast<int>(i % tiles);
                    tile_gradient(l, in, c, tile, v, camera_sums(c), background_sums + 3 * (c * tiles + tile));
                });
                team.each(chunks, [&](int64_t chunk) {
                    const int64_t stop = std::min<int64_t>(chunk * CHUNK + CHUNK, padded);
                    for (int64_t i = chunk * CHUNK; i < stop; i += V)
                        for (int c = first; c < end; ++c)
                            project_gradient(l, in, c, i, camera_sums(c), gradient, out.colors);
                });
            }
            team.each(chunks, [&](int64_t chunk) {
                const int64_t stop = std::min<int64_t>(chunk * CHUNK + CHUNK, padded);
                for (int64_t i = chunk * CHUNK; i < stop; i += V) finish_gradient(l, in, i, gradient, out);
            });
        });
        if (background && out.background)
            for (int c = 0; c < l.cameras; ++c)
                for (int i = 0; i < 3; ++i) {
                    double sum = 0;
                    for (int64_t tile = 0; tile < tiles; ++tile) sum += background_sums[3 * (c * tiles + tile) + i];
                    out.background[3 * c + i] = static_cast<float>(sum);
                }
    } catch (const std::bad_alloc&) {
        error = OUT_OF_MEMORY;
    }
    if (scratch) scratch_pool.give(scratch);
    return error;
}

// Counts for benchmarks: Gaussians seen, (tile, Gaussian) pairs, lit (block, Gaussian) pairs, lit (pixel, Gaussian)
// pairs, bytes of the lists.
void headsplat_count(const void* state, int64_t* counts) {
    const Lists& l = *static_cast<const Lists*>(state);
    const int64_t tiles = static_cast<int64_t>(l.tiles_x) * l.tiles_y;
    std::fill_n(counts, 5, 0);
    for (int c = 0; c < l.cameras; ++c) {
        counts[0] += l.visible[c];
        const Splat* splats = l.splats.data() + c * static_cast<int64_t>(l.padded);
        for (int tile = 0; tile < tiles; ++tile) {
            const TileBox box(l, tile);
            const uint64_t* begin = l.tile_begin.data() + c * (tiles + 1) + tile;
            const int32_t* stop = l.stop.data() + (c * tiles + tile) * TILE_PIXELS;
            for (uint64_t i = begin[0]; i < begin[1]; ++i) {
                const Splat& s = splats[l.entries[c][i].rank];
                const uint32_t lit = l.lit[c][i];
                counts[1] += 1;
                counts[2] += __builtin_popcount(lit);
                for (uint32_t todo = lit; todo; todo &= todo - 1) {
                    const int b = __builtin_ctz(todo);
                    const Block pixel(b);
                    const F dy = pixel.y - (s.y - box.y()), t = (pixel.x - (s.x - box.x())) - s.slope * dy;
                    const F exponent = (s.lo - s.h * (dy * dy)) - s.k * (t * t);
                    const M active = both(ge(exponent, splat(LOG2_ALPHA_MIN)),
                                          ge(load(stop + b * V), splat_int(static_cast<int32_t>(i - begin[0]) + 1)));
                    counts[3] += __builtin_popcount(bits(active));
                }
            }
        }
    }
    counts[4] = static_cast<int64_t>(l.bytes());
}

void headsplat_release(void* state) { lists_pool.give(static_cast<Lists*>(state)); }

int headsplat_vector_width() { return V; }

}  // extern "C"
