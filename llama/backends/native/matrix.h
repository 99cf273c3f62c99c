// Vectors of LANES numbers for each kind of machine, and the layout of matrices and activations for them.
//
// A matrix is stored in tiles of LANES output rows, with units of 4 bytes of each row interleaved: a vector
// holds the same few inputs of LANES rows, so every sum stays in its lane. A unit is 1 fp32, 2 bf16 or 4
// int8. int8, int5 and int4 have groups of 32 inputs with an fp16 scale (and min) per output row,
// w = scale * q + min; they multiply int8 activations, which also have a scale per 32 inputs.
//
// Sums must be the same however many rows a step has, so the compiler must not choose where to fuse a
// product and a sum (-ffp-contract=off): `fma` does so explicitly.
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
#if LANES == 16 && defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__linux__)
#define AMX
#endif

// acc + 4 products of bytes per lane.
#if LANES == 16
#define DOT4(acc, w, x) (I)_mm512_dpbusd_epi32((__m512i)(acc), (__m512i)(w), (__m512i)(x))
#elif LANES == 8 && defined(__AVXVNNI__)
#define DOT4(acc, w, x) (I)_mm256_dpbusd_avx_epi32((__m256i)(acc), (__m256i)(w), (__m256i)(x))
#elif defined(__ARM_FEATURE_DOTPROD)
#define DOT4(acc, w, x) (I)vdotq_s32((int32x4_t)(acc), (int8x16_t)(w), (int8x16_t)(x))
#endif
// On x86, DOT4 takes weights as unsigned: int8 as value + 128. It is stored so, unless AMX reads it too.
#if defined(DOT4) && defined(__x86_64__)
constexpr uint32_t FLIP = 0x80808080;
#else
constexpr uint32_t FLIP = 0;
#endif
#ifdef AMX
constexpr uint32_t STORED_FLIP = 0;
#else
constexpr uint32_t STORED_FLIP = FLIP;
#endif
#if LANES == 16 && defined(__AVX512BF16__)
constexpr bool BF16_PRODUCTS = true;
#else
constexpr bool BF16_PRODUCTS = false;  // bf16 weights are widened, and activations are fp32
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
static inline bool any(I v) { int some = 0; for (int i = 0; i < LANES; i++) some |= v[i]; return some; }

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

// ---- 16-bit numbers

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
  const float scaled = load<float>(&shifted) * 0x1p112f;  // makes subnormal numbers normal
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

// ---- functions of vectors

static inline F exponential(F x) {  // Cephes' polynomial, error 2e-7; NaN stays NaN
  x = x < -87.f ? splat(-87.f) : x > 88.f ? splat(88.f) : x;
  constexpr float ROUND = 12582912 + 127;  // 1.5 · 2^23 leaves only the integer part, in the low bits, like 2^n's 127 + n
  const F n = fma(x, splat(1.44269504f), splat(ROUND)), m = n - ROUND;
  const F r = fma(m, splat(2.12194440e-4f), fma(m, splat(-0.693359375f), x));
  F p = splat(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, .5f}) p = fma(p, r, splat(c));
  return fma(p, r * r, r + 1.f) * (F)((I)n << 23);
}

// Transposes rows of LANES 32-bit numbers: log2(LANES) rounds of a perfect shuffle.
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

static inline I larger(I a, I b) { return a > b ? a : b; }
// All lanes of v combined: each time, one half of them with the other.
template <class V, class Combine> static inline auto reduce(V v, Combine combine) {
#pragma GCC unroll 4
  for (int round = 1; round < LANES; round *= 2) v = combine(ZIP_LOW(v, v), ZIP_HIGH(v, v));
  return v[0];
}
template <class V> static inline auto sum(V v) { return reduce(v, [](V a, V b) { return a + b; }); }
template <class V> static inline auto largest(V v) { return reduce(v, [](V a, V b) { return larger(a, b); }); }

// ---- the layout of matrices

constexpr int GROUP = 32;                  // inputs that share a scale
constexpr int ROWS = LANES == 16 ? 8 : 4;  // rows of activations multiplied at once, limited by registers

enum Kind : int32_t { FP32, BF16, INT8, INT5, INT4 };

