// What differs between machines: vectors of LANES numbers, the products that a processor has
// instructions for, and threads. step.cpp is written in these terms alone.
//
// Sums must come out the same however many rows a step has, so the compiler may not fuse a product and
// a sum where it likes (-ffp-contract=off): `fma` says where.
#pragma once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define LANES 16
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define LANES 8
#else
#define LANES 4
#endif

// Whether the machine's product of bytes is of unsigned weights. int8 is then stored as value + 128.
#if LANES == 16 || (LANES == 8 && defined(__AVXVNNI__))
constexpr uint32_t FLIP = 0x80808080;
#else
constexpr uint32_t FLIP = 0;
#endif
#if LANES == 16 && defined(__AVX512BF16__)
constexpr bool BF16_PRODUCTS = true;
#else
constexpr bool BF16_PRODUCTS = false;  // bf16 weights are widened, and meet activations in fp32
#endif

typedef float F __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));
typedef uint32_t U __attribute__((vector_size(4 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef int8_t Quarters __attribute__((vector_size(LANES)));

template <class V> static inline V load(const void* from) { V v; memcpy(&v, from, sizeof v); return v; }
template <class V> static inline void store(void* to, V v) { memcpy(to, &v, sizeof v); }
static inline F splat(float x) { return x - F{}; }
static inline I splat(int32_t x) { return x - I{}; }
static inline U splat(uint32_t x) { return x - U{}; }
static inline F to_float(I i) { return __builtin_convertvector(i, F); }
static inline F larger(F a, F b) { return a > b ? a : b; }
static inline float sum(F v) { float s = 0; for (int i = 0; i < LANES; i++) s += v[i]; return s; }
static inline float largest(F v) { float s = v[0]; for (int i = 1; i < LANES; i++) s = v[i] > s ? v[i] : s; return s; }

static inline F fma(F a, F b, F c) {  // a · b + c
#if LANES == 16
  return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif LANES == 8
  return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (F)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// ---- numbers of 16 bits

static inline float from_bf16(uint16_t h) { uint32_t u = uint32_t(h) << 16; return load<float>(&u); }
static inline F from_bf16(Halves h) { return (F)(__builtin_convertvector(h, U) << 16); }
static inline Halves to_bf16(F f) {  // to nearest even; NaN stays NaN
#if LANES == 16 && defined(__AVX512BF16__)
  return (Halves)_mm512_cvtneps_pbh((__m512)f);
#else
  const U u = (U)f, rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return __builtin_convertvector(f == f ? rounded : splat(0x7fc0u), Halves);
#endif
}
static inline float from_half(uint16_t h) {
  const uint32_t shifted = (h & 0x7fffu) << 13, sign = (h & 0x8000u) << 16;
  const float scaled = load<float>(&shifted) * 0x1p112f;  // which makes subnormal numbers normal
  const uint32_t bits = load<uint32_t>(&scaled) | sign | ((h & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u);
  return load<float>(&bits);
}
static inline F from_half(Halves h) {
#if LANES == 16
  return (F)_mm512_cvtph_ps((__m256i)h);
#elif LANES == 8
  return (F)_mm256_cvtph_ps((__m128i)h);
#elif defined(__aarch64__)
  return (F)vcvt_f32_f16((float16x4_t)h);
#else
  F f;
  for (int i = 0; i < LANES; i++) f[i] = from_half(h[i]);
  return f;
#endif
}

// ---- products

// acc + two products a lane. w: 2 bf16. x: as `activation_pair` gives them.
static inline F dot2(F acc, U w, const uint32_t* x) {
#if LANES == 16 && defined(__AVX512BF16__)
  return (F)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)splat(*x));  // x: 2 bf16
#else
  const float* pair = (const float*)x;  // x: 2 fp32
  return fma((F)(w & 0xffff0000u), splat(pair[1]), fma((F)(w << 16), splat(pair[0]), acc));
#endif
}

// start + products of 32 inputs a lane: w has 4 in each of 8 vectors, x is int8 and the same for all lanes.
// w: signed, or value + 128 where FLIP says so; with SMALL 0 … 31. The sum is exact.
template <bool SMALL> static inline F dot32(const Bytes w[8], const uint8_t* x, int32_t start) {
#if LANES == 16
  I acc = splat(start);
#pragma GCC unroll 8
  for (int j = 0; j < 8; j++) acc = (I)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w[j], (__m512i)splat(load<int32_t>(x + 4 * j)));
  return to_float(acc);
#elif LANES == 8 && defined(__AVXVNNI__)
  I acc = splat(start);
#pragma GCC unroll 8
  for (int j = 0; j < 8; j++) acc = (I)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)w[j], (__m256i)splat(load<int32_t>(x + 4 * j)));
  return to_float(acc);
#elif LANES == 8
  // Pairs of products add up in 16 bits: four small ones fit, and one of |w| times x with w's sign.
  __m256i acc = (__m256i)splat(start);
#pragma GCC unroll 2
  for (int half = 0; half < 8; half += 4) {
    __m256i narrow = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int j = half; j < half + 4; j++) {
      const __m256i v = (__m256i)w[j], xs = (__m256i)splat(load<int32_t>(x + 4 * j));
      if (SMALL) narrow = _mm256_add_epi16(narrow, _mm256_maddubs_epi16(v, xs));
      else {
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_sign_epi8(v, v), _mm256_sign_epi8(xs, v));
        acc = _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
      }
    }
    if (SMALL) acc = _mm256_add_epi32(acc, _mm256_madd_epi16(narrow, _mm256_set1_epi16(1)));
  }
  return to_float((I)acc);
