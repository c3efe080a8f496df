// The compiled CPU rasterizer: forward and backward of 3D Gaussian splatting for several cameras in one call.
//
// The rules are gsplat's (Ye et al. 2024, arXiv 2409.06765); avatars/rasterize/reference.py says them in plain
// torch and is what this file is tested against. How it is made fast:
//
//   * Every picture is cut into tiles of 16 x 16 pixels and every tile into blocks of V pixels (4 x 4 with AVX-512),
//     so that one block is one vector. A bit mask a (tile, Gaussian) pair says which blocks the ellipse meets.
//   * Along a row the exponent is lo - k t² - h dy² with t = dx - slope dy: the same quadric as the conic's, without
//     the cancellation that large or needle-thin Gaussians cause there, and never negative.
//   * The forward remembers, per pair, the blocks that received light; the backward walks only those, from back to
//     front, with each Gaussian's ten sums in registers over all blocks of a tile.
//   * Each pair owns a slot for its sums and each Gaussian's slots lie side by side, so nothing is atomic and the
//     result does not depend on the number of threads.

#include "simd.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

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
constexpr int AHEAD = 8;              // entries that are fetched before they are needed
constexpr int SUMS = 16;              // floats of one pair's slot: ten sums, padded to a cache line
static_assert(CHUNK % V == 0 && BLOCKS <= 32);

// What the sums of a pair are. q is the gradient of the exponent's argument sigma, w the Gaussian's weight.
enum Sum { Q, QT, QY, QTT, QTY, QYY, WR, WG, WB, WZ };

// ---------------------------------------------------------------------------------------------- memory

// An array that is not cleared and that keeps its memory when it shrinks.
template <typename T>
class Buffer {
  public:
    T* resize(size_t count) {
        if (count > capacity_) {
            std::free(data_);
            capacity_ = 0;
            data_ = static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64));
            if (!data_) throw std::bad_alloc();
            capacity_ = count;
        }
        return data_;
    }
    T* data() { return data_; }
    const T* data() const { return data_; }
    T& operator[](size_t i) { return data_[i]; }
    const T& operator[](size_t i) const { return data_[i]; }
    size_t bytes() const { return capacity_ * sizeof(T); }
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { std::free(data_); }

  private:
    T* data_ = nullptr;
    size_t capacity_ = 0;
};

struct alignas(64) Splat {  // a projected Gaussian, one cache line
    float x, y;                 // centre, pixels
    float slope, k, h, lo;      // alpha = 2^(lo - k (dx - slope dy)² - h dy²)
    float half_x, half_y;       // where alpha falls to 1/255, pixels from the centre
    float r, g, b, z;
    float slack;                // of pixel positions against rounding
    uint32_t index;
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
    bool antialiased;
    std::vector<Camera> camera;
    Buffer<float> soa;                // [FIELDS][padded]: means, axes (rotation x scales) and opacities
    Buffer<Splat> found, splats;      // [cameras][padded]: as projected, and in depth order
    Buffer<Key> keys, keys_2;         // [cameras][padded]
    Buffer<uint32_t> slot_begin;      // [cameras][padded + 1], by Gaussian
    Buffer<uint32_t> cursor;          // [cameras][rank chunks][tiles]
    std::vector<std::vector<uint32_t>> lit_tiles;  // [cameras][rank chunks], of each rank in turn
    int ranks, rank_chunks;           // Gaussians in a rank chunk, and chunks that a camera has at most
    Buffer<uint64_t> tile_begin;      // [cameras][tiles + 1], into the camera's entries
    Buffer<Entry> entries;
    Buffer<uint32_t> lit;             // blocks that received light, one mask an entry
    Buffer<float> transmittance, depth;  // [cameras][tiles][256], block order
    Buffer<int32_t> stop;             // the tile's entry before which the pixel was finished
    std::vector<uint32_t> visible;
    std::vector<uint64_t> entry_begin;  // [cameras + 1]
    Buffer<uint32_t> chunk_count;

    size_t bytes() const {
        return soa.bytes() + found.bytes() + splats.bytes() + keys.bytes() + keys_2.bytes() + slot_begin.bytes() + cursor.bytes() + tile_begin.bytes() + entries.bytes() + lit.bytes() +
               transmittance.bytes() + depth.bytes() + stop.bytes() + chunk_count.bytes();
    }
};

