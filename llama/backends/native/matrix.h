// Vectors of LANES numbers as each machine has them, how a matrix is laid out for them, and its products.
//
// A matrix is stored in tiles of LANES output rows, units of 4 bytes of each row side by side: a vector
// holds the same few inputs of LANES rows, so every sum stays in its lane. A unit is 1 fp32, 2 bf16 or 4
// int8. int8, int5 and int4 come in groups of 32 inputs with an fp16 scale (and min) for each output row,
// w = scale * q + min; they multiply activations of int8, with a scale for each 32 as well.
//
// Sums must come out the same however many rows a step has, so the compiler may not fuse a product and
// a sum where it likes (-ffp-contract=off): `fma` says where.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define LANES 16
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define LANES 8
#else
#define LANES 4
#endif
#if LANES == 16 && defined(__AMX_BF16__) && defined(__linux__)
#define AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

// acc + 4 products of bytes a lane. Where the weights w are unsigned in it, int8 is stored as value + 128.
#if LANES == 16
#define DOT4(acc, w, x) (I)_mm512_dpbusd_epi32((__m512i)(acc), (__m512i)(w), (__m512i)(x))
#elif LANES == 8 && defined(__AVXVNNI__)
#define DOT4(acc, w, x) (I)_mm256_dpbusd_avx_epi32((__m256i)(acc), (__m256i)(w), (__m256i)(x))
#elif defined(__ARM_FEATURE_DOTPROD)
#define DOT4(acc, w, x) (I)vdotq_s32((int32x4_t)(acc), (int8x16_t)(w), (int8x16_t)(x))
#endif
#if defined(DOT4) && defined(__x86_64__)
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
  F f = {};
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
#ifdef DOT4
  I acc = splat(start);
#pragma GCC unroll 8
  for (int j = 0; j < 8; j++) acc = DOT4(acc, w[j], splat(load<int32_t>(x + 4 * j)));
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

// ---- the layout of matrices

constexpr int GROUP = 32;                  // inputs that share a scale
constexpr int ROWS = LANES == 16 ? 8 : 4;  // of activations, multiplied at once: as registers allow

enum Kind : int32_t { FP32, BF16, INT8, INT5, INT4 };

struct Matrix {                  // (rows, cols)
  int32_t kind, rows, cols, tiled;  // not tiled: fp32 or bf16 as in a file, row after row
  const uint8_t* weight;
  const uint16_t *scale, *min;   // fp16, tiles of (cols / 32, LANES); min may be null: symmetric, -8 or -16 · scale
};
constexpr int tiles_of(int rows) { return (rows + LANES - 1) / LANES; }
constexpr bool grouped(int kind) { return kind >= INT8; }
// Bytes of LANES rows and one group. int5: a vector with the fifth bits, then as int4.
constexpr int group_bytes(int kind) { return 4 * LANES * (kind == INT8 ? 8 : kind == INT5 ? 5 : 4); }
static size_t tile_bytes(int kind, int cols) {
  return grouped(kind) ? size_t(cols / GROUP) * group_bytes(kind) : size_t(cols) * LANES * (kind == FP32 ? 4 : 2);
}

// `rows` ≤ LANES rows of `units`, each `stride` bytes behind the last, as one tile; rows that are missing are 0.
static void tile_units(const uint8_t* from, size_t stride, int rows, int units, uint32_t* to) {
  int k = 0;
  for (; k + LANES <= units; k += LANES, to += LANES * LANES) {
    U v[LANES];
    for (int r = 0; r < LANES; r++) v[r] = r < rows ? load<U>(from + r * stride + 4 * size_t(k)) : U{};
    transpose(v);
    for (int r = 0; r < LANES; r++) store(to + r * LANES, v[r]);
  }
  for (; k < units; k++, to += LANES)
    for (int r = 0; r < LANES; r++) to[r] = r < rows ? load<uint32_t>(from + r * stride + 4 * size_t(k)) : 0;
}

// The 8 vectors of a group: inputs 4 j … 4 j + 3 in vector j. A byte's low nibble is an input of the
// group's first half, its high nibble one of the second.
template <int K> static inline void unpack(const uint8_t* group, Bytes w[8]) {
  if (K == INT8) {
    for (int j = 0; j < 8; j++) w[j] = load<Bytes>(group + j * sizeof(U));
    return;
  }
  for (int j = 0; j < 4; j++) {
    const U both = load<U>(group + (j + (K == INT5)) * sizeof(U));
    U low = both & 0x0f0f0f0f, high = (both >> 4) & 0x0f0f0f0f;
    if (K == INT5) {
      const U fifth = load<U>(group);  // bit j of a byte: of vector j
      low |= (fifth << (4 - j)) & 0x10101010, high |= (fifth >> j) & 0x10101010;
    }
    w[j] = (Bytes)low, w[j + 4] = (Bytes)high;
  }
}
// The same from LANES rows of a file, where bit i of the first 4 bytes of int5 is input i's fifth.
static void pack_group(int kind, const uint8_t* from, size_t stride, int rows, uint8_t* to) {
  U* w = (U*)to;
  tile_units(from, stride, rows, group_bytes(kind) / int(sizeof(U)), (uint32_t*)to);
  if (kind == INT8)
    for (int j = 0; j < 8; j++) store(w + j, load<U>(w + j) ^ FLIP);
  if (kind == INT5) {
    U fifth = {};
    for (int i = 0; i < 32; i++) fifth |= ((load<U>(w) >> i) & 1) << (i % 4 * 8 + i / 4);
    store(w, fifth);
  }
}

