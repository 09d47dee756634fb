// MatMul's inner loops in AVX2 with FMA: unpacking, quantising, and tiles of panels.
#include <algorithm>

#include "kernels/cpu/float_tiles.h"
#include "kernels/cpu/matmul_kernels.h"
#include "kernels/cpu/prefetch.h"
#include "kernels/cpu/x86/blocks_avx2.h"
#include "kernels/cpu/x86/sets.h"

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

// Bits above the low four of a level, and how many steps share a vector of them.
template <class Format>
constexpr int kHighBits = Format::kBits == 8 ? 0 : Format::kBits - 4;
template <class Format>
constexpr int kFields = 8 / std::max(kHighBits<Format>, 1);

// Where the high bits lie in a level.
template <class Format>
constexpr int kHighField = kHighBits<Format> == 1 ? 16 : 48;

// How far up the high bits of step `step` move to their place in a level.
template <class Format>
constexpr int HighShift(int step) {
  return 4 - kHighBits<Format> * (step % kFields<Format>);
}

LONGSPAN_AVX2 inline __m256i ShiftLeft(__m256i v, int bits) {
  return bits >= 0 ? _mm256_slli_epi16(v, bits) : _mm256_srli_epi16(v, -bits);
}

// Eight outputs' steps of a run, into half `half` of its vectors; as PackedPanel::PackRun.
template <class Format>
LONGSPAN_AVX2 inline void PackHalf(const __m256i steps[kRunSteps], int half, uint8_t* run) {
  run += 32 * half;
  if (Format::kBits == 8) {
    LONGSPAN_UNROLL
    for (int s = 0; s < kRunSteps; ++s) Store256(run + kStepBytes * s, steps[s]);
    return;
  }
  constexpr int kSharing = kFields<Format>, kShared = kHighBits<Format> == 0 ? 0 : kRunSteps;
  const __m256i low = _mm256_set1_epi8(15), field = _mm256_set1_epi8(kHighField<Format>);
  LONGSPAN_UNROLL
  for (int j = 0; j < 4; ++j) {
    const __m256i odd = _mm256_and_si256(steps[2 * j + 1], low);
    Store256(run + kStepBytes * j,
             _mm256_or_si256(_mm256_and_si256(steps[2 * j], low), _mm256_slli_epi16(odd, 4)));
  }
  LONGSPAN_UNROLL
  for (int first = 0; first < kShared; first += kSharing) {
    __m256i high = _mm256_setzero_si256();
    LONGSPAN_UNROLL
    for (int s = 0; s < kSharing; ++s) {
      const __m256i bits = _mm256_and_si256(steps[first + s], field);
      high = _mm256_or_si256(high, ShiftLeft(bits, -HighShift<Format>(s)));
    }
    Store256(run + kStepBytes * (4 + first / kSharing), high);
  }
}

template <class Format>
LONGSPAN_AVX2 void Pack(const std::byte* const outputs[kPanel], int64_t in, uint8_t* packed) {
  using Packed = PackedPanel<Format>;
  using Block = typename Format::Block;
  uint8_t* scales = packed + Packed::ScalesAt(in);
  for (int64_t b = 0; b < in / Packed::kElements; ++b, scales += Packed::kScaleBytes) {
    Packed::PackScales(outputs, b, scales);
    for (int run = 0; run < Packed::kElements / 32; ++run, packed += Packed::kRunBytes) {
      for (int half = 0; half < 2; ++half) {
        __m256i v[8];
        LONGSPAN_UNROLL
        for (int o = 0; o < 8; ++o) {
          v[o] = LoadLevels(BlockAt<Block>(outputs[8 * half + o], b), run);
        }
        Transpose8(v);
        PackHalf<Format>(v, half, packed);
      }
    }
  }
}

// Half `half` of step `step` of a run.
template <class Format>
LONGSPAN_AVX2 inline __m256i UnpackLevels(const uint8_t* run, int step, int half) {
  const __m256i bytes = Load256(run + kStepBytes * (step / 2) + 32 * half);
  const __m256i nibbles =
      _mm256_and_si256(step % 2 == 0 ? bytes : _mm256_srli_epi16(bytes, 4), _mm256_set1_epi8(15));
  if (kHighBits<Format> == 0) return nibbles;
  constexpr int kSharing = kFields<Format>;
  const __m256i high = Load256(run + kStepBytes * (4 + step / kSharing) + 32 * half);
  const __m256i moved = ShiftLeft(high, HighShift<Format>(step));
  return _mm256_or_si256(nibbles, _mm256_and_si256(moved, _mm256_set1_epi8(kHighField<Format>)));
}

