// What one core of this machine can do at best: fused multiply-adds and 2^x, both in float32 lanes a second.
#include "../avatars/rasterize/simd.h"

#include <chrono>
#include <cstdint>

using namespace simd;

namespace {

constexpr int CHAINS = 12;  // enough in flight to hide the latency of a multiply-add

// Runs in a function of its own, behind memory, so that no compiler moves the work past the clock.
template <typename Step>
__attribute__((noinline)) void run(int64_t rounds, float* memory, const Step& step) {
    F x[CHAINS];
    for (int i = 0; i < CHAINS; ++i) x[i] = load(memory + i * V);
    for (int64_t r = 0; r < rounds; ++r)
        for (int i = 0; i < CHAINS; ++i) x[i] = step(x[i]);
    for (int i = 0; i < CHAINS; ++i) store(memory + i * V, x[i]);
}

template <typename Step>
double lanes_per_second(int64_t rounds, const Step& step) {
    static float memory[CHAINS * V];
    for (int i = 0; i < CHAINS * V; ++i) memory[i] = -0.01f * static_cast<float>(i + 1);
    const auto begin = std::chrono::steady_clock::now();
    run(rounds, memory, step);
    const std::chrono::duration<double> time = std::chrono::steady_clock::now() - begin;
    return static_cast<double>(rounds) * CHAINS * V / time.count();
}

}  // namespace

extern "C" void headsplat_rates(double* fma, double* exp) {
    const F a = splat(0.999f), b = splat(-0.001f);
    *fma = lanes_per_second(2000000, [&](F x) { return x * a + b; });
    *exp = lanes_per_second(500000, [&](F x) { return exp2(x) - 1.5f; });
}
