#include "models/gguf.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/support/gguf_writer.h"
#include "tests/support/paths.h"
#include "tests/support/safetensors_writer.h"

namespace longspan {
namespace {

using testing::GgufWriter;
using ::testing::HasSubstr;

constexpr uint32_t kF32 = 0, kF16 = 1, kQ4_0 = 2, kQ5_0 = 6, kQ8_0 = 8, kQ4K = 12, kQ5K = 13,
                   kQ6K = 14, kBF16 = 30;

absl::StatusOr<GgufFile> Parse(const std::string& bytes) {
  return ParseGguf({reinterpret_cast<const std::byte*>(bytes.data()), bytes.size()}, "x.gguf");
}

void ExpectRefused(const std::string& bytes, const std::vector<std::string>& parts) {
  const auto file = Parse(bytes);
  ASSERT_FALSE(file.ok()) << "not refused: " << ::testing::PrintToString(parts);
  EXPECT_EQ(file.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(file.status().message()), HasSubstr("x.gguf"));
  for (const std::string& part : parts) {
    EXPECT_THAT(std::string(file.status().message()), HasSubstr(part));
  }
}

template <class T>
T Value(const GgufFile& file, const std::string& key) {
  return std::get<T>(file.metadata.at(key));
}

TEST(Gguf, ReadsEveryTypeOfValue) {
  GgufWriter w;
  w.Key("u8", w.kU8, w.Raw<uint8_t>(200)).Key("i8", w.kI8, w.Raw<int8_t>(-3));
  w.Key("u16", w.kU16, w.Raw<uint16_t>(65535)).Key("i16", w.kI16, w.Raw<int16_t>(-300));
  w.U32("u32", 4000000000u).Key("i32", w.kI32, w.Raw<int32_t>(-70000));
  w.Key("u64", w.kU64, w.Raw<uint64_t>(UINT64_MAX)).Key("i64", w.kI64, w.Raw<int64_t>(INT64_MIN));
  w.F32("f32", 0.5f).Key("f64", w.kF64, w.Raw<double>(1e300));
  w.Key("bool", w.kBool, w.Raw<uint8_t>(1)).String("text", "grüße");
  w.Strings("texts", {"a", "", "ccc"}).Array<float>("floats", w.kF32, {1, 2});
  w.Array<int32_t>("ints", w.kI32, {-1, 5}).Array<uint8_t>("bools", w.kBool, {0, 1});
  w.Array<uint16_t>("none", w.kU16, {});
  const auto file = Parse(w.Bytes());
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(Value<uint64_t>(*file, "u8"), 200u);
  EXPECT_EQ(Value<int64_t>(*file, "i8"), -3);
  EXPECT_EQ(Value<uint64_t>(*file, "u16"), 65535u);
  EXPECT_EQ(Value<int64_t>(*file, "i16"), -300);
  EXPECT_EQ(Value<uint64_t>(*file, "u32"), 4000000000u);
  EXPECT_EQ(Value<int64_t>(*file, "i32"), -70000);
  EXPECT_EQ(Value<uint64_t>(*file, "u64"), UINT64_MAX);
  EXPECT_EQ(Value<int64_t>(*file, "i64"), INT64_MIN);
  EXPECT_EQ(Value<double>(*file, "f32"), 0.5);
  EXPECT_EQ(Value<double>(*file, "f64"), 1e300);
  EXPECT_TRUE(Value<bool>(*file, "bool"));
  EXPECT_EQ(Value<std::string>(*file, "text"), "grüße");
  EXPECT_EQ(Value<std::vector<std::string>>(*file, "texts"),
            (std::vector<std::string>{"a", "", "ccc"}));
  EXPECT_EQ(Value<std::vector<double>>(*file, "floats"), (std::vector<double>{1, 2}));
  EXPECT_EQ(Value<std::vector<int64_t>>(*file, "ints"), (std::vector<int64_t>{-1, 5}));
  EXPECT_EQ(Value<std::vector<bool>>(*file, "bools"), (std::vector<bool>{false, true}));
  EXPECT_TRUE(Value<std::vector<uint64_t>>(*file, "none").empty());
}

TEST(Gguf, GivesTensorsOutermostFirstWithTheirBlocks) {
  const struct {
    uint32_t type;
    DType dtype;
    uint64_t columns, row_bytes;  // block sizes as the format defines them
  } kTypes[] = {{kF32, DType::kF32, 3, 12},     {kF16, DType::kF16, 3, 6},
                {kBF16, DType::kBF16, 3, 6},    {kQ8_0, DType::kQ8_0, 64, 68},
                {kQ4_0, DType::kQ4_0, 64, 36},  {kQ5_0, DType::kQ5_0, 64, 44},
                {kQ4K, DType::kQ4_K, 512, 288}, {kQ5K, DType::kQ5_K, 512, 352},
                {kQ6K, DType::kQ6_K, 512, 420}};
  GgufWriter w;
  for (const auto& t : kTypes) {
    w.Tensor(Info(t.dtype).name, {2, t.columns}, t.type,
             std::string(2 * t.row_bytes, static_cast<char>('a' + t.type)));
  }
  const std::string bytes = w.Bytes();
  const auto file = Parse(bytes);
  ASSERT_TRUE(file.ok()) << file.status();
  ASSERT_EQ(file->tensors.size(), std::size(kTypes));
  for (size_t i = 0; i < std::size(kTypes); ++i) {
    const TensorInfo& tensor = file->tensors[i];
    EXPECT_EQ(tensor.dtype, kTypes[i].dtype);
    EXPECT_EQ(tensor.shape, (std::vector<int64_t>{2, static_cast<int64_t>(kTypes[i].columns)}));
    EXPECT_EQ(tensor.data.size(), 2 * kTypes[i].row_bytes);
    EXPECT_EQ(static_cast<char>(tensor.data[0]), static_cast<char>('a' + kTypes[i].type));
    EXPECT_EQ((reinterpret_cast<const char*>(tensor.data.data()) - bytes.data()) % 32, 0);
  }
}

TEST(Gguf, ObeysTheFilesOwnAlignment) {
  GgufWriter w;
  w.alignment = 256;
  w.U32("general.alignment", 256).Tensor("a", {1}, kF32, "abcd").Tensor("b", {1}, kF32, "efgh");
  const std::string bytes = w.Bytes();
  const auto file = Parse(bytes);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ((reinterpret_cast<const char*>(file->tensors[1].data.data()) - bytes.data()) % 256, 0);
  EXPECT_EQ(static_cast<char>(file->tensors[1].data[0]), 'e');
}

TEST(Gguf, RefusesAFileCutAnywhere) {
  GgufWriter w;
  w.U32("k", 7).Strings("s", {"a", "b"}).Tensor("t", {2, 2}, kF32, "0123456789abcdef");
  const std::string whole = w.Bytes();
  ASSERT_TRUE(Parse(whole).ok());
  for (size_t n = 0; n < whole.size(); ++n) EXPECT_FALSE(Parse(whole.substr(0, n)).ok()) << n;
}

TEST(Gguf, RefusesOtherMagicsAndVersions) {
  ExpectRefused("GGML" + std::string(20, '\0'), {"does not start with"});
  GgufWriter w;
  w.version = 2;
  ExpectRefused(w.Bytes(), {"version 2", "version 3"});
  w.version = 0x03000000;
  ExpectRefused(w.Bytes(), {"version 50331648", "little-endian"});
}

TEST(Gguf, RefusesCountsThatTheFileCannotHold) {
  GgufWriter w;
  w.key_count = UINT64_MAX;
  ExpectRefused(w.Bytes(), {"18446744073709551615 metadata entries", "at most 0"});
  w.key_count = uint64_t{1} << 60;  // times the size of an entry wraps
  ExpectRefused(w.Bytes(), {"1152921504606846976", "at most 0"});
  w.key_count.reset();
  w.tensor_count = UINT64_MAX / 32 + 2;
  ExpectRefused(w.Bytes(), {"576460752303423489 tensors", "at most 0"});
  GgufWriter one;
  one.U32("k", 1).key_count = 2;
  ExpectRefused(one.Bytes(), {"2 metadata entries", "at most 1"});
}

TEST(Gguf, RefusesStringsAndArraysLongerThanTheFile) {
  GgufWriter w;
  ExpectRefused(GgufWriter().Key("k", w.kString, w.Raw<uint64_t>(UINT64_MAX) + "abc").Bytes(),
                {"\"k\"", "18446744073709551615", "3 left"});
  ExpectRefused(GgufWriter()
                    .Key("k", w.kArray, w.Raw<uint32_t>(w.kU64) + w.Raw<uint64_t>(1ull << 61))
                    .Bytes(),
                {"\"k\"", "2305843009213693952 values", "at most 0"});
  ExpectRefused(GgufWriter()
                    .Key("k", w.kArray,
                         w.Raw<uint32_t>(w.kString) + w.Raw<uint64_t>(3) + w.Text("") + w.Text(""))
                    .Bytes(),
                {"\"k\"", "3 values", "at most 2"});
  std::string long_name = w.Raw<uint64_t>(1000) + "abcdefgh";
  GgufWriter lies;
  lies.key_count = 1;
  ExpectRefused(lies.Bytes() + long_name, {"metadata key of 1000 bytes", "8 left"});
}

TEST(Gguf, BoundsTheValuesOfAllArrays) {
  GgufWriter w;
  w.Array<uint8_t>("k", w.kU8, std::vector<uint8_t>((1 << 24) + 1));
  ExpectRefused(w.Bytes(), {"\"k\"", "16777217", "16777216"});
}

TEST(Gguf, RefusesTypesThatAreNotThere) {
  GgufWriter w;
  ExpectRefused(GgufWriter().Key("k", 13, w.Raw<uint64_t>(0)).Bytes(), {"\"k\"", "type 13"});
  ExpectRefused(GgufWriter().Key("k", 0xFFFFFFFF, w.Raw<uint64_t>(0)).Bytes(),
                {"\"k\"", "type 4294967295"});
  ExpectRefused(GgufWriter().Key("k", w.kArray, w.Raw<uint32_t>(99) + w.Raw<uint64_t>(0)).Bytes(),
                {"\"k\"", "array of type 99"});
  ExpectRefused(
      GgufWriter().Key("k", w.kArray, w.Raw<uint32_t>(w.kArray) + w.Raw<uint64_t>(0)).Bytes(),
      {"\"k\"", "array of type 9"});
  ExpectRefused(GgufWriter().Key("k", w.kBool, w.Raw<uint8_t>(2)).Bytes(), {"\"k\"", "is 2"});
}

TEST(Gguf, RefusesDuplicates) {
  ExpectRefused(GgufWriter().U32("k", 1).U32("k", 1).Bytes(), {"\"k\"", "twice"});
  ExpectRefused(GgufWriter().U32("", 1).Bytes(), {"metadata key of 0 bytes"});
  ExpectRefused(GgufWriter().Tensor("t", {1}, kF32, "abcd").Tensor("t", {1}, kF32, "abcd").Bytes(),
                {"\"t\"", "twice"});
}

TEST(Gguf, RefusesTensorsOfOtherTypesByName) {
  ExpectRefused(GgufWriter().Tensor("t", {32}, 3, std::string(20, 'x')).Bytes(),
                {"\"t\"", "type 3 (Q4_1)"});
  ExpectRefused(GgufWriter().Tensor("t", {32}, 39, std::string(20, 'x')).Bytes(),
                {"\"t\"", "(MXFP4)"});
  ExpectRefused(GgufWriter().Tensor("t", {32}, 4242, std::string(20, 'x')).Bytes(),
                {"\"t\"", "type 4242"});
}

TEST(Gguf, RefusesRanksAndDimensionsOutOfBounds) {
  ExpectRefused(GgufWriter().Tensor("t", {}, kF32, "abcd").Bytes(), {"\"t\"", "0 dimensions"});
  ExpectRefused(GgufWriter().Tensor("t", {1, 1, 1, 1, 1}, kF32, "abcd").Bytes(),
                {"\"t\"", "5 dimensions", "1 to 4"});
  ExpectRefused(GgufWriter().Tensor("t", {0, 4}, kF32, "abcd").Bytes(),
                {"\"t\"", "dimension of 0"});
  // A rank read as a count of dims to store must not be trusted.
  GgufWriter w;
  w.tensor_count = 1;
  ExpectRefused(w.Bytes() + w.Text("t") + w.Raw<uint32_t>(0xFFFFFFFF) + std::string(40, '\1'),
                {"\"t\"", "4294967295 dimensions", "1 to 4"});
}

TEST(Gguf, RefusesElementProductsThatOverflow) {
  // 2^32 * 2^31 = 2^63 is negative as a signed number.
  ExpectRefused(GgufWriter().Tensor("t", {1ull << 31, 1ull << 32}, kF32, "abcd").Bytes(),
                {"\"t\"", "4294967296", "9223372036854775807"});
  // 2^32 * 2^32 wraps to 0.
  ExpectRefused(GgufWriter().Tensor("t", {1ull << 32, 1ull << 32}, kF32, "abcd").Bytes(),
                {"\"t\"", "9223372036854775807"});
  ExpectRefused(GgufWriter().Tensor("t", {UINT64_MAX}, kF32, "abcd").Bytes(),
                {"\"t\"", "18446744073709551615", "9223372036854775807"});
  // 2^62 elements fit, their 2^64 bytes do not.
  ExpectRefused(GgufWriter().Tensor("t", {1ull << 62}, kF32, "abcd").Bytes(),
                {"\"t\"", "4611686018427387904 elements", "overflow"});
}

TEST(Gguf, RefusesASizeThatWrapsWhenItIsRoundedUp) {
  // 2^64 - 4 bytes; rounded up to 32 it would be 0.
  ExpectRefused(GgufWriter().Tensor("t", {(1ull << 62) - 1}, kF32, "abcd").Bytes(),
                {"\"t\"", "18446744073709551612 bytes", "the file has 4 bytes"});
}

TEST(Gguf, RefusesSizesWhoseSumWraps) {
  // Each 2^63 bytes: together 0 in 64 bits.
  ExpectRefused(GgufWriter()
                    .TensorAt("a", {1ull << 61}, kF32, 0)
                    .TensorAt("b", {1ull << 61}, kF32, 1ull << 63)
                    .Data("abcd")
                    .Bytes(),
                {"\"a\"", "9223372036854775808 bytes", "the file has 4 bytes"});
}

TEST(Gguf, RefusesTensorsOutsideTheFile) {
  ExpectRefused(GgufWriter().TensorAt("t", {2}, kF32, 0).Data("abcd").Bytes(),
                {"\"t\"", "8 bytes at offset 0", "the file has 4"});
  ExpectRefused(GgufWriter().TensorAt("t", {1}, kF32, 32).Data("abcd").Bytes(),
                {"\"t\"", "4 bytes at offset 32", "the file has 4"});
  ExpectRefused(GgufWriter().TensorAt("t", {8}, kF32, UINT64_MAX - 31).Data("abcd").Bytes(),
                {"\"t\"", "offset 18446744073709551584", "the file has 4"});
  ExpectRefused(GgufWriter().TensorAt("t", {1}, kF32, 4).Data("abcdefgh").Bytes(),
                {"\"t\"", "offset 4", "alignment 32"});
}

TEST(Gguf, RefusesOverlappingTensors) {
  ExpectRefused(GgufWriter()
                    .TensorAt("a", {16}, kF32, 0)
                    .TensorAt("b", {1}, kF32, 32)
                    .Data(std::string(64, 'x'))
                    .Bytes(),
                {"\"b\"", "offset 32", "\"a\"", "ends at 64"});
  ExpectRefused(
      GgufWriter().TensorAt("a", {1}, kF32, 0).TensorAt("b", {1}, kF32, 0).Data("abcd").Bytes(),
      {"offset 0", "ends at 4"});
}

TEST(Gguf, RefusesRowsThatAreNotWholeBlocks) {
  // 2 * 16 elements are one block, but its rows are half of one.
  ExpectRefused(GgufWriter().Tensor("t", {2, 16}, kQ8_0, std::string(34, 'x')).Bytes(),
                {"\"t\"", "rows of 16", "block of 32"});
  ExpectRefused(GgufWriter().Tensor("t", {1, 128}, kQ4K, std::string(144, 'x')).Bytes(),
                {"\"t\"", "rows of 128", "block of 256"});
}

TEST(Gguf, RefusesABadAlignment) {
  for (const uint32_t alignment : {0u, 1u, 4u, 24u, 0x80000000u}) {
    ExpectRefused(GgufWriter().U32("general.alignment", alignment).Bytes(),
                  {"general.alignment", std::to_string(alignment)});
  }
  ExpectRefused(GgufWriter().String("general.alignment", "32").Bytes(),
                {"general.alignment", "not an unsigned number"});
}

TEST(Gguf, OpensAsACheckpoint) {
  const std::string path = testing::TempDir() + "/tiny.gguf";
  testing::WriteFile(path, GgufWriter().U32("k", 1).Tensor("t", {1}, kF32, "abcd").Bytes());
  const auto checkpoint = Checkpoint::Open(path);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_EQ((*checkpoint)->format(), Checkpoint::Format::kGguf);
  EXPECT_EQ((*checkpoint)->gguf().size(), 1u);
  ASSERT_NE((*checkpoint)->Find("t"), nullptr);
  EXPECT_EQ((*checkpoint)->Find("t")->file, path);
  EXPECT_EQ(*(*checkpoint)->ReadSideFile("config.json"), "");
}

}  // namespace
}  // namespace longspan