// What int5 and int4 without a min subtract from each value, times the scale.
constexpr float middle(int kind) { return kind == INT5 ? 16 : kind == INT4 ? 8 : 0; }

// One row as fp32: an embedding.
static void read_row(const Matrix& m, int row, float* out) {
  const int lane = row % LANES, per_unit = m.kind == FP32 ? 1 : m.kind == BF16 ? 2 : 4;
  const uint8_t* tile = m.weight + row / LANES * tile_bytes(m.kind, m.cols);
  for (int k = 0; k < m.cols; k++) {
    if (grouped(m.kind)) {
      const size_t at = (size_t(row / LANES) * (m.cols / GROUP) + k / GROUP) * LANES + lane;
      const uint8_t* group = tile + k / GROUP * group_bytes(m.kind);
      const int i = k % GROUP, byte = lane * 4 + i % 4, first = m.kind == INT5;
      int q = m.kind == INT8 ? int8_t(group[i / 4 * sizeof(U) + byte] ^ uint8_t(FLIP))
                             : group[(first + i / 4 % 4) * sizeof(U) + byte] >> (i < 16 ? 0 : 4) & 15;
      if (m.kind == INT5) q |= (group[byte] >> (i / 4) & 1) << 4;
      const float scale = from_half(m.scale[at]);
      out[k] = scale * q + (m.min ? from_half(m.min[at]) : -middle(m.kind) * scale);
    } else {
      const size_t unit = m.tiled ? size_t(k / per_unit) * LANES + lane : size_t(row) * (m.cols / per_unit) + k / per_unit;
      const uint8_t* at = (m.tiled ? tile : m.weight) + unit * 4;
      out[k] = m.kind == FP32 ? load<float>(at) : from_bf16(load<uint16_t>(at + k % 2 * 2));
    }
  }
}

// ---- products

// Rows of activations in the form that a kind of matrix multiplies: bf16, fp32, or int8 in groups.
struct Inputs {
  std::vector<uint32_t> values;
  std::vector<float> scale, scaled_sum;  // of each group
  std::vector<int32_t> offset;           // where its sum starts, if int8 weights have 128 added
  int stride = 0, groups = 0;

  void resize(int rows, int cols) {
    // A row takes one cache line more than it needs, or rows of 2^n would all fall into the same cache set.
    stride = cols + 16, groups = cols / GROUP;
    values.resize(size_t(rows) * stride);
    scale.resize(size_t(rows) * groups), scaled_sum.resize(scale.size()), offset.resize(scale.size());
  }
  const uint32_t* row(int i) const { return values.data() + size_t(i) * stride; }
  void put(int kind, int i, int col, F x) {
    uint32_t* to = values.data() + size_t(i) * stride;
    if (kind == BF16 && BF16_PRODUCTS) store((uint16_t*)to + col, to_bf16(x));
    else store(to + col, x);
  }
  void set(const Matrix& m, int i, const float* x) {
    if (!grouped(m.kind)) {
      for (int k = 0; k < m.cols; k += LANES) put(m.kind, i, k, load<F>(x + k));
      return;
    }
    int8_t* to = (int8_t*)(values.data() + size_t(i) * stride);
    for (int g = 0; g < m.cols / GROUP; g++, x += GROUP, to += GROUP) {
      I bits = {};  // the largest size, found among whole numbers: there NaN is larger than all others
      for (int k = 0; k < GROUP; k += LANES) {
        const I v = load<I>(x + k) & 0x7fffffff;
        bits = v > bits ? v : bits;
      }
      int32_t most_bits = 0;
      for (int k = 0; k < LANES; k++) most_bits = std::max(most_bits, bits[k]);
      const float most = load<float>(&most_bits), inverse = most > 1e-30f ? 127 / most : 0;
      I total = {};
      for (int k = 0; k < GROUP; k += LANES) {
        const F rounded = load<F>(x + k) * inverse + 12582912.f;  // 1.5 · 2^23: what is left is the integer
        const I q = (I)rounded - 0x4b400000;
        total += q;
        store(to + k, __builtin_convertvector(q, Quarters));
      }
      int whole = 0;
      for (int k = 0; k < LANES; k++) whole += total[k];
      const size_t at = size_t(i) * groups + g;
      scale[at] = most / 127, scaled_sum[at] = scale[at] * whole, offset[at] = FLIP ? -128 * whole : 0;
    }
  }
};

