#include "models/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>

#include "models/checkpoint_file.h"
#include "tests/support/paths.h"
#include "tests/support/safetensors_writer.h"

namespace longspan {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using testing::SafetensorsBytes;
using testing::SafetensorsWriter;
using testing::TempDir;
using testing::WriteFile;

absl::StatusOr<std::vector<TensorInfo>> Parse(const std::string& bytes) {
  return ParseSafetensors({reinterpret_cast<const std::byte*>(bytes.data()), bytes.size()},
                          "x.safetensors");
}

// The message must name the file, and hold each of `parts`: tensor or key, and both numbers.
void ExpectRefused(const std::string& bytes, const std::vector<std::string>& parts) {
  const auto tensors = Parse(bytes);
  ASSERT_FALSE(tensors.ok()) << "not refused: " << ::testing::PrintToString(parts);
  EXPECT_EQ(tensors.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(tensors.status().message()), HasSubstr("x.safetensors"));
  for (const std::string& part : parts) {
    EXPECT_THAT(std::string(tensors.status().message()), HasSubstr(part));
  }
}

std::string Entry(const std::string& name, const std::string& dtype, const std::string& shape,
                  const std::string& offsets) {
  return "\"" + name + "\":{\"dtype\":\"" + dtype + "\",\"shape\":" + shape +
         ",\"data_offsets\":" + offsets + "}";
}

std::string Header(const std::string& entries) { return "{" + entries + "}"; }

TEST(Safetensors, GivesEachTensorItsShapeTypeAndBytes) {
  SafetensorsWriter writer;
  writer.AddF32("b", {2, 2}, {1, 2, 3, 4})
      .Add("a", "BF16", {3}, "abcdef")
      .Add("s", "F16", {}, "xy");
  const std::string bytes = writer.Bytes();
  const auto tensors = Parse(bytes);
  ASSERT_TRUE(tensors.ok()) << tensors.status();
  ASSERT_EQ(tensors->size(), 3u);
  EXPECT_EQ((*tensors)[0].name, "b");
  EXPECT_EQ((*tensors)[0].shape, (std::vector<int64_t>{2, 2}));
  EXPECT_EQ((*tensors)[0].dtype, DType::kF32);
  EXPECT_EQ((*tensors)[1].dtype, DType::kBF16);
  EXPECT_EQ(std::string(reinterpret_cast<const char*>((*tensors)[1].data.data()), 6), "abcdef");
  EXPECT_TRUE((*tensors)[2].shape.empty());
  EXPECT_EQ((*tensors)[2].data.size(), 2u);
}

TEST(Safetensors, AcceptsMetadataOfStringsAndEmptyTensorsInTheirPlace) {
  const std::string header =
      Header("\"__metadata__\":{\"format\":\"pt\"}," + Entry("a", "F32", "[1]", "[0,4]") + "," +
             Entry("none", "F32", "[0,7]", "[4,4]"));
  const auto tensors = Parse(SafetensorsBytes(header, "1234"));
  ASSERT_TRUE(tensors.ok()) << tensors.status();
  EXPECT_EQ(tensors->size(), 2u);
}

TEST(Safetensors, RefusesAFileCutAnywhere) {
  const std::string whole = SafetensorsWriter().AddF32("a", {2}, {1, 2}).Bytes();
  ASSERT_TRUE(Parse(whole).ok());
  for (size_t n = 0; n < whole.size(); ++n) EXPECT_FALSE(Parse(whole.substr(0, n)).ok()) << n;
  EXPECT_FALSE(Parse(whole + "x").ok()) << "a byte too many";
}

TEST(Safetensors, RefusesAHeaderLongerThanTheFileOrTheLimit) {
  const auto with_length = [](uint64_t length) {
    return std::string(reinterpret_cast<const char*>(&length), 8) + "{}";
  };
  ExpectRefused(with_length(3), {"header of 3 bytes", "the file has 2"});
  ExpectRefused(with_length(100'000'001), {"100000001", "100000000"});
  ExpectRefused(with_length(UINT64_MAX), {"18446744073709551615", "100000000"});
  ExpectRefused(with_length(0), {"does not start with"});
  ExpectRefused("1234567", {"7 bytes", "takes 8"});
}

TEST(Safetensors, RefusesAHeaderThatIsNotOneStrictObject) {
  ExpectRefused(SafetensorsBytes(" {}", ""), {"does not start with"});
  ExpectRefused(SafetensorsBytes("[]", ""), {"does not start with"});
  ExpectRefused(SafetensorsBytes("{\"a\":}", ""), {"not valid JSON"});
  ExpectRefused(SafetensorsBytes("{} {}", ""), {"not valid JSON"});
  ExpectRefused(SafetensorsBytes("{\"a\":NaN}", ""), {"not valid JSON"});
  ExpectRefused(SafetensorsBytes("{\"\xff\":1}", ""), {"not valid JSON"});
  ExpectRefused(SafetensorsBytes("{\"a\":3}", ""), {"\"a\"", "not an object"});
}

TEST(Safetensors, RefusesDuplicateKeys) {
  ExpectRefused(SafetensorsBytes(Header(Entry("twin", "F32", "[1]", "[0,4]") + "," +
                                        Entry("twin", "F32", "[1]", "[4,8]")),
                                 "12345678"),
                {"\"twin\"", "appears twice"});
  ExpectRefused(SafetensorsBytes("{\"a\":{\"dtype\":\"F32\",\"dtype\":\"F32\",\"shape\":[1],"
                                 "\"data_offsets\":[0,4]}}",
                                 "1234"),
                {"\"dtype\"", "appears twice"});
}

TEST(Safetensors, RefusesDeepNesting) {
  const std::string deep = std::string(100000, '[') + std::string(100000, ']');
  ExpectRefused(SafetensorsBytes("{\"a\":" + deep + "}", ""), {"nested deeper than 4"});
}

TEST(Safetensors, RefusesOtherTypesByName) {
  for (const char* dtype : {"F64", "I64", "I32", "U8", "BOOL", "F8_E4M3", "f32", ""}) {
    ExpectRefused(SafetensorsBytes(Header(Entry("w", dtype, "[1]", "[0,4]")), "1234"),
                  {"\"w\"", std::string("dtype \"") + dtype + "\""});
  }
  ExpectRefused(
      SafetensorsBytes("{\"w\":{\"dtype\":7,\"shape\":[1],\"data_offsets\":[0,4]}}", "1234"),
      {"\"w\"", "dtype is not a string"});
}

TEST(Safetensors, RefusesShapesWhoseProductOverflows) {
  // 4194305 * 4194305 * 211106198978564 wraps to 4 in 64 bits.
  ExpectRefused(
      SafetensorsBytes(Header(Entry("w", "F32", "[4194305,4194305,211106198978564]", "[0,16]")),
                       "0123456789abcdef"),
      {"\"w\"", "9223372036854775807"});
  ExpectRefused(SafetensorsBytes(Header(Entry("w", "F32", "[4611686018427387904]", "[0,0]")), ""),
                {"\"w\"", "4611686018427387904", "overflow"});
  ExpectRefused(
      SafetensorsBytes(Header(Entry("w", "F32", "[0,18446744073709551615]", "[0,0]")), ""),
      {"\"w\"", "18446744073709551615"});
  ExpectRefused(SafetensorsBytes(Header(Entry("w", "F32", "[-1]", "[0,4]")), "1234"),
                {"\"w\"", "-1"});
  ExpectRefused(SafetensorsBytes(Header(Entry("w", "F32", "[1.0]", "[0,4]")), "1234"),
                {"\"w\"", "1.0"});
  ExpectRefused(SafetensorsBytes(Header(Entry("w", "F32", "[1,1,1,1,1,1,1,1,1]", "[0,4]")), "1234"),
                {"\"w\"", "9 dimensions", "8"});
}

TEST(Safetensors, RefusesASizeThatIsNotShapeTimesType) {
  ExpectRefused(SafetensorsBytes(Header(Entry("w", "F32", "[2]", "[0,4]")), "1234"),
                {"\"w\"", "span 4 bytes", "needs 8"});
  ExpectRefused(SafetensorsBytes(Header(Entry("w", "F32", "[2]", "[8,0]")), "12345678"),
                {"\"w\"", "end 0", "begin 8"});
}

TEST(Safetensors, RefusesOffsetsThatAreNotTwoWholeNumbers) {
  for (const char* offsets : {"[0]", "[0,4,8]", "[-4,0]", "[0,4.0]", "4", "[\"0\",\"4\"]"}) {
    ExpectRefused(SafetensorsBytes(Header(Entry("w", "F32", "[1]", offsets)), "1234"),
                  {"\"w\"", "data_offsets"});
  }
}

TEST(Safetensors, RefusesHolesOverlapsAndBytesLeftOver) {
  const auto two = [](const std::string& a, const std::string& b) {
    return Header(Entry("a", "F32", "[1]", a) + "," + Entry("b", "F32", "[1]", b));
  };
  ExpectRefused(SafetensorsBytes(two("[0,4]", "[8,12]"), "123456789012"),
                {"\"b\"", "8 (hole)", "4"});
  ExpectRefused(SafetensorsBytes(two("[0,4]", "[2,6]"), "123456"), {"\"b\"", "2 (overlap)", "4"});
  ExpectRefused(SafetensorsBytes(two("[0,4]", "[0,4]"), "1234"), {"0 (overlap)", "4"});
  ExpectRefused(SafetensorsBytes(two("[4,8]", "[8,12]"), "123456789012"), {"4 (hole)", "0"});
  ExpectRefused(SafetensorsBytes(two("[0,4]", "[4,8]"), "123456789"), {"8 of 9"});
  ExpectRefused(SafetensorsBytes(two("[0,4]", "[4,8]"), "1234567"), {"8 of 7"});
}

TEST(Safetensors, RefusesAnEmptyTensorOutsideTheData) {
  ExpectRefused(SafetensorsBytes(Header(Entry("a", "F32", "[1]", "[0,4]") + "," +
                                        Entry("z", "F32", "[0]", "[9,9]")),
                                 "1234"),
                {"\"z\"", "9 (hole)"});
  ExpectRefused(SafetensorsBytes(Header(Entry("a", "F32", "[1]", "[0,4]") + "," +
                                        Entry("z", "F32", "[0]", "[2,2]")),
                                 "1234"),
                {"\"z\"", "2 (overlap)"});
}

TEST(Safetensors, RefusesEntriesWithMissingOrForeignKeys) {
  ExpectRefused(SafetensorsBytes("{\"w\":{\"dtype\":\"F32\",\"shape\":[0]}}", ""),
                {"\"w\"", "no data_offsets"});
  ExpectRefused(SafetensorsBytes(
                    "{\"w\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0],\"x\":1}}", ""),
                {"\"w\"", "4 keys"});
  ExpectRefused(SafetensorsBytes("{\"__metadata__\":{\"format\":1}}", ""),
                {"__metadata__", "\"format\""});
}

// A directory with config.json and whatever a test adds.
class SafetensorsDirectory : public ::testing::Test {
 protected:
  SafetensorsDirectory() { Write("config.json", "{\"model_type\":\"llama\"}"); }
  void Write(const std::string& name, const std::string& bytes) {
    WriteFile(dir_ + "/" + name, bytes);
  }
  void WriteIndex(const std::string& map) {
    Write("model.safetensors.index.json", "{\"weight_map\":" + map + "}");
  }
  void ExpectRefused(const std::vector<std::string>& parts) {
    const auto checkpoint = Checkpoint::Open(dir_);
    ASSERT_FALSE(checkpoint.ok());
    for (const std::string& part : parts) {
      EXPECT_THAT(std::string(checkpoint.status().message()), HasSubstr(part));
    }
  }
  const std::string dir_ = TempDir();
  const std::string one_ = SafetensorsWriter().AddF32("a", {1}, {1.5f}).Bytes();
};

TEST_F(SafetensorsDirectory, OpensOneFile) {
  Write("model.safetensors", one_);
  const auto checkpoint = Checkpoint::Open(dir_);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_EQ((*checkpoint)->format(), Checkpoint::Format::kSafetensors);
  const TensorInfo* a = (*checkpoint)->Find("a");
  ASSERT_NE(a, nullptr);
  EXPECT_EQ(*reinterpret_cast<const float*>(a->data.data()), 1.5f);
  EXPECT_EQ((*checkpoint)->Find("b"), nullptr);
  EXPECT_EQ(*(*checkpoint)->ReadSideFile("tokenizer.json"), "");
  EXPECT_EQ(*(*checkpoint)->ReadSideFile("config.json"), "{\"model_type\":\"llama\"}");
}

TEST_F(SafetensorsDirectory, OpensTheFilesOfAnIndex) {
  Write("one.safetensors", one_);
  Write("two.safetensors", SafetensorsWriter().AddF32("b", {1}, {2.5f}).Bytes());
  WriteIndex("{\"a\":\"one.safetensors\",\"b\":\"two.safetensors\"}");
  const auto checkpoint = Checkpoint::Open(dir_);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_EQ((*checkpoint)->tensors().size(), 2u);
  EXPECT_THAT((*checkpoint)->Find("b")->file, HasSubstr("two.safetensors"));
}

TEST_F(SafetensorsDirectory, CopiesWhatIsNotAligned) {
  SafetensorsWriter writer;
  writer.AddF32("a", {2}, {1.5f, 2.5f});
  for (const char* name : {"a", "ab", "abc", "abcd"}) {  // header lengths of every remainder
    SafetensorsWriter shifted;
    shifted.AddF32(name, {2}, {1.5f, 2.5f});
    Write("model.safetensors", shifted.Bytes(/*padded=*/false));
    const auto checkpoint = Checkpoint::Open(dir_);
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    const TensorInfo* tensor = (*checkpoint)->Find(name);
    ASSERT_NE(tensor, nullptr);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(tensor->data.data()) % 4, 0u);
    EXPECT_EQ(reinterpret_cast<const float*>(tensor->data.data())[1], 2.5f);
  }
}