struct Scratch {  // of one backward
    Buffer<float> sums;         // [slots of a camera group][SUMS]
    Buffer<float> gradient;     // [FIELDS + 3][padded]
    Buffer<float> background;   // [cameras][tiles][3]
};

// Fresh memory costs a page fault every 4 KiB, which is as much as the work itself: keep a few for the next call.
template <typename T>
class Pool {
  public:
    T* take() {
        std::lock_guard<std::mutex> guard(lock_);
        if (free_.empty()) return new T();
        T* item = free_.back().release();
        free_.pop_back();
        return item;
    }
    void give(T* item) {
        std::unique_ptr<T> owned(item);
        std::lock_guard<std::mutex> guard(lock_);
        if (free_.size() < 2) free_.push_back(std::move(owned));
    }

  private:
    std::mutex lock_;
    std::vector<std::unique_ptr<T>> free_;
};

Pool<Lists> lists_pool;
Pool<Scratch> scratch_pool;

// ---------------------------------------------------------------------------------------------- threads

// Threads that run one function together and wait for each other. With OpenMP they are those of torch, which would
// otherwise go on spinning for work on the very cores that are needed here; without, they live for one call.
class Team {
  public:
    explicit Team(int size) : size_(std::max(1, size)) {}

    template <typename Work>
    void run(const Work& work) {
        if (size_ == 1) {  // also the way in a forked process, where OpenMP has no threads
            work();
            return;
        }
#ifdef _OPENMP
#pragma omp parallel num_threads(size_)
        {
            if (omp_get_thread_num() == 0) start(omp_get_num_threads());
            wait_for_start();
            work();
        }
#else
        std::vector<std::thread> others;
        int started = 1;
        for (; started < size_; ++started) {
            try {
                others.emplace_back([&work, this] {
                    wait_for_start();
                    work();
                });
            } catch (const std::system_error&) {  // no more threads to be had: go on with those that there are
                break;
            }
        }
        start(started);
        work();
        for (auto& thread : others) thread.join();
#endif
    }

    // Calls task(i) for i in [0, count), spread over the team, and waits until all are done.
    template <typename Task>
    void each(int64_t count, const Task& task) {
        for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count;) task(i);
        wait();
    }

    // Calls task on one thread while the others wait. A failure stops the whole team at the same place.
    template <typename Task>
    void once(const Task& task) {
        if (next_.fetch_add(1, std::memory_order_relaxed) == 0) {
            try {
                task();
            } catch (const std::bad_alloc&) {
                failed_.store(true);
            }
        }
        wait();
    }

    bool failed() const { return failed_.load(); }
    void fail() { failed_.store(true); }

  private:
    void start(int size) {
        size_ = size;
        open_.store(true, std::memory_order_release);
    }
    void wait_for_start() const {
        while (!open_.load(std::memory_order_acquire)) std::this_thread::yield();
    }
    void wait() {
        const int round = round_.load(std::memory_order_acquire);
        if (waiting_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
            next_.store(0, std::memory_order_relaxed);
            waiting_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins)
            if (spins > 64) std::this_thread::yield();
    }

    int size_;
    std::atomic<bool> open_{false}, failed_{false};
    std::atomic<int64_t> next_{0};
    std::atomic<int> waiting_{0}, round_{0};
};

// ---------------------------------------------------------------------------------------------- preparation

struct Input {
    const float *means, *quats, *scales, *opacities, *colors, *K, *world_to_camera, *centers, *background;
};

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

// ---------------------------------------------------------------------------------------------- projection

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
                 0, 0, 0, lane[6][l], 0, static_cast<uint32_t>(group + l)};
            s.slack = 2e-3f + 1e-6f * (std::abs(s.x) + std::abs(s.y) + s.half_x + s.half_y);
            color_of(lists, in, camera, s.index, &s.r);
        }
    }
    lists.chunk_count[c * ((lists.padded + CHUNK - 1) / CHUNK) + chunk] = count;
}

// ---------------------------------------------------------------------------------------------- sorting, binning

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