LONGSPAN_AVX2 inline __m256 ScalesOf(const uint8_t* bytes, bool is_signed, __m256 d) {
  const __m128i packed = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes));
  const __m256i wide = is_signed ? _mm256_cvtepi8_epi32(packed) : _mm256_cvtepu8_epi32(packed);
  return _mm256_mul_ps(d, _mm256_cvtepi32_ps(wide));
}

LONGSPAN_AVX2 inline __m256 Halves(const uint8_t* d) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(d)));
}

// An unpacked panel; levels of 8 bits stay where they are.
struct Panel {
  const uint8_t* levels;
  const float* scales;
  const float* mins;
};

template <class Format>
LONGSPAN_AVX2 Panel Unpack(const uint8_t* packed, int64_t in, const PanelMemory& memory) {
  using Packed = PackedPanel<Format>;
  const uint8_t* block = packed + Packed::ScalesAt(in);
  float *scales = memory.scales, *mins = memory.mins;
  for (int64_t b = 0; b < in / Packed::kElements; ++b, block += Packed::kScaleBytes) {
    for (int half = 0; half < kPanel; half += 8) {
      const __m256 d = Halves(block + 2 * half);
      for (int g = 0; g < Packed::kGroups; ++g) {
        float* to = scales + g * kPanel + half;
        if constexpr (Packed::kGroupBytes == 0) {
          _mm256_storeu_ps(to, d);
        } else if constexpr (Format::kMin) {
          const uint8_t* bytes = block + 2 * Packed::kHalves + g * Packed::kGroupBytes + half;
          _mm256_storeu_ps(to, ScalesOf(bytes, /*is_signed=*/false, d));
          _mm256_storeu_ps(mins + g * kPanel + half,
                           ScalesOf(bytes + kPanel, /*is_signed=*/false,
                                    Halves(block + Packed::kHalves + 2 * half)));
        } else {
          const uint8_t* bytes = block + Packed::kHalves + g * Packed::kGroupBytes + half;
          _mm256_storeu_ps(to, ScalesOf(bytes, /*is_signed=*/true, d));
        }
      }
    }
    scales += Packed::kGroups * kPanel;
    mins += Packed::kGroups * kPanel;
  }
  if (Format::kBits == 8) return {packed, memory.scales, memory.mins};
  uint8_t* levels = memory.levels;
  const uint8_t* ahead = packed + kAhead;
  for (int64_t run = 0; run < in / 32;
       ++run, packed += Packed::kRunBytes, ahead += Packed::kRunShare) {
    Prefetch<Packed::kRunShare>(ahead);
    LONGSPAN_UNROLL
    for (int s = 0; s < kRunSteps; ++s, levels += kStepBytes) {
      Store256(levels, UnpackLevels<Format>(packed, s, 0));
      Store256(levels + 32, UnpackLevels<Format>(packed, s, 1));
    }
  }
  return {memory.levels, memory.scales, memory.mins};
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
LONGSPAN_AVX2 inline void MultiplyRows(const BlockTile& t, const Panel& panel, int64_t row) {
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
  const uint8_t* levels = panel.levels;
  for (int64_t g = 0; g < groups; ++g) {
    // Others' levels were asked for when they were unpacked.
    if (Format::kBits == 8 && row == 0) {
      Prefetch<PackedPanel<Format>::kRunShare>(t.panel + g * PackedPanel<Format>::kRunShare +
                                               kAhead);
    }
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
      const __m256 scale = _mm256_loadu_ps(panel.scales + g * kPanel + 8 * h);
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
          const __m256 min = _mm256_loadu_ps(panel.mins + g * kPanel + 8 * h);
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
  const Panel panel = Unpack<Format>(t.panel, t.in, t.scratch);
  int64_t row = 0;
  for (; row + 3 <= t.rows; row += 3) MultiplyRows<Format, 3>(t, panel, row);
  if (t.rows - row == 2) MultiplyRows<Format, 2>(t, panel, row);
  if (t.rows - row == 1) MultiplyRows<Format, 1>(t, panel, row);
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

// R rows times C outputs; those beyond t.columns are dropped.
template <DType kType, int R, int C>
LONGSPAN_AVX2 inline void MultiplyFloatTile(const FloatTile& t, int64_t row, int64_t column) {
  constexpr int kBytes = Info(kType).block_bytes;
  const float* x = t.x + row * t.x_stride;
  const std::byte* w[C];
  FindWeights(t, column, w);
  __m256 sum[R][C];
  LONGSPAN_UNROLL
  for (int r = 0; r < R; ++r) {
    LONGSPAN_UNROLL
    for (int c = 0; c < C; ++c) sum[r][c] = _mm256_setzero_ps();
  }
  const bool cold = t.cold && row == 0;
  const std::byte* next = FloatsAhead(w[0], C * t.weight_stride);
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
  return {Pack<Format>, MultiplyBlocks<Format>};
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