TEST_F(SafetensorsDirectory, RefusesAnIndexThatLeavesTheDirectory) {
  const std::string outside = TempDir();
  WriteFile(outside + "/evil.safetensors", one_);
  for (const std::string name :
       {"../evil.safetensors", "/etc/evil.safetensors", "sub/evil.safetensors", "..",
        ".hidden.safetensors", "", "model.bin"}) {
    WriteIndex("{\"a\":\"" + name + "\"}");
    ExpectRefused({"model.safetensors.index.json", "\"a\"", "\"" + name + "\""});
  }
  WriteIndex("{\"a\":\"nul\\u0000.safetensors\"}");
  ExpectRefused({"plain name"});
  ASSERT_EQ(symlink((outside + "/evil.safetensors").c_str(), (dir_ + "/link.safetensors").c_str()),
            0);
  WriteIndex("{\"a\":\"link.safetensors\"}");
  ExpectRefused({"link.safetensors", "outside the model's directory"});
}

TEST_F(SafetensorsDirectory, RefusesSideFilesOutside) {
  Write("model.safetensors", one_);
  const auto checkpoint = Checkpoint::Open(dir_);
  ASSERT_TRUE(checkpoint.ok());
  ASSERT_EQ(symlink("/etc/passwd", (dir_ + "/tokenizer.model").c_str()), 0);
  EXPECT_FALSE((*checkpoint)->ReadSideFile("tokenizer.model").ok());
  EXPECT_FALSE((*checkpoint)->ReadSideFile("../config.json").ok());
  EXPECT_FALSE((*checkpoint)->ReadSideFile("..").ok());
  EXPECT_FALSE((*checkpoint)->ReadSideFile("").ok());
}