// Extent in x of the splat's ellipse over rows whose centres lie in [top, bottom], all pixel positions.
inline void span(const Splat& s, float top, float bottom, float& left, float& right) {
    const float level = s.lo - LOG2_ALPHA_MIN;
    // dy of the rightmost point; the leftmost is opposite
    const float turn = s.half_x * (s.slope / s.h) / (1.0f / s.k + s.slope * s.slope / s.h);
    const float low = std::max(top - s.y, -s.half_y), high = std::min(bottom - s.y, s.half_y);
    const float at_right = std::max(low, std::min(turn, high)), at_left = std::max(low, std::min(-turn, high));
    right = s.x + s.slope * at_right + std::sqrt(std::max(0.0f, (level - s.h * at_right * at_right) / s.k));
    left = s.x + s.slope * at_left - std::sqrt(std::max(0.0f, (level - s.h * at_left * at_left) / s.k));
}

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
    for (int row = row_0; row <= row_1; ++row) {
        int first = column_0, last = column_1;
        if (row_0 < row_1 && column_0 < column_1) {
            float low, high;
            span(s, row * TILE + 0.5f - s.slack, row * TILE + TILE - 0.5f + s.slack, low, high);
            if (!pixels(low, high, s.slack, lists.width, left, right)) continue;
            first = left / TILE;
            last = right / TILE;
        }
        for (int column = first; column <= last; ++column) visit(row * lists.tiles_x + column);
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
        const Splat s = lists.splats[base + rank] = found[keys[rank].position];
        const size_t before = lit_tiles.size();
        each_tile(lists, s, [&](int tile) {
            ++counts[tile];
            lit_tiles.push_back(tile);
        });
        slots[s.index] = static_cast<uint32_t>(lit_tiles.size() - before);
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
    Entry* entries = lists.entries.data() + lists.entry_begin[c];
    const uint32_t* tile = lists.lit_tiles[part].data();
    for (uint32_t rank = begin; rank < end; ++rank) {
        const uint32_t index = splats[rank].index, stop = slot_begin[index + 1];
        for (uint32_t slot = slot_begin[index]; slot < stop; ++slot) entries[cursor[*tile++]++] = {rank, slot};
    }
}

// ---------------------------------------------------------------------------------------------- tiles

struct Lanes {  // pixel offsets inside a block, block offsets inside a tile
    alignas(64) float x[V], y[V];
    float block_x[BLOCKS], block_y[BLOCKS];
    alignas(64) float row[TILE];
    alignas(64) int32_t row_shift[TILE];
    constexpr Lanes() : x(), y(), block_x(), block_y(), row(), row_shift() {
        for (int l = 0; l < V; ++l) {
            x[l] = static_cast<float>(l % BLOCK_W);
            y[l] = static_cast<float>(l / BLOCK_W);
        }
        for (int b = 0; b < BLOCKS; ++b) {
            block_x[b] = static_cast<float>(b % BLOCKS_X * BLOCK_W);
            block_y[b] = static_cast<float>(b / BLOCKS_X * BLOCK_H);
        }
        for (int r = 0; r < TILE; ++r) {
            row[r] = static_cast<float>(r);
            row_shift[r] = r / BLOCK_H * BLOCKS_X;
        }
    }
};
constexpr Lanes LANES;

