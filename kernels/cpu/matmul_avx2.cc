// MatMul's inner loops in AVX2 with FMA: unpacking, quantising, and tiles of panels.
#include <algorithm>

#include "kernels/cpu/blocks_avx2.h"
#include "kernels/cpu/matmul_kernels.h"

namespace longspan::cpu {
namespace {

LONGSPAN_AVX2 inline float HorizontalMax(__m256i v) {
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
  return std::bit_cast<float>(_mm_cvtsi128_si32(m));
}

// Sums of the 16 bytes of each half.
LONGSPAN_AVX2 inline void HalfSums(__m256i q, int sum[2]) {
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), q);
  const __m256i quads = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  const __m256i twice = _mm256_add_epi32(quads, _mm256_shuffle_epi32(quads, 0x4e));
  const __m256i all = _mm256_add_epi32(twice, _mm256_shuffle_epi32(twice, 0xb1));
  sum[0] = _mm_cvtsi128_si32(_mm256_castsi256_si128(all));
  sum[1] = _mm_cvtsi128_si32(_mm256_extracti128_si256(all, 1));
}

LONGSPAN_AVX2 void Quantise(const float* x, int64_t in, const QuantisedRows& row) {
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  const __m256 limit = _mm256_set1_ps(127.5f);
  for (int64_t g = 0; g < in / kActivationGroup; ++g, x += kActivationGroup) {
    __m256 v[4];
    __m256i largest = _mm256_setzero_si256();  // as bits: NaN is the largest of all
    LONGSPAN_UNROLL
    for (int i = 0; i < 4; ++i) {
      v[i] = _mm256_loadu_ps(x + 8 * i);
      largest = _mm256_max_epi32(_mm256_castps_si256(_mm256_and_ps(v[i], magnitude)), largest);
    }
    const float amax = HorizontalMax(largest);
    const bool zero = amax < kSmallestActivation;
    const __m256 inverse = _mm256_set1_ps(zero ? 0 : 127 / amax);
    __m256i q[4];
    LONGSPAN_UNROLL
    for (int i = 0; i < 4; ++i) {
      const __m256 scaled = _mm256_mul_ps(v[i], inverse);
      // What has no integer becomes 0, as in the portable loop.
      const __m256 fits = _mm256_cmp_ps(_mm256_and_ps(scaled, magnitude), limit, _CMP_LE_OQ);
      q[i] = _mm256_cvtps_epi32(_mm256_and_ps(scaled, fits));
    }
    const __m256i words =
        _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
    const __m256i bytes =
        _mm256_permutevar8x32_epi32(words, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row.q + kActivationGroup * g), bytes);
    int sum[2];
    HalfSums(bytes, sum);
    const float scale = zero ? 0 : amax / 127;
    row.scale[g] = scale;
    row.sum16[2 * g] = sum[0];
    row.sum16[2 * g + 1] = sum[1];
    row.sum32[g] = sum[0] + sum[1];
    row.scaled_sum[g] = scale * (sum[0] + sum[1]);
  }
}

template <class Format>
LONGSPAN_AVX2 void Unpack(const std::byte* const outputs[kPanel], int64_t in, const Panel& panel) {
  using Block = typename Format::Block;
  constexpr int kElements = Info(Format::kType).block_elements;
  constexpr int kGroups = kElements / Format::kGroup;
  const std::byte* next = outputs[kPanel - 1] + BytesOf(Format::kType, in);
  for (int64_t b = 0; b < in / kElements; ++b) {
    for (int half = 0; half < kPanel; half += 8, next += 8 * sizeof(Block)) {
      // Into L2: L1 holds the panel that is being made, and its blocks.
      Prefetch<8 * sizeof(Block), /*kIntoL2=*/true>(next);
      const int64_t scale_offset = b * kGroups * kPanel + half;
      LoadScales<Format>(outputs + half, b, panel.scales + scale_offset, panel.mins + scale_offset,
                         kPanel);
      for (int run = 0; run < kElements / 32; ++run) {
        __m256i v[8];
        LONGSPAN_UNROLL
        for (int o = 0; o < 8; ++o) v[o] = LoadLevels(BlockAt<Block>(outputs[half + o], b), run);
        Transpose8(v);
        uint8_t* to = panel.levels + (b * kElements + 32 * run) * kPanel + 4 * half;
        LONGSPAN_UNROLL
        for (int k = 0; k < 8; ++k) {
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 4 * kPanel * k), v[k]);
        }
      }
    }
  }
}