struct Tile { const uint8_t* weight; const uint16_t *scale, *min; };

// Tile i of a matrix; if it is not stored in tiles, its rows are laid out as one in the buffer.
static Tile tile_of(const Matrix& m, int i, uint32_t* buffer) {
  const size_t scales = size_t(i) * (m.cols / GROUP) * LANES, bytes = size_t(m.cols) * (m.kind == FP32 ? 4 : 2);
  if (m.tiled) return {m.weight + i * tile_bytes(m.kind, m.cols), m.scale + scales, m.min ? m.min + scales : nullptr};
  tile_units(m.weight + i * LANES * bytes, bytes, std::min(LANES, m.rows - i * LANES), int(bytes / 4), buffer);
  return {(const uint8_t*)buffer, nullptr, nullptr};
}

// out[b][t] = products of tile t with row first + b of x.
template <int K, int T, int B>
__attribute__((noinline)) static void product(const Tile* tiles, int cols, const Inputs& x, int first, F (*out)[T]) {
  F acc[B][T] = {};
  const uint32_t* from = x.row(first);
  const size_t stride = x.stride;
  if constexpr (grouped(K)) {
    constexpr int TOGETHER = B > 2 ? 1 : T;  // tiles at once: as registers allow
    const float *scales = &x.scale[size_t(first) * x.groups], *sums = &x.scaled_sum[size_t(first) * x.groups];
    const int32_t* offsets = &x.offset[size_t(first) * x.groups];
    for (int pass = 0; pass < T; pass += TOGETHER)
      for (int g = 0; g < cols / GROUP; g++)
#pragma GCC unroll 2
        for (int t = pass; t < pass + TOGETHER; t++) {
          Bytes w[8];
          unpack<K>(tiles[t].weight + size_t(g) * group_bytes(K), w);
          const F scale = from_half(load<Halves>(tiles[t].scale + g * LANES));
          const F min = tiles[t].min ? from_half(load<Halves>(tiles[t].min + g * LANES)) : scale * -middle(K);
#pragma GCC unroll 8
          for (int b = 0; b < B; b++) {
            const int at = b * x.groups + g;
            const F sum = dot32<K != INT8>(w, (const uint8_t*)(from + b * stride) + g * GROUP, K == INT8 ? offsets[at] : 0);
            acc[b][t] = fma(sum, scale * scales[at], acc[b][t]);
            if (K != INT8) acc[b][t] = fma(min, splat(sums[at]), acc[b][t]);
          }
        }
  } else {
    constexpr int STEP = K == BF16 && !BF16_PRODUCTS ? 2 : 1;  // numbers of x that meet a unit of w
    const int units = K == FP32 ? cols : cols / 2;
    for (int k = 0; k < units; k++)
#pragma GCC unroll 2
      for (int t = 0; t < T; t++) {
        const U w = load<U>(tiles[t].weight + size_t(k) * sizeof(U));
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) {
          const uint32_t* in = from + b * stride + k * STEP;
          acc[b][t] = K == FP32 ? fma((F)w, splat(load<float>(in)), acc[b][t]) : dot2(acc[b][t], w, in);
        }
      }
  }
  memcpy(out, acc, sizeof acc);
}

#ifdef AMX
// Linux lends a process the registers of AMX when it asks for them.
static bool has_amx() {
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18;
  static const bool granted = !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA);
  return granted;
}
constexpr int BLOCK = 32;  // rows of activations that AMX multiplies at once, in two halves