// Blocks of a tile in which some pixel centre may lie inside the splat's ellipse. `x`, `y`: the splat's centre
// relative to the centre of the tile's first pixel.
inline uint32_t blocks_of(const Splat& s, float x, float y) {
    // Small splats: all blocks of the box around the ellipse, a few of which may turn out to be dark.
    const int left = static_cast<int>(std::max(x - s.half_x - s.slack + 0.9999f, 0.0f)) >> 2;
    const int right = static_cast<int>(std::min(x + s.half_x + s.slack, TILE - 1.0f)) >> 2;
    const int top = static_cast<int>(std::max(y - s.half_y - s.slack + 0.9999f, 0.0f)) / BLOCK_H;
    const int bottom = static_cast<int>(std::min(y + s.half_y + s.slack, TILE - 1.0f)) / BLOCK_H;
    if ((right - left + 1) * (bottom - top + 1) <= 6 * BLOCK_W / BLOCK_H) {
        const uint32_t columns = (2u << right) - (1u << left);
        const uint64_t rows = (uint64_t{1} << (bottom + 1) * BLOCKS_X) - (uint64_t{1} << top * BLOCKS_X);
        return columns * 0x11111111u & static_cast<uint32_t>(rows);
    }
    const float level = s.lo - LOG2_ALPHA_MIN, inverse_k = 1.0f / s.k, slack = s.slack;
    I found = splat_int(0);
    for (int r = 0; r < TILE; r += V) {
        const F dy = load(LANES.row + r) - y;
        const F room = level - s.h * (dy * dy);
        const F half = sqrt(max(room, splat(0.0f)) * inverse_k) + slack;
        const F center = x + s.slope * dy;
        const F low = center - half, high = center + half;
        const I first = truncate(min(max(low, splat(0.0f)), splat(99.0f)) + 0.9999f);
        const I last = truncate(min(max(high, splat(-1.0f)) + 1.0f, splat(TILE + 0.0f))) - 1;
        const I columns = (splat_int(2) << (last >> 2)) - (splat_int(1) << (first >> 2));
        const M some = both(ge(last, first), ge(room, splat(-1e-4f)));
        found |= select(some, columns, splat_int(0)) << load(LANES.row_shift + r);
    }
    int32_t lanes[V], all = 0;
    store(lanes, found);
    for (int l = 0; l < V; ++l) all |= lanes[l];
    return static_cast<uint32_t>(all);
}

static_assert(BLOCK_W == 4, "blocks_of divides columns by 4 with a shift");

struct TileBox {
    int left, top, width, height;
    TileBox(const Lists& lists, int tile)
        : left(tile % lists.tiles_x * TILE), top(tile / lists.tiles_x * TILE),
          width(std::min(TILE, lists.width - left)), height(std::min(TILE, lists.height - top)) {}
};

// Rows of four pixels between a picture plane and block order.
template <typename Copy>
inline void each_strip(const TileBox& box, const Copy& copy) {
    for (int y = 0; y < box.height; ++y)
        for (int x = 0; x < box.width; x += BLOCK_W) {
            const int block = y / BLOCK_H * BLOCKS_X + x / BLOCK_W;
            copy(block * V + y % BLOCK_H * BLOCK_W, y, x, std::min(BLOCK_W, box.width - x));
        }
}

inline void to_plane(const Lists& lists, const TileBox& box, const float* values, float* plane) {
    plane += box.top * static_cast<int64_t>(lists.width) + box.left;
    each_strip(box, [&](int at, int y, int x, int n) {
        float* target = plane + y * static_cast<int64_t>(lists.width) + x;
        if (n == BLOCK_W)
            std::memcpy(target, values + at, 4 * BLOCK_W);
        else
            for (int i = 0; i < n; ++i) target[i] = values[at + i];
    });
}

inline void from_plane(const Lists& lists, const TileBox& box, const float* plane, float* values) {
    plane += box.top * static_cast<int64_t>(lists.width) + box.left;
    if (box.width < TILE || box.height < TILE) std::fill_n(values, TILE_PIXELS, 0.0f);
    each_strip(box, [&](int at, int y, int x, int n) {
        const float* source = plane + y * static_cast<int64_t>(lists.width) + x;
        if (n == BLOCK_W)
            std::memcpy(values + at, source, 4 * BLOCK_W);
        else
            for (int i = 0; i < n; ++i) values[at + i] = source[i];
    });
}

struct Output {
    float *image, *alpha, *depth;
    int32_t* radii;
};