// Products of 8-bit levels do not fit 16-bit sums: they are made signed, and the signs moved to x.
template <class Format>
constexpr bool kSigned = Format::kBits == 8;

// Pairs of products of a level (at most 2^bits - 1, or 128) and an activation (at most 127) that a
// signed 16-bit sum holds.
template <class Format>
constexpr int kStepsPerSum = Format::kBits == 4   ? 8
                             : Format::kBits == 5 ? 4
                             : Format::kBits == 6 ? 2
                                                  : 1;
static_assert(15 * 127 * 2 * 8 < 32768 && 31 * 127 * 2 * 4 < 32768 && 63 * 127 * 2 * 2 < 32768 &&
              128 * 127 * 2 < 32768);

LONGSPAN_AVX2 inline __m256i Broadcast4(const int8_t* q) {
  int word;
  std::memcpy(&word, q, 4);
  return _mm256_set1_epi32(word);
}

// Keeps the compiler from regrouping the sums before and after: it would compute all products of a
// loop first, add them as a tree, and spill most of them on the way.
LONGSPAN_AVX2 inline void Settle(__m256i& sum) { asm("" : "+x"(sum)); }

// R rows times the 16 outputs of a panel.
template <class Format, int R>
LONGSPAN_AVX2 inline void MultiplyRows(const BlockTile& t, int64_t row) {
  constexpr int kGroup = Format::kGroup;
  constexpr int kSteps = kStepsPerSum<Format>;
  const __m256i ones = _mm256_set1_epi16(1);
  const int64_t groups = t.in / kGroup;
  const int8_t* q = t.x.q + row * t.in;
  const float* x_scale = t.x.scale + row * (t.in / 32);
  const float* x_sum = (kGroup == 16 ? t.x.sum16 : t.x.sum32) + row * groups;
  const float* x_scaled_sum = t.x.scaled_sum + row * (t.in / 32);
  __m256 result[R][2];
  LONGSPAN_UNROLL
  for (int r = 0; r < R; ++r) result[r][0] = result[r][1] = _mm256_setzero_ps();
  const uint8_t* levels = t.panel.levels;
  for (int64_t g = 0; g < groups; ++g) {
    __m256i dot[R][2];
    LONGSPAN_UNROLL
    for (int r = 0; r < R; ++r) dot[r][0] = dot[r][1] = _mm256_setzero_si256();
    for (int chunk = 0; chunk < kGroup / 4; chunk += kSteps) {
      __m256i sum[R][2];
      LONGSPAN_UNROLL
      for (int s = 0; s < kSteps; ++s, levels += 4 * kPanel) {
        __m256i w[2] = {Load256(levels), Load256(levels + 32)};
        __m256i signs[2];
        if (kSigned<Format>) {
          LONGSPAN_UNROLL
          for (int h = 0; h < 2; ++h) {
            signs[h] = _mm256_xor_si256(w[h], _mm256_set1_epi8(-128));
            w[h] = _mm256_abs_epi8(signs[h]);
          }
        }
        LONGSPAN_UNROLL
        for (int r = 0; r < R; ++r) {
          const __m256i x = Broadcast4(q + r * t.in + 4 * (chunk + s));
          LONGSPAN_UNROLL
          for (int h = 0; h < 2; ++h) {
            const __m256i signed_x = kSigned<Format> ? _mm256_sign_epi8(x, signs[h]) : x;
            const __m256i product = _mm256_maddubs_epi16(w[h], signed_x);
            sum[r][h] = s == 0 ? product : _mm256_add_epi16(sum[r][h], product);
            Settle(sum[r][h]);
          }
        }
      }
      LONGSPAN_UNROLL
      for (int r = 0; r < R; ++r) {
        LONGSPAN_UNROLL
        for (int h = 0; h < 2; ++h) {
          dot[r][h] = _mm256_add_epi32(dot[r][h], _mm256_madd_epi16(sum[r][h], ones));
        }
      }
    }
    q += kGroup;
    LONGSPAN_UNROLL
    for (int h = 0; h < 2; ++h) {
      const __m256 scale = _mm256_loadu_ps(t.panel.scales + g * kPanel + 8 * h);
      LONGSPAN_UNROLL
      for (int r = 0; r < R; ++r) {
        __m256 value = _mm256_cvtepi32_ps(dot[r][h]);
        if (!kSigned<Format> && Format::kOffset != 0) {
          value = _mm256_fnmadd_ps(_mm256_broadcast_ss(x_sum + r * groups + g),
                                   _mm256_set1_ps(Format::kOffset), value);
        }
        const __m256 both =
            _mm256_mul_ps(scale, _mm256_broadcast_ss(x_scale + r * (t.in / 32) + g * kGroup / 32));
        result[r][h] = _mm256_fmadd_ps(value, both, result[r][h]);
        if (Format::kMin) {
          const __m256 min = _mm256_loadu_ps(t.panel.mins + g * kPanel + 8 * h);
          result[r][h] = _mm256_fnmadd_ps(
              min, _mm256_broadcast_ss(x_scaled_sum + r * (t.in / 32) + g), result[r][h]);
        }
      }
    }
  }
  alignas(32) float whole[kPanel];
  for (int r = 0; r < R; ++r) {
    float* out = t.out + (row + r) * t.out_stride;
    float* to = t.columns == kPanel ? out : whole;
    _mm256_storeu_ps(to, result[r][0]);
    _mm256_storeu_ps(to + 8, result[r][1]);
    if (to == whole) std::copy_n(whole, t.columns, out);
  }
}