TEST_F(SafetensorsDirectory, BoundsSideFiles) {
  Write("model.safetensors", one_);
  Write("tokenizer.json", std::string((16 << 20) + 1, ' '));
  const auto checkpoint = Checkpoint::Open(dir_);
  ASSERT_TRUE(checkpoint.ok());
  const auto text = (*checkpoint)->ReadSideFile("tokenizer.json");
  EXPECT_THAT(std::string(text.status().message()),
              AllOf(HasSubstr("16777217"), HasSubstr("16777216")));
}

TEST_F(SafetensorsDirectory, RefusesAnIndexThatDoesNotMatchItsFiles) {
  Write("one.safetensors", one_);
  WriteIndex("{\"a\":\"one.safetensors\",\"ghost\":\"one.safetensors\"}");
  ExpectRefused({"\"ghost\"", "one.safetensors"});
  WriteIndex("{\"a\":\"one.safetensors\",\"b\":\"missing.safetensors\"}");
  ExpectRefused({"missing.safetensors"});
  Write("two.safetensors", SafetensorsWriter().AddF32("a", {1}, {0}).AddF32("b", {1}, {0}).Bytes());
  WriteIndex("{\"a\":\"one.safetensors\",\"b\":\"two.safetensors\"}");
  ExpectRefused({"two.safetensors", "\"a\"", "\"one.safetensors\""});
  Write("two.safetensors", SafetensorsWriter().AddF32("b", {1}, {0}).AddF32("c", {1}, {0}).Bytes());
  ExpectRefused({"two.safetensors", "\"c\"", "not in the index"});
}