struct Matrix {                  // (rows, cols)
  int32_t kind, rows, cols, tiled;  // not tiled: fp32 or bf16 as in a file, row after row
  const uint8_t* weight;
  const uint16_t *scale, *min;   // fp16, tiles of (cols / 32, LANES); min may be null: symmetric, -8 or -16 · scale
  int32_t parts;                 // int8 rows per row of activations: 1, or 2, the second for what rounding the first left
};
constexpr int tiles_of(int rows) { return (rows + LANES - 1) / LANES; }
constexpr int pairs_of(int rows) { return (tiles_of(rows) + 1) / 2; }
constexpr bool grouped(int kind) { return kind >= INT8; }
// Bytes of LANES rows of one group. int5: a vector with the fifth bits, then as int4.
constexpr int group_bytes(int kind) { return 4 * LANES * (kind == INT8 ? 8 : kind == INT5 ? 5 : 4); }
static size_t tile_bytes(int kind, int cols) {
  return grouped(kind) ? size_t(cols / GROUP) * group_bytes(kind) : size_t(cols) * LANES * (kind == FP32 ? 4 : 2);
}

// `rows` ≤ LANES rows of `units`, `stride` bytes apart, as one tile; missing rows are 0.
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

// The 8 vectors of a group, int8 with FLIP: inputs 4 j … 4 j + 3 in vector j. A byte's low nibble is an input of the
// group's first half, its high nibble one of the second.
template <int K> static inline void unpack(const uint8_t* group, Bytes w[8]) {
  if (K == INT8) {
    for (int j = 0; j < 8; j++) w[j] = (Bytes)(load<U>(group + j * sizeof(U)) ^ (FLIP ^ STORED_FLIP));
    return;
  }
  for (int j = 0; j < 4; j++) {
    const U both = load<U>(group + (j + (K == INT5)) * sizeof(U));
    U low = both & 0x0f0f0f0f, high = (both >> 4) & 0x0f0f0f0f;
    if (K == INT5) {
      const U fifth = load<U>(group);  // bit j of a byte belongs to vector j
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
    for (int j = 0; j < 8; j++) store(w + j, load<U>(w + j) ^ STORED_FLIP);
  if (kind == INT5) {
    U fifth = {};
    for (int i = 0; i < 32; i++) fifth |= ((load<U>(w) >> i) & 1) << (i % 4 * 8 + i / 4);
    store(w, fifth);
  }
}

// What int5 and int4 without a min subtract from each value, in units of the scale.
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
      int q = m.kind == INT8 ? int8_t(group[i / 4 * sizeof(U) + byte] ^ uint8_t(STORED_FLIP))
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

// A line of the cache. A vector that crosses two of them loads more slowly, a tile for AMX several times more slowly.
struct alignas(64) Line { uint32_t units[16]; };

// ---- activations

// Rows of activations in the form that a kind of matrix needs: bf16, fp32, or int8 in groups.
struct Inputs {
  std::vector<Line> lines;
  std::vector<float> scale, scaled_sum;  // per group: (rows / ROWS, groups, ROWS)
  std::vector<int32_t> offset;           // where its sum starts, if FLIP
  int stride = 0, groups = 0;

  void resize(int rows, int cols) {
    rows = (rows + ROWS - 1) / ROWS * ROWS;  // so that ROWS can always be read
    // A row takes two extra cache lines; otherwise rows of 2^n would all map to the same cache set.
    stride = cols + 32, groups = cols / GROUP;
    lines.resize(size_t(rows) * stride / 16);
    scale.resize(size_t(rows) * groups), scaled_sum.resize(scale.size()), offset.resize(scale.size());
  }
  const uint32_t* row(int i) const { return lines[0].units + size_t(i) * stride; }
  uint32_t* row(int i) { return lines[0].units + size_t(i) * stride; }
  // Where a row has the bytes of group g. With AMX, a half row has [group 0, 0, group 2, 0 …], the other
  // [0, group 1, 0, group 3 …]: as rows of a matrix, these multiply two groups of weights to separate sums.
  size_t place(int g) const {
#ifdef AMX
    return g / 2 * 2 * GROUP + (g % 2 ? 2 * stride + GROUP : 0);
#else
    return size_t(g) * GROUP;
#endif
  }
  void put(int kind, int i, int col, F x) {
    uint32_t* to = row(i);
    if (kind == BF16 && BF16_PRODUCTS) store((uint16_t*)to + col, to_bf16(x));
    else store(to + col, x);
  }
  void set(const Matrix& m, int i, const float* x) {
    if (!grouped(m.kind)) {
      for (int k = 0; k < m.cols; k += LANES) put(m.kind, i, k, load<F>(x + k));
      return;
    }
    for (int g = 0; g < m.cols / GROUP; g++) {
      F rest[GROUP / LANES];
      for (F& v : rest) v = load<F>(x), x += LANES;
      for (int part = 0; part < m.parts; part++) set_group(i * m.parts + part, g, rest);
    }
  }
  // Rounds a group to int8, and leaves in x what that has taken from it.
  void set_group(int i, int g, F x[GROUP / LANES]) {
    int8_t* to = (int8_t*)row(i) + place(g);
#ifdef AMX
    memset(g % 2 ? to - GROUP : to + GROUP, 0, GROUP);
#endif
    I bits = {}, total = {};  // the largest magnitude, compared as integers, where NaN is the largest
    for (int k = 0; k < GROUP / LANES; k++) bits = larger(bits, (I)x[k] & 0x7fffffff);
    const int32_t most_bits = largest(bits);
    const float most = load<float>(&most_bits), unit = most / 127, inverse = most > 1e-30f ? 127 / most : 0;
    for (int k = 0; k < GROUP / LANES; k++) {
      const F rounded = x[k] * inverse + 12582912.f;  // 1.5 · 2^23 leaves only the integer part
      const I q = (I)rounded - 0x4b400000;
      total += q;
      store(to + k * LANES, __builtin_convertvector(q, Quarters));
      x[k] = fma(to_float(q), splat(-unit), x[k]);
    }
    const int whole = sum(total);
    const size_t at = (size_t(i / ROWS) * groups + g) * ROWS + i % ROWS;
    scale[at] = unit, scaled_sum[at] = unit * whole, offset[at] = FLIP ? -128 * whole : 0;
  }
};

struct Tile { const uint8_t* weight; const uint16_t *scale, *min; };

// Tile i of a matrix; if it is not stored in tiles, its rows are arranged as one in the buffer.
static Tile tile_of(const Matrix& m, int i, uint32_t* buffer) {
  const size_t scales = size_t(i) * (m.cols / GROUP) * LANES, bytes = size_t(m.cols) * (m.kind == FP32 ? 4 : 2);
  if (m.tiled) return {m.weight + i * tile_bytes(m.kind, m.cols), m.scale + scales, m.min ? m.min + scales : nullptr};
  tile_units(m.weight + i * LANES * bytes, bytes, std::min(LANES, m.rows - i * LANES), int(bytes / 4), buffer);
  return {(const uint8_t*)buffer, nullptr, nullptr};
}

// All of a quantized tile as fp32, (LANES, cols); rows beyond the matrix's are left out.
template <int K> static void widen_tile(const Matrix& m, int tile, float* out) {
  const Tile from = tile_of(m, tile, nullptr);
  for (int g = 0; g < m.cols / GROUP; g++, out += GROUP) {
    Bytes w[8];
    unpack<K>(from.weight + size_t(g) * group_bytes(K), w);
    const F scale = from_half(load<Halves>(from.scale + g * LANES));
    const F min = from.min ? from_half(load<Halves>(from.min + g * LANES)) : scale * -middle(K);
    for (int k = 0; k < GROUP; k += LANES) {
      U rows[LANES];  // before they are transposed, of one input each
      for (int j = 0; j < LANES; j++) {
        const I q = (I)(((U)w[(k + j) / 4] ^ (K == INT8 ? FLIP : 0)) << (24 - (k + j) % 4 * 8)) >> 24;
        rows[j] = (U)(K == INT8 ? to_float(q) * scale : to_float(q) * scale + min);
      }
      transpose(rows);
      for (int r = 0; r < std::min(LANES, m.rows - tile * LANES); r++) store(out + size_t(r) * m.cols + k, rows[r]);
    }
  }
}
