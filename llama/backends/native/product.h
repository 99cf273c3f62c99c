// Products of matrices and activations, by vectors and by AMX.
//
// An output's sum has one order, however many rows a step has. Sums of bytes within a group are whole numbers,
// so AMX's are the same as those of vectors; AMX's sums of bf16 are not, so AMX multiplies all rows if any.
#pragma once
#include "matrix.h"
#ifdef AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

// ---- products

// A step waits for its weights, so they are asked for ahead of time; the hardware does so too, but not across pages,
// nor as far ahead as several rows need, whose products leave less room for loads in the core's queue.
// Into the second cache, because the first can wait for few lines at once.
constexpr int ahead(int rows, int streams) { return (rows == 1 ? 4096 : 8192) / streams; }  // bytes
static inline void prefetch(const void* at) { __builtin_prefetch(at, 0, 2); }

// acc + two products per lane. w: 2 bf16. x: from `activation_pair`.
static inline F dot2(F acc, U w, const uint32_t* x) {
#if LANES == 16 && defined(__AVX512BF16__)
  return (F)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)splat(*x));  // x: 2 bf16
#else
  const float* pair = (const float*)x;  // x: 2 fp32
  return fma((F)(w & 0xffff0000u), splat(pair[1]), fma((F)(w << 16), splat(pair[0]), acc));
#endif
}

// start + products of 32 inputs per lane: w has 4 in each of 8 vectors, x is int8 and the same for all lanes.
// w: signed, or value + 128 if FLIP; 0 … 31 if SMALL. The sum is exact.
template <bool SMALL> static inline F dot32(const Bytes w[8], const uint8_t* x, int32_t start) {
#ifdef DOT4
  I acc = splat(start);
#pragma GCC unroll 8
  for (int j = 0; j < 8; j++) acc = DOT4(acc, w[j], splat(load<int32_t>(x + 4 * j)));
  return to_float(acc);
#elif LANES == 8
  // Pairs of products are summed in 16 bits: four small ones fit, or one pair of |w| times x with w's sign.
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

// out[b][t] = products of tile t with row first + b of x; `first` is a multiple of ROWS if the kind is grouped.
template <int K, int T, int B>
__attribute__((noinline)) static void product(const Tile* tiles, int cols, const Inputs& x, int first, F (*out)[T]) {
  F acc[B][T] = {};
  const uint32_t* from = x.row(first);
  const size_t stride = x.stride;
  if constexpr (grouped(K)) {
    constexpr int TOGETHER = B > 2 ? 1 : T;  // tiles at once, limited by registers
    const float *scales = &x.scale[size_t(first) * x.groups], *sums = &x.scaled_sum[size_t(first) * x.groups];
    const int32_t* offsets = &x.offset[size_t(first) * x.groups];
    for (int pass = 0; pass < T; pass += TOGETHER)
      for (int g = 0; g < cols / GROUP; g++)
#pragma GCC unroll 2
        for (int t = pass; t < pass + TOGETHER; t++) {
          const uint8_t* at = tiles[t].weight + size_t(g) * group_bytes(K);
          for (int i = 0; i < group_bytes(K); i += 64) prefetch(at + ahead(B, TOGETHER) + i);
          Bytes w[8];
          unpack<K>(at, w);
          const F scale = from_half(load<Halves>(tiles[t].scale + g * LANES));
          const F min = tiles[t].min ? from_half(load<Halves>(tiles[t].min + g * LANES)) : scale * -middle(K);
#pragma GCC unroll 8
          for (int b = 0; b < B; b++) {
            const int at = g * ROWS + b;
            const F sum = dot32<K != INT8>(w, (const uint8_t*)(from + b * stride) + x.place(g), K == INT8 ? offsets[at] : 0);
            acc[b][t] = fma(sum, scale * scales[at], acc[b][t]);
            if (K != INT8) acc[b][t] = fma(min, splat(sums[at]), acc[b][t]);
          }
        }
  } else {
    constexpr int STEP = K == BF16 && !BF16_PRODUCTS ? 2 : 1;  // numbers of x per unit of w
    const int units = K == FP32 ? cols : cols / 2;
    for (int k = 0; k < units; k++)
#pragma GCC unroll 2
      for (int t = 0; t < T; t++) {
        const uint8_t* at = tiles[t].weight + size_t(k) * sizeof(U);
        prefetch(at + ahead(B, T));
        const U w = load<U>(at);
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) {
          const uint32_t* in = from + b * stride + k * STEP;
          acc[b][t] = K == FP32 ? fma((F)w, splat(load<float>(in)), acc[b][t]) : dot2(acc[b][t], w, in);
        }
      }
  }
  memcpy(out, acc, sizeof acc);
}

constexpr int PANEL = 128;  // rows that some tiles are multiplied with in turn, so that both stay in the core's cache

#ifdef AMX
// On Linux, a process must request permission to use AMX registers.
static bool has_amx() {
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18;
  static const bool granted = !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA);
  return granted;
}
// Before AMX reads what was written: compilers do not know that it reads memory.
static inline void fence() { asm volatile("" ::: "memory"); }