TEST_F(SafetensorsDirectory, RefusesABrokenIndex) {
  Write("model.safetensors", one_);
  for (const char* map : {"[]", "{}", "{\"a\":1}",
                          "{\"a\":\"x.safetensors\",\"a\":\"y.safetensors\"}", "{", "null"}) {
    WriteIndex(map);
    ExpectRefused({"model.safetensors.index.json"});
  }
}

TEST_F(SafetensorsDirectory, SaysWhatIsNotThere) {
  ExpectRefused({dir_, "model.safetensors"});
  std::filesystem::remove(dir_ + "/config.json");
  ExpectRefused({"config.json"});
  EXPECT_EQ(Checkpoint::Open(dir_ + "/nowhere").status().code(), absl::StatusCode::kNotFound);
  Write("model.bin", "x");
  EXPECT_THAT(std::string(Checkpoint::Open(dir_ + "/model.bin").status().message()),
              HasSubstr(".gguf"));
}

TEST_F(SafetensorsDirectory, DoesNotWaitOnAPipe) {
  ASSERT_EQ(mkfifo((dir_ + "/model.safetensors").c_str(), 0600), 0);
  ExpectRefused({"model.safetensors", "not a regular file"});
}

TEST_F(SafetensorsDirectory, NamesAFileThatShrinksWhileItIsMapped) {
  const std::string path = dir_ + "/model.safetensors";
  Write("model.safetensors",
        SafetensorsWriter().AddF32("a", {65536}, std::vector<float>(65536, 1)).Bytes());
  const auto checkpoint = Checkpoint::Open(dir_);
  ASSERT_TRUE(checkpoint.ok());
  const absl::Span<const std::byte> data = (*checkpoint)->Find("a")->data;
  EXPECT_EXIT(
      {
        if (truncate(path.c_str(), 4096) != 0) std::abort();
        volatile std::byte last = data.back();
        (void)last;
      },
      ::testing::ExitedWithCode(kFileShrankExitCode), "model.safetensors.*became shorter");
}

}  // namespace
}  // namespace longspan
