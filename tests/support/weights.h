#pragma once
// Random weight matrices of any type, and an independent decoder: one element at a time, in double,
// written from the formats' definition.
#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

#include "kernels/backend.h"

namespace longspan::testing {

inline constexpr DType kWeightTypes[] = {DType::kF32,  DType::kF16,  DType::kBF16,
                                         DType::kQ8_0, DType::kQ4_0, DType::kQ5_0,
                                         DType::kQ4_K, DType::kQ5_K, DType::kQ6_K};

struct Weights {
  DType type;
  int64_t rows, columns;
  std::vector<uint8_t> bytes;
  View view() const {
    return View::Matrix(const_cast<uint8_t*>(bytes.data()), type, rows, columns);
  }
};

// The matrix at `to`, in the form that the backend's ops read, or as it is where they read it in
// place.
View Place(Backend& backend, const View& matrix, std::byte* to);

// A copy of the matrix that owns its memory.
struct PlacedWeights {
  PlacedWeights(Backend& backend, const View& matrix)
      : memory(backend.Allocate(std::max(backend.WeightBytes(matrix), matrix.bytes()))),
        view(Place(backend, matrix, memory.data())) {}
  Buffer memory;
  View view;
};

// Random bytes with scales that keep the values of order one.
Weights RandomWeights(DType type, int64_t rows, int64_t columns, std::mt19937& random);

double DecodeHalf(uint16_t half);
double DecodeElement(DType type, const uint8_t* row, int64_t index);
std::vector<double> DecodeRow(const Weights& weights, int64_t row);

// Whole blocks of Q8_0, or BF16 or F32, by the formats' definition: Q8_0's scale is an F16 near the
// largest magnitude / 127, its levels are quotients of the unrounded scale.
std::vector<uint8_t> Encode(DType type, const std::vector<float>& values);
uint16_t EncodeHalf(double value);  // to nearest even; from 0 to 65504

std::vector<float> RandomFloats(int64_t count, std::mt19937& random);  // standard normal

}  // namespace longspan::testing
