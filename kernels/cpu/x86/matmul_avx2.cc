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

// Bytes with i % 4 < 2 and the others of each 16, summed in the halves of the 16's int32s.
LONGSPAN_AVX2 inline __m256i PairSums(__m256i q) {
  const __m256i once = _mm256_maddubs_epi16(_mm256_set1_epi8(1), q);
  const __m256i twice = _mm256_add_epi16(once, _mm256_shuffle_epi32(once, 0x4e));
  return _mm256_add_epi16(twice, _mm256_shuffle_epi32(twice, 0xb1));
}

LONGSPAN_AVX2 inline int32_t FirstOf(__m128i v) { return _mm_cvtsi128_si32(v); }

// v * -2^bits in 16 bits.
LONGSPAN_AVX2 inline __m128i TimesMinus(__m128i v, int bits) {
  return _mm_sub_epi16(_mm_setzero_si128(), _mm_slli_epi16(v, bits));
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
    const __m256i pairs = PairSums(bytes);
    const __m128i low = _mm256_castsi256_si128(pairs), high = _mm256_extracti128_si256(pairs, 1);
    const __m128i ones = _mm_set1_epi16(1);
    const int32_t sum[2] = {FirstOf(_mm_madd_epi16(low, ones)),
                            FirstOf(_mm_madd_epi16(high, ones))};
    const float scale = zero ? 0 : amax / 127;
    row.scale[g] = scale;
    row.sum16[2 * g] = sum[0];
    row.sum16[2 * g + 1] = sum[1];
    row.sum32[g] = sum[0] + sum[1];
    row.scaled_sum[g] = scale * (sum[0] + sum[1]);
    row.begin16[2 * g] = FirstOf(TimesMinus(low, 5));
    row.begin16[2 * g + 1] = FirstOf(TimesMinus(high, 5));
    row.begin32[g] = FirstOf(TimesMinus(_mm_add_epi16(low, high), 4));
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

// By how much levels of fewer bits are lowered, through where their 16-bit sums begin (which may
// pass 16 bits on the way), so that the sums of a whole group fit: 4 bits do as they are.
template <class Format>
constexpr int kLowered = Format::kBits == 5   ? 16
                         : Format::kBits == 6 ? 32
                                              : 0;
static_assert(15 * 127 * 16 < 32768 && 16 * 127 * 16 < 32768 && 32 * 127 * 8 < 32768 &&
              128 * 127 * 2 < 32768);

LONGSPAN_AVX2 inline __m256i Broadcast4(const void* p) {
  int word;
  std::memcpy(&word, p, 4);
  return _mm256_set1_epi32(word);
}

// Keeps the compiler from regrouping the sums before and after: it would compute all products of a
// loop first, add them as a tree, and spill most of them on the way.
LONGSPAN_AVX2 inline void Settle(__m256i& sum) { asm("" : "+x"(sum)); }

// The exact dot products of a group's levels of 8 bits with R rows of x.
template <int R>
LONGSPAN_AVX2 inline void DotSigned(const uint8_t* levels, const int8_t* q, int64_t in,
                                    __m256i dot[R][2]) {
  const __m256i ones = _mm256_set1_epi16(1);
  LONGSPAN_UNROLL
  for (int s = 0; s < kRunSteps; ++s, levels += kStepBytes) {
    LONGSPAN_UNROLL
    for (int h = 0; h < 2; ++h) {
      const __m256i w = _mm256_xor_si256(Load256(levels + 32 * h), _mm256_set1_epi8(-128));
      const __m256i magnitude = _mm256_abs_epi8(w);
      LONGSPAN_UNROLL
      for (int r = 0; r < R; ++r) {
        const __m256i x = _mm256_sign_epi8(Broadcast4(q + r * in + 4 * s), w);
        const __m256i sums = _mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, x), ones);
        dot[r][h] = s == 0 ? sums : _mm256_add_epi32(dot[r][h], sums);
        Settle(dot[r][h]);
      }
    }
  }
}