#elif defined(__ARM_FEATURE_DOTPROD)
  int32x4_t acc = vdupq_n_s32(start);
#pragma GCC unroll 8
  for (int j = 0; j < 8; j++) acc = vdotq_s32(acc, (int8x16_t)w[j], vreinterpretq_s8_s32(vdupq_n_s32(load<int32_t>(x + 4 * j))));
  return to_float((I)acc);
#else
  F acc = splat(float(start));  // whole numbers below 2^24 are exact in fp32
  for (int j = 0; j < 8; j++)
    for (int k = 0; k < 4; k++) acc += to_float((I)((U)w[j] << (24 - 8 * k)) >> 24) * splat(float(int8_t(x[4 * j + k])));
  return acc;
#endif
}

// ---- functions of vectors

static inline F exponential(F x) {  // Cephes' polynomial, error 2e-7; NaN stays NaN
  x = x < -87.f ? splat(-87.f) : x > 88.f ? splat(88.f) : x;
  const I n = __builtin_convertvector(fma(x, splat(1.44269504f), x > 0.f ? splat(.5f) : splat(-.5f)), I);
  const F m = to_float(n), r = fma(m, splat(2.12194440e-4f), fma(m, splat(-0.693359375f), x));
  F p = splat(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, .5f}) p = fma(p, r, splat(c));
  return fma(p, r * r, r + 1.f) * (F)((n + 127) << 23);
}

// Rows of LANES numbers of 32 bits become columns: log2(LANES) rounds of a perfect shuffle.
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (U){__VA_ARGS__})
#endif
#if LANES == 16
#define ZIP_LOW(a, b) SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define ZIP_HIGH(a, b) SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#elif LANES == 8
#define ZIP_LOW(a, b) SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define ZIP_HIGH(a, b) SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#else
#define ZIP_LOW(a, b) SHUFFLE(a, b, 0, 4, 1, 5)
#define ZIP_HIGH(a, b) SHUFFLE(a, b, 2, 6, 3, 7)
#endif
static inline void transpose(U v[LANES]) {
#pragma GCC unroll 4
  for (int round = 1; round < LANES; round *= 2) {
    U t[LANES];
#pragma GCC unroll 8
    for (int i = 0; i < LANES / 2; i++)
      t[2 * i] = ZIP_LOW(v[i], v[i + LANES / 2]), t[2 * i + 1] = ZIP_HIGH(v[i], v[i + LANES / 2]);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) v[i] = t[i];
  }
}

// ---- threads

static inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("isb");
#endif
}

// A team of threads that runs one function at a time, the caller being its first member. They spin for
// a moment where they wait, then sleep: whoever else needs the core gets it.
class Pool {
 public:
  const int threads;

  explicit Pool(int n) : threads(n) {
    for (int t = 1; t < n; t++) workers.emplace_back([this, t] { work(t); });
  }
  ~Pool() {
    call = nullptr;
    job.fetch_add(1);
    job.notify_all();
    for (auto& worker : workers) worker.join();
  }
  // function(t) on every thread t.
  template <class Function> void run(Function function) {
    call = [](void* f, int t) { (*(Function*)f)(t); };
    argument = &function;
    job.fetch_add(1, std::memory_order_release);
    job.notify_all();
    function(0);
    barrier();
  }
  // Until every thread is here. Then `take` begins anew.
  void barrier() {
    const uint32_t now = phase.load(std::memory_order_relaxed);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 < uint32_t(threads)) return wait(phase, now);
    arrived.store(0, std::memory_order_relaxed);
    taken.store(0, std::memory_order_relaxed);
    phase.store(now + 1, std::memory_order_release);
    phase.notify_all();
  }
  // The next few of `total` pieces of work, from … to - 1; false when none are left. The fewer remain,
  // the fewer are taken at once, so that all threads end together, even one that was interrupted.
  bool take(int total, int& from, int& to) {
    uint32_t first = taken.load(std::memory_order_relaxed);
    do {
      from = to = int(first);
      if (from >= total) return false;
      to += std::max(std::min((total - from) / (2 * threads), 8) & ~1, 1);
    } while (!taken.compare_exchange_weak(first, uint32_t(to), std::memory_order_relaxed));
    return true;
  }

 private:
  std::vector<std::thread> workers;
  alignas(64) std::atomic<uint32_t> job{0};
  alignas(64) std::atomic<uint32_t> arrived{0};
  alignas(64) std::atomic<uint32_t> phase{0};
  alignas(64) std::atomic<uint32_t> taken{0};
  void (*call)(void*, int) = nullptr;
  void* argument = nullptr;

  static void wait(std::atomic<uint32_t>& value, uint32_t old) {
    using clock = std::chrono::steady_clock;
    const auto end = clock::now() + std::chrono::microseconds(50);
    do {
      for (int i = 0; i < 16; i++, relax())
        if (value.load(std::memory_order_acquire) != old) return;
    } while (clock::now() < end);
    while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
  }
  void work(int t) {
#if defined(__linux__)
    // OpenMP pins the thread that made this one, and its children would inherit that one core.
    if (getenv("OMP_PROC_BIND") || getenv("GOMP_CPU_AFFINITY") || getenv("KMP_AFFINITY")) {
      cpu_set_t all;
      memset(&all, 0xff, sizeof all);
      sched_setaffinity(0, sizeof all, &all);
    }
#endif
    for (uint32_t seen = 0;; seen++) {
      wait(job, seen);
      if (!call) return;
      call(argument, t);
      barrier();
    }
  }
};