// As `product`, for bf16 and up to BLOCK rows. A tile is the transposed matrix that AMX wants, 32 inputs in
// 1 KB. Its sums are in an order of its own, but the same for any number of rows.
template <int T>
__attribute__((noinline)) static void product_by_amx(const Tile* tiles, int cols, const Inputs& x, int first, int rows, F (*out)[T]) {
  struct alignas(64) { uint8_t palette, start, zero[14]; uint16_t bytes[16]; uint8_t rows[16]; } shape = {1, 0, {}, {}, {}};
  const int upper = std::min(rows, 16), lower = rows - upper;
  // Registers 0 and 1 have the upper rows' sums, 2 and 3 the lower ones', 4 and 5 their inputs, 6 and 7 weights.
  const int heights[8] = {upper, upper, lower, lower, upper, lower, 16, 16};
  for (int i = 0; i < 8; i++) shape.rows[i] = uint8_t(heights[i]), shape.bytes[i] = heights[i] ? 64 : 0;
  _tile_loadconfig(&shape);  // which sets them to 0
  const uint8_t *a = (const uint8_t*)x.row(first), *w0 = tiles[0].weight, *w1 = tiles[T - 1].weight;
  const size_t stride = size_t(x.stride) * 4;
  for (int k = 0; k < cols / 32; k++, a += 64, w0 += 1024, w1 += 1024) {
    _tile_loadd(4, a, stride);
    _tile_loadd(6, w0, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (T == 2) { _tile_loadd(7, w1, 64); _tile_dpbf16ps(1, 4, 7); }
    if (lower) { _tile_loadd(5, a + 16 * stride, stride); _tile_dpbf16ps(2, 5, 6); }
    if (lower && T == 2) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, &out[0][0], sizeof out[0]);
  if (T == 2) _tile_stored(1, &out[0][T - 1], sizeof out[0]);
  if (lower) _tile_stored(2, &out[16][0], sizeof out[0]);
  if (lower && T == 2) _tile_stored(3, &out[16][T - 1], sizeof out[0]);
  _tile_release();
  for (int unit = cols / 32 * 16; unit < cols / 2; unit++)  // of heads of 16 or 80 channels
    for (int t = 0; t < T; t++)
      for (int b = 0; b < rows; b++)
        out[b][t] = dot2(out[b][t], load<U>(tiles[t].weight + unit * sizeof(U)), x.row(first + b) + unit);
}
#endif

// use(row, products of T tiles) for n rows of x.
template <int T, int B = ROWS, class Use>
static void for_rows(int kind, const Tile (&tiles)[T], int cols, const Inputs& x, int first, int n, Use& use) {
#ifdef AMX
  if (kind == BF16 && has_amx()) {
    F out[BLOCK][T];
    for (int rows; (rows = std::min(n, BLOCK)) > 0; first += rows, n -= rows) {
      product_by_amx<T>(tiles, cols, x, first, rows, out);
      for (int b = 0; b < rows; b++) use(first + b, out[b]);
    }
    return;
  }
#endif
  if constexpr (B > 0) {
    for (; n >= B; first += B, n -= B) {
      F out[B][T];
      if (kind == FP32) product<FP32, T, B>(tiles, cols, x, first, out);
      else if (kind == BF16) product<BF16, T, B>(tiles, cols, x, first, out);
      else if (kind == INT8) product<INT8, T, B>(tiles, cols, x, first, out);
      else if (kind == INT5) product<INT5, T, B>(tiles, cols, x, first, out);
      else product<INT4, T, B>(tiles, cols, x, first, out);
      for (int b = 0; b < B; b++) use(first + b, out[b]);
    }
    if (n) for_rows<T, B - 1>(kind, tiles, cols, x, first, n, use);
  }
}

// ---- products of attention weights with cached values, which lie by position

constexpr int CHUNK = 256;  // positions of the cache that are attended to as one

static inline F from_cache(const uint16_t* at) { return from_bf16(load<Halves>(at)); }
static inline F from_cache(const float* at) { return load<F>(at); }

// For Q queries: their sums of values, weighted by scores (Q, CHUNK), over the positions each can see.
// C vectors of channels; values has hd channels a position.
template <int Q, int C, class Element>
static inline void weigh(const Element* values, int hd, const float* scores, const int* visible, float* to, int stride) {
  F acc[Q][C] = {};
  int together = visible[0];
  for (int q = 1; q < Q; q++) together = std::min(together, visible[q]);
  for (int p = 0; p < together; p++)
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) {
      const F v = from_cache(values + size_t(p) * hd + c * LANES);
#pragma GCC unroll 4
      for (int q = 0; q < Q; q++) acc[q][c] = fma(splat(scores[q * CHUNK + p]), v, acc[q][c]);
    }
#pragma GCC unroll 4
  for (int q = 0; q < Q; q++) {
    for (int p = together; p < visible[q]; p++)
#pragma GCC unroll 4
      for (int c = 0; c < C; c++)
        acc[q][c] = fma(splat(scores[q * CHUNK + p]), from_cache(values + size_t(p) * hd + c * LANES), acc[q][c]);
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) store(to + q * stride + c * LANES, acc[q][c]);
  }
}
template <int Q = ROWS / 2, class Element>
static void weigh_all(int n, const Element* values, int hd, const float* scores, const int* visible, float* to, int stride) {
  if constexpr (Q > 0) {
    for (; n >= Q; n -= Q, scores += Q * CHUNK, visible += Q, to += Q * stride) {
      int d = 0;
      for (; d + 4 * LANES <= hd; d += 4 * LANES) weigh<Q, 4>(values + d, hd, scores, visible, to + d, stride);
      for (; d < hd; d += LANES) weigh<Q, 1>(values + d, hd, scores, visible, to + d, stride);
    }
    if (n) weigh_all<Q - 1>(n, values, hd, scores, visible, to, stride);
  }
}