template <class Format>
LONGSPAN_AVX2 void MultiplyBlocks(const BlockTile& t) {
  int64_t row = 0;
  for (; row + 3 <= t.rows; row += 3) MultiplyRows<Format, 3>(t, row);
  if (t.rows - row == 2) MultiplyRows<Format, 2>(t, row);
  if (t.rows - row == 1) MultiplyRows<Format, 1>(t, row);
}

// The 8 lanes of each of 8 vectors summed: lane o of the result is the sum of v[o]. With `halves`,
// the sums of their lower and upper four lanes apart.
LONGSPAN_AVX2 inline void SumLanes(const __m256i v[8], __m256i halves[2]) {
  const __m256i low =
      _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
  const __m256i high =
      _mm256_hadd_epi32(_mm256_hadd_epi32(v[4], v[5]), _mm256_hadd_epi32(v[6], v[7]));
  halves[0] = _mm256_permute2x128_si256(low, high, 0x20);
  halves[1] = _mm256_permute2x128_si256(low, high, 0x31);
}

// One row times 8 outputs, straight from the blocks; the same float operations as MultiplyRows.
template <class Format>
LONGSPAN_AVX2 void DotBlocks(const BlockDot& t) {
  using Block = typename Format::Block;
  constexpr int kElements = Info(Format::kType).block_elements;
  constexpr int kGroups = kElements / Format::kGroup;
  constexpr int kGroupsPerRun = 32 / Format::kGroup;
  const __m256i ones = _mm256_set1_epi16(1);
  alignas(32) float scales[kGroups * 8], mins[kGroups * 8];
  __m256 result = _mm256_setzero_ps();
  int64_t run_index = 0;
  const std::byte* next = t.weights[7] + BytesOf(Format::kType, t.in);
  for (int64_t b = 0; b < t.in / kElements; ++b, next += 8 * sizeof(Block)) {
    Prefetch<8 * sizeof(Block)>(next);
    LoadScales<Format>(t.weights, b, scales, mins, 8);
    LONGSPAN_UNROLL
    for (int run = 0; run < kElements / 32; ++run, ++run_index) {
      const __m256i x = Load256(t.x.q + 32 * run_index);
      __m256i dots[8];
      LONGSPAN_UNROLL
      for (int o = 0; o < 8; ++o) {
        const Block& block = BlockAt<Block>(t.weights[o], b);
        __m256i product;
        if constexpr (kSigned<Format>) {
          const __m256i w = Load256(block.q);
          product = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
        } else {
          product = _mm256_maddubs_epi16(LoadLevels(block, run), x);
        }
        dots[o] = _mm256_madd_epi16(product, ones);
      }
      __m256i halves[2];
      SumLanes(dots, halves);
      if (kGroupsPerRun == 1) halves[0] = _mm256_add_epi32(halves[0], halves[1]);
      const __m256 x_scale = _mm256_broadcast_ss(t.x.scale + run_index);
      LONGSPAN_UNROLL
      for (int h = 0; h < kGroupsPerRun; ++h) {
        const int g = run * kGroupsPerRun + h;
        __m256 value = _mm256_cvtepi32_ps(halves[h]);
        if (!kSigned<Format> && Format::kOffset != 0) {
          const float* sum =
              kGroupsPerRun == 2 ? t.x.sum16 + 2 * run_index + h : t.x.sum32 + run_index;
          value =
              _mm256_fnmadd_ps(_mm256_broadcast_ss(sum), _mm256_set1_ps(Format::kOffset), value);
        }
        const __m256 both = _mm256_mul_ps(_mm256_load_ps(scales + 8 * g), x_scale);
        result = _mm256_fmadd_ps(value, both, result);
        if (Format::kMin) {
          result = _mm256_fnmadd_ps(_mm256_load_ps(mins + 8 * g),
                                    _mm256_broadcast_ss(t.x.scaled_sum + run_index), result);
        }
      }
    }
  }
  alignas(32) float whole[8];
  _mm256_store_ps(whole, result);
  std::copy_n(whole, t.columns, t.out);
}

