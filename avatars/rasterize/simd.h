// A row of V floats and the few operations that the rasterizer needs on it.
//
// AVX-512 has mask registers of its own, so masks are a type here; everywhere else (AVX2, NEON, plain C++) the
// compiler's vector extension does the work and a mask is a row of integers. Both give the same results up to the
// width, which only changes the order of sums.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512DQ__) && !defined(HEADSPLAT_GENERIC)
#include <immintrin.h>
#define HEADSPLAT_AVX512 1
#endif

namespace simd {

#ifdef HEADSPLAT_AVX512
constexpr int V = 16;
#else
constexpr int V = 8;
#endif

typedef float F __attribute__((vector_size(V * 4)));
typedef int32_t I __attribute__((vector_size(V * 4)));

inline F splat(float x) { return x - F{}; }
inline I splat_int(int32_t x) { return x - I{}; }
inline F load(const float* p) { F x; std::memcpy(&x, p, sizeof(F)); return x; }
inline I load(const int32_t* p) { I x; std::memcpy(&x, p, sizeof(I)); return x; }
inline void store(float* p, F x) { std::memcpy(p, &x, sizeof(F)); }
inline void store(int32_t* p, I x) { std::memcpy(p, &x, sizeof(I)); }
inline I truncate(F x) { return __builtin_convertvector(x, I); }

#ifdef HEADSPLAT_AVX512

typedef __mmask16 M;
inline M ge(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline M gt(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline M ge(I a, I b) { return _mm512_cmp_epi32_mask((__m512i)a, (__m512i)b, _MM_CMPINT_NLT); }
inline M both(M a, M b) { return a & b; }
inline M without(M a, M b) { return a & ~b; }
inline bool any(M m) { return m != 0; }
inline int bits(M m) { return m; }
inline F select(M m, F a, F b) { return _mm512_mask_blend_ps(m, b, a); }
inline I select(M m, I a, I b) { return (I)_mm512_mask_blend_epi32(m, (__m512i)b, (__m512i)a); }
inline F keep(M m, F a) { return _mm512_maskz_mov_ps(m, a); }
inline F min(F a, F b) { return _mm512_min_ps(a, b); }
inline F max(F a, F b) { return _mm512_max_ps(a, b); }
inline F sqrt(F a) { return _mm512_sqrt_ps(a); }

#else

typedef I M;
inline M ge(F a, F b) { return a >= b; }
inline M gt(F a, F b) { return a > b; }
inline M ge(I a, I b) { return a >= b; }
inline M both(M a, M b) { return a & b; }
inline M without(M a, M b) { return a & ~b; }
inline int bits(M m) {
    int result = 0;
    for (int lane = 0; lane < V; ++lane) result |= (m[lane] & 1) << lane;
    return result;
}
inline bool any(M m) {
    int32_t lanes[V], result = 0;
    store(lanes, m);
    for (int lane = 0; lane < V; ++lane) result |= lanes[lane];
    return result != 0;
}
inline F select(M m, F a, F b) { return (F)(((I)a & m) | ((I)b & ~m)); }
inline I select(M m, I a, I b) { return (a & m) | (b & ~m); }
inline F keep(M m, F a) { return (F)((I)a & m); }
inline F min(F a, F b) { return select(a < b, a, b); }
inline F max(F a, F b) { return select(a > b, a, b); }
inline F sqrt(F a) {
    for (int lane = 0; lane < V; ++lane) a[lane] = __builtin_sqrtf(a[lane]);
    return a;
}

#endif

// 2^x for -126 < x < 127, relative error below 1.2e-7; garbage, but no trap, elsewhere. Adding 1.5 * 2^23 rounds to
// the nearest integer and leaves it in the low bits; the polynomial is a minimax fit on [-1/2, 1/2].
inline F exp2(F x) {
    const F magic = splat(12582912.0f);
    const F rounded = x + magic;
    const F f = x - (rounded - magic);
    F p = f * 1.327647187e-3f + 9.675541333e-3f;
    p = p * f + 5.550713274e-2f;
    p = p * f + 2.402211972e-1f;
    p = p * f + 6.931469671e-1f;
    p = p * f + 1.0f;
    return (F)((I)p + ((I)rounded << 23));
}

// log2 of positive normal numbers, absolute error about 1e-7 near 1: the exponent plus an atanh series in
// (m - 1) / (m + 1) for m in [sqrt(1/2), sqrt(2)).
inline F log2(F x) {
    const I shifted = (I)x - 0x3f3504f3;  // bits of sqrt(1/2)
    const I exponent = shifted >> 23;
    const F m = (F)((shifted & 0x007fffff) + 0x3f3504f3);
    const F u = (m - 1.0f) / (m + 1.0f);
    const F u2 = u * u;
    F p = u2 * (2.0f / 9) + 2.0f / 7;
    p = p * u2 + 2.0f / 5;
    p = p * u2 + 2.0f / 3;
    p = p * u2 + 2.0f;
    return __builtin_convertvector(exponent, F) + p * u * 1.44269504f;
}

// Sums over the lanes of ten rows at once, into total[0..15]; which sum lands where is said by SUM_LANE.
#ifdef HEADSPLAT_AVX512

constexpr int SUM_LANE[10] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6};

inline F fold_halves(F a, F b) {
    return (F)_mm512_shuffle_f32x4(a, b, 0x44) + (F)_mm512_shuffle_f32x4(a, b, 0xee);
}
inline F fold_quarters(F a, F b) {
    return (F)_mm512_shuffle_f32x4(a, b, 0x88) + (F)_mm512_shuffle_f32x4(a, b, 0xdd);
}
inline F fold_pairs(F a, F b) { return (F)_mm512_shuffle_ps(a, b, 0x44) + (F)_mm512_shuffle_ps(a, b, 0xee); }
inline F fold_ones(F a, F b) { return (F)_mm512_shuffle_ps(a, b, 0x88) + (F)_mm512_shuffle_ps(a, b, 0xdd); }

inline void sum_lanes(const F (&v)[10], float* total) {
    const F a = fold_quarters(fold_halves(v[0], v[1]), fold_halves(v[2], v[3]));
    const F b = fold_quarters(fold_halves(v[4], v[5]), fold_halves(v[6], v[7]));
    const F c89 = fold_halves(v[8], v[9]);
    const F c = fold_quarters(c89, c89);
    store(total, fold_ones(fold_pairs(a, b), fold_pairs(c, c)));
}

#else

constexpr int SUM_LANE[10] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9};

inline void sum_lanes(const F (&v)[10], float* total) {
    for (int k = 0; k < 10; ++k) {
        typedef float Half __attribute__((vector_size(16)));
        Half low, high;
        std::memcpy(&low, &v[k], 16);
        std::memcpy(&high, reinterpret_cast<const char*>(&v[k]) + 16, 16);
        low += high;
        total[k] = (low[0] + low[2]) + (low[1] + low[3]);
    }
    for (int k = 10; k < 16; ++k) total[k] = 0.0f;
}

#endif

#ifdef HEADSPLAT_AVX512

// Writes base + lane for the lanes of `masks` in which `bit` is set, and returns their number. Up to V elements
// past the end may be overwritten.
inline int append_set(I masks, uint32_t bit, int base, int32_t* target) {
    const __mmask16 set = _mm512_test_epi32_mask((__m512i)masks, _mm512_set1_epi32(static_cast<int>(bit)));
    const I lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    store(target, (I)_mm512_maskz_compress_epi32(set, (__m512i)(lanes + base)));
    return __builtin_popcount(set);
}

#else

inline int append_set(I masks, uint32_t bit, int base, int32_t* target) {
    int count = 0;
    for (int lane = 0; lane < V; ++lane) {
        target[count] = base + lane;
        count += (static_cast<uint32_t>(masks[lane]) & bit) != 0;
    }
    return count;
}

#endif

}  // namespace simd