// Those of levels of fewer bits less kLowered.
template <class Format, int R>
LONGSPAN_AVX2 inline void DotLowered(const uint8_t* levels, const int8_t* q, int64_t in,
                                     const int32_t* begin, int64_t groups, __m256i dot[R][2]) {
  LONGSPAN_UNROLL
  for (int s = 0; s < Format::kGroup / 4; ++s, levels += kStepBytes) {
    const __m256i w[2] = {Load256(levels), Load256(levels + 32)};
    LONGSPAN_UNROLL
    for (int r = 0; r < R; ++r) {
      const __m256i x = Broadcast4(q + r * in + 4 * s);
      LONGSPAN_UNROLL
      for (int h = 0; h < 2; ++h) {
        const __m256i product = _mm256_maddubs_epi16(w[h], x);
        if (s > 0) {
          dot[r][h] = _mm256_add_epi16(dot[r][h], product);
        } else {
          dot[r][h] = kLowered<Format> == 0
                          ? product
                          : _mm256_add_epi16(Broadcast4(begin + r * groups), product);
        }
        Settle(dot[r][h]);
      }
    }
  }
  LONGSPAN_UNROLL
  for (int r = 0; r < R; ++r) {
    LONGSPAN_UNROLL
    for (int h = 0; h < 2; ++h) {
      dot[r][h] = _mm256_madd_epi16(dot[r][h], _mm256_set1_epi16(1));
    }
  }
}

// R rows times the 16 outputs of a panel.
template <class Format, int R>
LONGSPAN_AVX2 inline void MultiplyRows(const BlockTile& t, const Panel& panel, int64_t row) {
  constexpr int kGroup = Format::kGroup;
  const int64_t groups = t.in / kGroup, scales = t.in / 32;
  const int8_t* q = t.x.q + row * t.in;
  const float* x_scale = t.x.scale + row * scales;
  const float* x_sum = t.x.sum32 + row * scales;
  const float* x_scaled_sum = t.x.scaled_sum + row * scales;
  const int32_t* begin = (kGroup == 16 ? t.x.begin16 : t.x.begin32) + row * groups;
  __m256 result[R][2];
  LONGSPAN_UNROLL
  for (int r = 0; r < R; ++r) result[r][0] = result[r][1] = _mm256_setzero_ps();
  const uint8_t* levels = panel.levels;
  for (int64_t g = 0; g < groups; ++g, q += kGroup, levels += kGroup * kPanel) {
    // Others' levels were asked for when they were unpacked.
    if (kSigned<Format> && row == 0) {
      Prefetch<PackedPanel<Format>::kRunShare>(t.panel + g * PackedPanel<Format>::kRunShare +
                                               kAhead);
    }
    __m256i dot[R][2];
    if constexpr (kSigned<Format>) {
      DotSigned<R>(levels, q, t.in, dot);
    } else {
      DotLowered<Format, R>(levels, q, t.in, begin + g, groups, dot);
    }
    const int64_t x_group = g * kGroup / 32;
    LONGSPAN_UNROLL
    for (int h = 0; h < 2; ++h) {
      const __m256 scale = _mm256_loadu_ps(panel.scales + g * kPanel + 8 * h);
      LONGSPAN_UNROLL
      for (int r = 0; r < R; ++r) {
        __m256 value = _mm256_cvtepi32_ps(dot[r][h]);
        constexpr int kBack = kSigned<Format> ? 0 : kLowered<Format> - Format::kOffset;
        static_assert(kBack == 0 || kGroup == 32);  // x_sum is of 32
        if (kBack != 0) {
          value = _mm256_fmadd_ps(_mm256_broadcast_ss(x_sum + r * scales + x_group),
                                  _mm256_set1_ps(kBack), value);
        }
        const __m256 both =
            _mm256_mul_ps(scale, _mm256_broadcast_ss(x_scale + r * scales + x_group));
        result[r][h] = _mm256_fmadd_ps(value, both, result[r][h]);
        if (Format::kMin) {
          const __m256 min = _mm256_loadu_ps(panel.mins + g * kPanel + 8 * h);
          result[r][h] = _mm256_fnmadd_ps(
              min, _mm256_broadcast_ss(x_scaled_sum + r * scales + x_group), result[r][h]);
        }
      }
    }
  }
  alignas(32) float whole[kPanel];
  LONGSPAN_UNROLL
  for (int r = 0; r < R; ++r) {
    float* out = t.out + (row + r) * t.out_stride;
    float* to = t.columns == kPanel ? out : whole;
    _mm256_storeu_ps(to, result[r][0]);
    _mm256_storeu_ps(to + 8, result[r][1]);
    if (to == whole) std::copy_n(whole, t.columns, out);
  }
}

// Sums of three rows, their results and a step fit 16 registers. One row alone is slow: four are
// two and two.
template <class Format>
LONGSPAN_AVX2 void MultiplyBlocks(const BlockTile& t) {
  const Panel panel = Unpack<Format>(t.panel, t.in, t.scratch);
  int64_t row = 0;
  for (; t.rows - row == 3 || t.rows - row > 4; row += 3) MultiplyRows<Format, 3>(t, panel, row);
  for (; row + 2 <= t.rows; row += 2) MultiplyRows<Format, 2>(t, panel, row);
  if (row < t.rows) MultiplyRows<Format, 1>(t, panel, row);
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