template <DType kType>
LONGSPAN_AVX2 inline __m256 LoadWeights(const std::byte* p) {
  if constexpr (kType == DType::kF32) {
    return _mm256_loadu_ps(reinterpret_cast<const float*>(p));
  } else {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    if constexpr (kType == DType::kF16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
}

// ((l0 + l1) + (l2 + l3)) + ((l4 + l5) + (l6 + l7)) of four vectors.
LONGSPAN_AVX2 inline __m128 SumLanes(__m256 a, __m256 b, __m256 c, __m256 d) {
  const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

// R rows times C outputs; outputs beyond t.columns repeat the last one and are dropped.
template <DType kType, int R, int C>
LONGSPAN_AVX2 inline void MultiplyFloatTile(const FloatTile& t, int64_t row, int64_t column) {
  constexpr int kBytes = Info(kType).block_bytes;
  const float* x = t.x + row * t.x_stride;
  const std::byte* w[C];
  LONGSPAN_UNROLL
  for (int c = 0; c < C; ++c) {
    w[c] = t.weights + std::min(column + c, t.columns - 1) * t.weight_stride;
  }
  __m256 sum[R][C];
  LONGSPAN_UNROLL
  for (int r = 0; r < R; ++r) {
    LONGSPAN_UNROLL
    for (int c = 0; c < C; ++c) sum[r][c] = _mm256_setzero_ps();
  }
  const bool cold = t.cold && row == 0;
  const std::byte* next = w[C - 1] + t.weight_stride;
  for (int64_t i = 0; i < t.in; i += 8) {
    if (cold) Prefetch<8 * kBytes * C>(next + i * kBytes * C);
    __m256 weights[C];
    LONGSPAN_UNROLL
    for (int c = 0; c < C; ++c) weights[c] = LoadWeights<kType>(w[c] + i * kBytes);
    LONGSPAN_UNROLL
    for (int r = 0; r < R; ++r) {
      const __m256 v = _mm256_loadu_ps(x + r * t.x_stride + i);
      LONGSPAN_UNROLL
      for (int c = 0; c < C; ++c) sum[r][c] = _mm256_fmadd_ps(v, weights[c], sum[r][c]);
    }
  }
  const __m256 zero = _mm256_setzero_ps();
  LONGSPAN_UNROLL
  for (int c = 0; c < C; ++c) {
    if (column + c >= t.columns) return;
    alignas(16) float sums[4];
    _mm_store_ps(
        sums, SumLanes(sum[0][c], R > 1 ? sum[R > 1 ? 1 : 0][c] : zero,
                       R > 2 ? sum[R > 2 ? 2 : 0][c] : zero, R > 3 ? sum[R > 3 ? 3 : 0][c] : zero));
    LONGSPAN_UNROLL
    for (int r = 0; r < R; ++r) t.out[(row + r) * t.out_stride + column + c] = sums[r];
  }
}

template <DType kType, int R, int C>
LONGSPAN_AVX2 void MultiplyFloatRows(const FloatTile& t, int64_t row, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; c += C) MultiplyFloatTile<kType, R, C>(t, row, c);
}

// Twelve sums, three weights and one x fill the 16 registers.
constexpr int kFloatColumns = 12;

template <DType kType>
LONGSPAN_AVX2 void MultiplyFloat(const FloatTile& t) {
  for (int64_t begin = 0; begin < t.columns; begin += kFloatColumns) {
    const int64_t end = std::min(begin + kFloatColumns, t.columns);
    int64_t row = 0;
    for (; row + 4 <= t.rows; row += 4) MultiplyFloatRows<kType, 4, 3>(t, row, begin, end);
    switch (t.rows - row) {
      case 3:
        MultiplyFloatRows<kType, 3, 3>(t, row, begin, end);
        break;
      case 2:
        MultiplyFloatRows<kType, 2, 6>(t, row, begin, end);
        break;
      case 1:
        MultiplyFloatRows<kType, 1, 6>(t, row, begin, end);
        break;
      default:
        break;
    }
  }
}

template <DType kType>
LONGSPAN_AVX2 void Widen(const std::byte* weights, int64_t count, float* out) {
  constexpr int kBytes = Info(kType).block_bytes;
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(out + i, LoadWeights<kType>(weights + i * kBytes));
  }
  DequantiseRow(kType, weights + i * kBytes, count - i, out + i);
}

template <class Format>
constexpr BlockKernels BlockEntry() {
  // Measured: at two rows of any type but Q8_0 unpacking is already the faster way.
  return {Unpack<Format>, MultiplyBlocks<Format>, DotBlocks<Format>, Format::kBits == 8 ? 3 : 1};
}

template <DType kType>
constexpr FloatKernels FloatEntry() {
  return {MultiplyFloat<kType>, Widen<kType>};
}

}  // namespace

const MatMulKernels kAvx2MatMul = {
    .f32 = FloatEntry<DType::kF32>(),
    .f16 = FloatEntry<DType::kF16>(),
    .bf16 = FloatEntry<DType::kBF16>(),
    .q8_0 = BlockEntry<FormatQ8_0>(),
    .q4_0 = BlockEntry<FormatQ4_0>(),
    .q5_0 = BlockEntry<FormatQ5_0>(),
    .q4_k = BlockEntry<FormatQ4_K>(),
    .q5_k = BlockEntry<FormatQ5_K>(),
    .q6_k = BlockEntry<FormatQ6_K>(),
    .quantise = Quantise,
    .float_columns = kFloatColumns,
};

}  // namespace longspan::cpu
