// PSNR's and SSIM's sums of picture pairs on a CPU, in one pass over each plane.
//
// A plane (one channel of one picture) is cut into bands of rows. A band reads its rows and five more on either
// side, blurs s = x + y, d = x - y, s² and d² along each row with the 11-tap window, keeps the last 11 blurred rows in
// a ring, and blurs down the ring: 2xy = (s² - d²) / 2 and x² + y² = (s² + d²) / 2 make four maps of the usual five. The
// window is symmetric, so taps are added in pairs. All of it is in double: in float the variance of a flat picture is
// wrong by 1e-7, which is 1e-4 of the constant that it is compared with. Bands and their order do not depend on the
// number of threads, so neither does the result.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

constexpr int HALF = 5, TAPS = 2 * HALF + 1, MAPS = 4, BAND = 128;
#if defined(__AVX512F__)
constexpr int V = 8;
#else
constexpr int V = 4;
#endif
typedef float Floats __attribute__((vector_size(V * 4)));
typedef double F __attribute__((vector_size(V * 8)));
typedef int64_t I __attribute__((vector_size(V * 8)));

inline F load(const double* p) { F x; std::memcpy(&x, p, sizeof(F)); return x; }
inline F load(const float* p) { Floats x; std::memcpy(&x, p, sizeof(x)); return __builtin_convertvector(x, F); }
inline void store(double* p, F x) { std::memcpy(p, &x, sizeof(F)); }

struct Window {
    double tap[HALF + 1];  // from the middle outwards
    Window() {
        double weight[HALF + 1], sum = 0;
        for (int i = 0; i <= HALF; ++i) {
            weight[i] = std::exp(-i * i / (2 * 1.5 * 1.5));
            sum += i ? 2 * weight[i] : weight[i];
        }
        for (int i = 0; i <= HALF; ++i) tap[i] = weight[i] / sum;
    }
};
const Window WINDOW;

inline int reflected(int i, int n) { return i < 0 ? -i : i >= n ? 2 * n - 2 - i : i; }

struct Sums {
    double squares = 0, squares_inside = 0, similarity = 0, similarity_inside = 0, inside = 0;
};

// Buffers of one thread: padded rows of the four maps, the ring, and addresses into it.
struct Scratch {
    int stride;
    std::vector<double> row, ring;
    explicit Scratch(int width)
        : stride((width + V - 1) / V * V + 2 * V), row(MAPS * size_t(stride) + 2 * V),
          ring(MAPS * size_t(TAPS) * stride) {}
    double* padded(int map) { return row.data() + map * size_t(stride) + V - HALF; }  // starts HALF before the row
    double* blurred(int map, int slot) { return ring.data() + (map * size_t(TAPS) + slot) * stride; }
};

void blur_row(const float* x, const float* y, int width, Scratch& scratch, int slot) {
    double* maps[MAPS];
    for (int m = 0; m < MAPS; ++m) maps[m] = scratch.padded(m) + HALF;
    int i = 0;
    for (; i + V <= width; i += V) {
        F a = load(x + i), b = load(y + i), s = a + b, d = a - b;
        store(maps[0] + i, s), store(maps[1] + i, d), store(maps[2] + i, s * s), store(maps[3] + i, d * d);
    }
    for (; i < width; ++i) {
        double a = x[i], b = y[i], s = a + b, d = a - b;
        maps[0][i] = s, maps[1][i] = d, maps[2][i] = s * s, maps[3][i] = d * d;
    }
    for (int m = 0; m < MAPS; ++m) {
        double* map = maps[m];
        for (int k = 1; k <= HALF; ++k) map[-k] = map[k], map[width - 1 + k] = map[width - 1 - k];
        double* out = scratch.blurred(m, slot);
        for (i = 0; i < width; i += V) {
            F sum = WINDOW.tap[0] * load(map + i);
            for (int k = 1; k <= HALF; ++k) sum += WINDOW.tap[k] * (load(map + i - k) + load(map + i + k));
            store(out + i, sum);
        }
    }
}