void draw_tile(Lists& lists, const Input& in, int c, int tile, const Output& out) {
    const int tiles = lists.tiles_x * lists.tiles_y;
    const TileBox box(lists, tile);
    const uint64_t* tile_begin = lists.tile_begin.data() + c * static_cast<int64_t>(tiles + 1) + tile;
    const Entry* entries = lists.entries.data() + lists.entry_begin[c] + tile_begin[0];
    uint32_t* lit = lists.lit.data() + lists.entry_begin[c] + tile_begin[0];
    const int32_t count = static_cast<int32_t>(tile_begin[1] - tile_begin[0]);
    const Splat* splats = lists.splats.data() + c * static_cast<int64_t>(lists.padded);

    // Transmittance; its sign turns negative where the pixel is finished, and outside of the picture.
    alignas(64) float T[TILE_PIXELS], red[TILE_PIXELS] = {}, green[TILE_PIXELS] = {}, blue[TILE_PIXELS] = {};
    alignas(64) float z[TILE_PIXELS] = {};
    alignas(64) int32_t stop[TILE_PIXELS];
    std::fill_n(stop, TILE_PIXELS, count);
    std::fill_n(T, TILE_PIXELS, -1.0f);
    uint32_t alive = 0;
    each_strip(box, [&](int at, int, int, int n) {
        std::fill_n(T + at, n, 1.0f);
        alive |= 1u << (at / V);
    });

    int32_t e = 0;
    for (; e < count && alive; ++e) {
        __builtin_prefetch(splats + entries[std::min(e + AHEAD, count - 1)].rank);
        const Splat s = splats[entries[e].rank];
        const float x = s.x - (box.left + 0.5f), y = s.y - (box.top + 0.5f);
        uint32_t lit_here = 0;
        uint32_t todo = blocks_of(s, x, y) & alive;
        if (todo) {
            const F dx_0 = load(LANES.x) - x, dy_0 = load(LANES.y) - y;
            const F slope = splat(s.slope), k = splat(s.k), h = splat(s.h), lo = splat(s.lo);
            for (; todo; todo &= todo - 1) {
                const int b = __builtin_ctz(todo), at = b * V;
                const F dy = dy_0 + LANES.block_y[b];
                const F t = (dx_0 + LANES.block_x[b]) - slope * dy;
                const F exponent = (lo - h * (dy * dy)) - k * (t * t);
                const F before = load(T + at);
                const M active = both(ge(exponent, splat(LOG2_ALPHA_MIN)), gt(before, splat(0.0f)));
                const F alpha = min(exp2(exponent), splat(ALPHA_MAX));
                const F after = before * (1.0f - alpha);
                const M adds = both(active, gt(after, splat(TRANSMITTANCE_MIN)));
                const F weight = keep(adds, alpha * before);
                store(red + at, load(red + at) + weight * s.r);
                store(green + at, load(green + at) + weight * s.g);
                store(blue + at, load(blue + at) + weight * s.b);
                store(z + at, load(z + at) + weight * s.z);
                lit_here |= static_cast<uint32_t>(any(adds)) << b;
                F now = select(adds, after, before);
                const M stops = without(active, adds);
                if (any(stops)) {
                    now = select(stops, -before, now);
                    store(stop + at, select(stops, splat_int(e), load(stop + at)));
                    if (!any(gt(now, splat(0.0f)))) alive &= ~(1u << b);
                }
                store(T + at, now);
            }
        }
        lit[e] = lit_here;
    }
    std::fill(lit + e, lit + count, 0u);

    alignas(64) float alpha[TILE_PIXELS];
    const float* background = in.background ? in.background + 3 * c : nullptr;
    for (int at = 0; at < TILE_PIXELS; at += V) {
        const F left = max(load(T + at), -load(T + at)), covered = 1.0f - left;
        store(T + at, left);
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
    const int64_t state = (c * static_cast<int64_t>(tiles) + tile) * TILE_PIXELS;
    std::memcpy(lists.transmittance.data() + state, T, sizeof(T));
    std::memcpy(lists.depth.data() + state, z, sizeof(z));
    std::memcpy(lists.stop.data() + state, stop, sizeof(stop));
}

struct OutputGradient {
    const float *image, *alpha, *depth;  // alpha and depth may be null
};

// Sums of all pairs of one tile, each into its slot. `sums` starts at the camera's first slot.
void tile_gradient(const Lists& lists, const Input& in, int c, int tile, const OutputGradient& v, float* sums,
                   float* background_sum) {
    const int tiles = lists.tiles_x * lists.tiles_y;
    const TileBox box(lists, tile);
    const uint64_t* tile_begin = lists.tile_begin.data() + c * static_cast<int64_t>(tiles + 1) + tile;
    const Entry* entries = lists.entries.data() + lists.entry_begin[c] + tile_begin[0];
    const uint32_t* lit = lists.lit.data() + lists.entry_begin[c] + tile_begin[0];
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
        const float x = s.x - (box.left + 0.5f), y = s.y - (box.top + 0.5f);
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

// ---------------------------------------------------------------------------------------------- projection, backward

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

struct InputGradient {
    float *means, *quats, *scales, *opacities, *colors, *background;
};

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

constexpr int OUT_OF_MEMORY = -1, TOO_MANY_PAIRS = -2;

}  // namespace

// ---------------------------------------------------------------------------------------------- interface

extern "C" {

// Draws all cameras. Returns 0 and the lists for the backward, or a negative error, or a positive bit mask of the
// checks of common.py that failed. `sh`: coefficients a colour, 0 for RGB. `background` may be null.
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
    *result = nullptr;
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
        l.slot_begin.resize(cameras * (padded + 1));
        l.ranks = std::max(MIN_RANKS, static_cast<int>((padded + MAX_RANK_CHUNKS - 1) / MAX_RANK_CHUNKS));
        l.rank_chunks = static_cast<int>((padded + l.ranks - 1) / l.ranks);
        l.cursor.resize(cameras * l.rank_chunks * tiles);
        l.lit_tiles.resize(static_cast<size_t>(cameras) * l.rank_chunks);
        l.tile_begin.resize(cameras * (tiles + 1));
        l.chunk_count.resize(cameras * chunks);
        l.transmittance.resize(cameras * tiles * TILE_PIXELS);
        l.depth.resize(cameras * tiles * TILE_PIXELS);
        l.stop.resize(cameras * tiles * TILE_PIXELS);

        Team team(threads);
        team.run([&] {
            team.each(chunks, [&](int64_t chunk) {
                const int64_t begin = chunk * CHUNK, end = std::min<int64_t>(begin + CHUNK, count);
                wrong.fetch_or(check(in, begin, end, sh ? 3 * sh : 3));
                for (int64_t i = begin; i < end; i += V) prepare(l, in, i);
            });
            if (wrong.load()) return;
            team.each(cameras * chunks,
                      [&](int64_t i) { project_chunk(l, in, static_cast<int>(i / chunks), i % chunks, out.radii); });
            team.each(cameras, [&](int64_t c) { order_camera(l, static_cast<int>(c)); });
            const auto each_rank_chunk = [&](const auto& work) {
                team.each(static_cast<int64_t>(cameras) * l.rank_chunks, [&](int64_t i) {
                    const int c = static_cast<int>(i / l.rank_chunks), chunk = static_cast<int>(i % l.rank_chunks);
                    if (static_cast<uint32_t>(chunk) * l.ranks < l.visible[c]) work(c, chunk);
                });
            };
            each_rank_chunk([&](int c, int chunk) {
                try {
                    find_tiles(l, c, chunk);
                } catch (const std::bad_alloc&) {
                    team.fail();
                }
            });
            team.once([&] {
                for (int c = 0; c < cameras && !team.failed(); ++c) {
                    const uint64_t entries = lay_out_camera(l, c);
                    if (entries >= 0x7fffffffu) {
                        error = TOO_MANY_PAIRS;
                        team.fail();
                    }
                    l.entry_begin[c + 1] = l.entry_begin[c] + entries;
                }
                l.entries.resize(l.entry_begin[cameras]);
                l.lit.resize(l.entry_begin[cameras]);
            });
            if (team.failed()) return;
            each_rank_chunk([&](int c, int chunk) { fill_tiles(l, c, chunk); });
            team.each(cameras * tiles, [&](int64_t i) {
                draw_tile(l, in, static_cast<int>(i / tiles), static_cast<int>(i % tiles), out);
            });
        });
        if (team.failed() && !error) error = OUT_OF_MEMORY;
    } catch (const std::bad_alloc&) {
        error = OUT_OF_MEMORY;
    }
    if (wrong || error) {
        if (lists) lists_pool.give(lists);
        return wrong ? static_cast<int>(wrong.load()) : error.load();
    }
    *result = lists;
    return 0;
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
                const Splat& s = splats[l.entries[l.entry_begin[c] + i].rank];
                const uint32_t lit = l.lit[l.entry_begin[c] + i];
                counts[1] += 1;
                counts[2] += __builtin_popcount(lit);
                for (uint32_t todo = lit; todo; todo &= todo - 1) {
                    const int b = __builtin_ctz(todo);
                    const F dy = load(LANES.y) - (s.y - (box.top + 0.5f)) + LANES.block_y[b];
                    const F t = load(LANES.x) - (s.x - (box.left + 0.5f)) + LANES.block_x[b] - s.slope * dy;
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