// Gives the registers their shapes, 64 bytes wide, and clears them: 0 and 1 are for sums of the upper rows of
// activations, 2 and 3 for those of the lower rows, 4 for the upper rows, 5 for the lower rows, 6 and 7 for weights.
static void use_amx(int upper, int lower) {
  struct alignas(64) { uint8_t palette, start, zero[14]; uint16_t bytes[16]; uint8_t rows[16]; } shape = {1, 0, {}, {}, {}};
  const int heights[8] = {upper, upper, lower, lower, upper, lower, 16, 16};
  for (int i = 0; i < 8; i++) shape.rows[i] = uint8_t(heights[i]), shape.bytes[i] = heights[i] ? 64 : 0;
  fence();
  _tile_loadconfig(&shape);
}
constexpr int BLOCK = 32;  // rows of bf16 that are multiplied at once, in two halves
constexpr int FEWEST = 6;  // rows of bytes; fewer are faster by vectors

// Like `product`, for bf16 and up to PANEL rows. A tile is the transposed matrix that AMX needs, 32 inputs in
// 1 KB. Its sums have their own order, but the same one for any number of rows.
template <int T>
__attribute__((noinline)) static void bf16_by_amx(const Tile* tiles, int cols, const Inputs& x, int first, int rows, F (*out)[T]) {
  constexpr int DEPTH = 8;  // tiles of inputs that all rows are multiplied by in turn, so that they stay in the first cache
  const size_t stride = size_t(x.stride) * 4, row_bytes = sizeof out[0];
  int height = 0, from = 0;
  do {
    const int to = std::min(from + DEPTH, cols / 32);
    for (int row = 0; row < rows; row += BLOCK) {
      const int upper = std::min(rows - row, 16), lower = std::min(rows - row - upper, 16);
      if (height != upper + lower) use_amx(upper, lower), height = upper + lower;
      F *high = out[row], *low = out[row + 16];
      if (from) {
        _tile_loadd(0, high, row_bytes);
        if (T == 2) _tile_loadd(1, high + T - 1, row_bytes);
        if (lower) _tile_loadd(2, low, row_bytes);
        if (lower && T == 2) _tile_loadd(3, low + T - 1, row_bytes);
      } else {
        _tile_zero(0);
        if (T == 2) _tile_zero(1);
        if (lower) _tile_zero(2);
        if (lower && T == 2) _tile_zero(3);
      }
      const uint8_t *a = (const uint8_t*)x.row(first + row) + from * 64, *b = a + 16 * stride;
      for (int k = from; k < to; k++, a += 64, b += 64) {
        _tile_loadd(4, a, stride);
        _tile_loadd(6, tiles[0].weight + k * 1024, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (T == 2) { _tile_loadd(7, tiles[T - 1].weight + k * 1024, 64); _tile_dpbf16ps(1, 4, 7); }
        if (lower) { _tile_loadd(5, b, stride); _tile_dpbf16ps(2, 5, 6); }
        if (lower && T == 2) _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, high, row_bytes);
      if (T == 2) _tile_stored(1, high + T - 1, row_bytes);
      if (lower) _tile_stored(2, low, row_bytes);
      if (lower && T == 2) _tile_stored(3, low + T - 1, row_bytes);
    }
  } while ((from += DEPTH) < cols / 32);
  _tile_release();
  for (int unit = cols / 32 * 16; unit < cols / 2; unit++)  // for heads of 16 or 80 channels
    for (int t = 0; t < T; t++)
      for (int b = 0; b < rows; b++)
        out[b][t] = dot2(out[b][t], load<U>(tiles[t].weight + unit * sizeof(U)), x.row(first + b) + unit);
}

// Like `product`, and equal to it, for bytes and up to PANEL rows. Two groups at once: a register has ROWS rows
// of activations twice, once with zeros for the second group and once with zeros for the first.
template <int K, int T>
__attribute__((noinline)) static void bytes_by_amx(const Tile* tiles, int cols, const Inputs& x, int first, int rows, F (*out)[T]) {
  constexpr int MOST = 16;  // groups at a time, so that they stay in the core's first cache
  Bytes unpacked[T][K == INT8 ? 1 : MOST][8];
  I buffers[2][T][2 * ROWS];  // for sums of two groups: AMX fills one while the other is read
  use_amx(16, 16);
  for (int from = 0, groups; (groups = std::min(MOST, cols / GROUP - from)) > 0; from += MOST) {
    const uint8_t* weights[T];
    for (int t = 0; t < T; t++) {
      weights[t] = tiles[t].weight + size_t(from) * group_bytes(K);
      if (K == INT8) continue;  // AMX reads it where it is
      for (int g = 0; g < groups; g++) unpack<K>(weights[t] + g * group_bytes(K), unpacked[t][g]);
      weights[t] = (const uint8_t*)unpacked[t];
    }
    fence();
    for (int row = 0; row < rows; row += ROWS) {
      const uint8_t* in = (const uint8_t*)x.row(first + row) + x.place(from);
      const size_t at = (size_t(first + row) / ROWS * x.groups + from) * ROWS, half = size_t(x.stride) * 2;
      const float *scales = &x.scale[at], *more = &x.scaled_sum[at];
      I (*sums)[2 * ROWS] = buffers[0], (*next)[2 * ROWS] = buffers[1];
      auto multiply = [&](int g) {
        _tile_loadd(4, in + g * GROUP, half);
        _tile_zero(0);
        _tile_loadd(6, weights[0] + g * sizeof unpacked[0][0], 64);
        _tile_dpbssd(0, 4, 6);
        if (T == 2) { _tile_zero(1); _tile_loadd(7, weights[T - 1] + g * sizeof unpacked[0][0], 64); _tile_dpbssd(1, 4, 7); }
      };
      auto keep = [&](I (*to)[2 * ROWS]) {
        _tile_stored(0, to[0], 64);
        if (T == 2) _tile_stored(1, to[T - 1], 64);
      };
      F acc[ROWS][T] = {};
      if (from) memcpy(acc, out[row], sizeof acc);
      multiply(0);
      keep(sums);
      for (int g = 0; g < groups; g += 2, scales += 2 * ROWS, more += 2 * ROWS, std::swap(sums, next)) {
        if (g + 2 < groups) multiply(g + 2);
#pragma GCC unroll 2
        for (int t = 0; t < T; t++)
#pragma GCC unroll 2
          for (int i = 0; i < 2; i++) {
            if (g + i == groups) break;
            const size_t place = size_t(from + g + i) * LANES;
            const F scale = from_half(load<Halves>(tiles[t].scale + place));
            const F min = K == INT8 ? F{} : tiles[t].min ? from_half(load<Halves>(tiles[t].min + place)) : scale * -middle(K);
#pragma GCC unroll 8
            for (int b = 0; b < ROWS; b++) {
              acc[b][t] = fma(to_float(sums[t][2 * b + i]), scale * scales[i * ROWS + b], acc[b][t]);
              if (K != INT8) acc[b][t] = fma(min, splat(more[i * ROWS + b]), acc[b][t]);
            }
          }
        if (g + 2 < groups) keep(next);  // only now: stores that wait for AMX would keep all else waiting
      }
      memcpy(out[row], acc, sizeof acc);
    }
  }
  _tile_release();
}
#endif

// out[b][t] = products of tile t with row first + b of x, for n rows, up to PANEL.
template <int T, int B = ROWS>
static void products(int kind, const Tile* tiles, int cols, const Inputs& x, int first, int n, F (*out)[T]) {
#ifdef AMX
  if (B == ROWS && has_amx()) {
    if (kind == BF16) return bf16_by_amx<T>(tiles, cols, x, first, n, out);
    if (kind == INT8 && n >= FEWEST) return bytes_by_amx<INT8, T>(tiles, cols, x, first, n, out);
    if (kind == INT5 && n >= FEWEST) return bytes_by_amx<INT5, T>(tiles, cols, x, first, n, out);
    if (kind == INT4 && n >= FEWEST) return bytes_by_amx<INT4, T>(tiles, cols, x, first, n, out);
  }
#endif
  for (; n >= B; first += B, n -= B, out += B) {
    if (kind == FP32) product<FP32, T, B>(tiles, cols, x, first, out);
    else if (kind == BF16) product<BF16, T, B>(tiles, cols, x, first, out);
    else if (kind == INT8) product<INT8, T, B>(tiles, cols, x, first, out);
    else if (kind == INT5) product<INT5, T, B>(tiles, cols, x, first, out);
    else product<INT4, T, B>(tiles, cols, x, first, out);
  }
  if constexpr (B > 1)
    if (n) products<T, B - 1>(kind, tiles, cols, x, first, n, out);
}

// Calls use(row, products of T tiles) for n rows of x.
template <int T, class Use>
static void for_rows(int kind, const Tile (&tiles)[T], int cols, const Inputs& x, int first, int n, Use& use) {
  for (int rows; (rows = std::min(n, PANEL)) > 0; first += rows, n -= rows) {
    F out[PANEL][T];
    products<T>(kind, tiles, cols, x, first, rows, out);
    for (int b = 0; b < rows; b++) use(first + b, out[b]);
  }
}

// The same for a matrix; parts of a row are multiplied as rows, and their products summed.
template <int T, class Use>
static void for_rows(const Matrix& m, const Tile (&tiles)[T], const Inputs& x, int first, int n, Use& use) {
  if (m.parts == 1) return for_rows<T>(m.kind, tiles, m.cols, x, first, n, use);
  F sum[T];
  auto both = [&](int row, const F* v) {
    for (int t = 0; t < T; t++) sum[t] = row % 2 ? sum[t] + v[t] : v[t];
    if (row % 2) use(row / 2, sum);
  };
  for_rows<T>(m.kind, tiles, m.cols, x, 2 * first, 2 * n, both);
}