void finish_row(const float* x, const float* y, const float* mask, int width, Scratch& scratch, int row, Sums& sums) {
    constexpr double c1 = 0.01 * 0.01, c2 = 0.03 * 0.03;
    const double* rows[MAPS][TAPS];
    for (int m = 0; m < MAPS; ++m)
        for (int k = 0; k < TAPS; ++k) rows[m][k] = scratch.blurred(m, (row + k) % TAPS);
    F total[5] = {};
    for (int i = 0; i < width; i += V) {
        F mean[MAPS];
        for (int m = 0; m < MAPS; ++m) {
            F sum = WINDOW.tap[0] * load(rows[m][HALF] + i);
            for (int k = 1; k <= HALF; ++k)
                sum += WINDOW.tap[k] * (load(rows[m][HALF - k] + i) + load(rows[m][HALF + k] + i));
            mean[m] = sum;
        }
        const F ss = mean[0] * mean[0], dd = mean[1] * mean[1], var_s = mean[2] - ss, var_d = mean[3] - dd;
        F similarity = (((ss - dd) * 0.5 + c1) * ((var_s - var_d) * 0.5 + c2)) /
                       (((ss + dd) * 0.5 + c1) * ((var_s + var_d) * 0.5 + c2));
        F difference, inside{};
        const int left = width - i;
        if (left >= V) {
            difference = load(x + i) - load(y + i);
            if (mask) inside = load(mask + i);
        } else {  // the last columns: what lies behind them must count nothing
            float a[V] = {}, b[V] = {}, c[V] = {}, one[V] = {};
            std::copy_n(x + i, left, a), std::copy_n(y + i, left, b), std::fill_n(one, left, 1.0);
            if (mask) std::copy_n(mask + i, left, c);
            difference = load(a) - load(b);
            inside = load(c);
            similarity = load(one) != 0.0 ? similarity : F{};
        }
        const F squares = difference * difference;
        total[0] += squares;
        total[2] += similarity;
        if (mask) {
            const I in = inside >= 0.5;
            total[1] += in ? squares : F{};
            total[3] += in ? similarity : F{};
            total[4] += in ? F{} + 1.0 : F{};
        }
    }
    double added[5] = {};
    for (int n = 0; n < 5; ++n)
        for (int v = 0; v < V; ++v) added[n] += total[n][v];
    sums.squares += added[0], sums.squares_inside += added[1];
    sums.similarity += added[2], sums.similarity_inside += added[3], sums.inside += added[4];
}

void measure_band(const float* x, const float* y, const float* mask, int height, int width, int begin, int end,
                  Scratch& scratch, Sums& sums) {
    for (int row = begin - HALF; row < end + HALF; ++row) {
        const size_t source = size_t(reflected(row, height)) * width;
        blur_row(x + source, y + source, width, scratch, (row - begin + HALF) % TAPS);
        const int done = row - HALF;  // the row whose window is whole now
        if (done < begin) continue;
        const size_t here = size_t(done) * width;
        finish_row(x + here, y + here, mask ? mask + here : nullptr, width, scratch, done - begin, sums);
    }
}

}  // namespace

extern "C" {

// pictures × 3 × height × width float32 of both, pictures × height × width of the mask or null; height and width are
// at least 6. Writes a picture's five sums over its channels: squared differences, those inside the mask, SSIM, SSIM
// inside the mask, values inside the mask. Returns 0, or -1 when there is no memory.
int headsplat_similarity(const float* prediction, const float* target, const float* mask, int pictures, int height,
                         int width, int threads, double* out) {
    const int bands = (height + BAND - 1) / BAND;
    const int64_t plane = int64_t(height) * width, jobs = int64_t(pictures) * 3 * bands;
    try {
        std::vector<Sums> sums(jobs);
        std::vector<Scratch> scratch(std::max(threads, 1), Scratch(width));
#pragma omp parallel for schedule(dynamic) num_threads(std::max(threads, 1))
        for (int64_t job = 0; job < jobs; ++job) {
#ifdef _OPENMP
            Scratch& mine = scratch[omp_get_thread_num()];
#else
            Scratch& mine = scratch[0];
#endif
            const int64_t number = job / bands, band = job % bands;
            const float* inside = mask ? mask + number / 3 * plane : nullptr;
            measure_band(prediction + number * plane, target + number * plane, inside, height, width,
                         int(band) * BAND, std::min(int(band + 1) * BAND, height), mine, sums[job]);
        }
        std::fill_n(out, pictures * size_t(5), 0.0);
        for (int64_t job = 0; job < jobs; ++job) {
            double* sum = out + job / bands / 3 * 5;
            const Sums& one = sums[job];
            sum[0] += one.squares, sum[1] += one.squares_inside, sum[2] += one.similarity;
            sum[3] += one.similarity_inside, sum[4] += one.inside;
        }
    } catch (const std::bad_alloc&) {
        return -1;
    }
    return 0;
}

}
