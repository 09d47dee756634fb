#include "server/status.h"

#include "engine/request.h"
#include "google/rpc/error_details.pb.h"
#include "gtest/gtest.h"
#include "tests/support/test_server.h"

namespace longspan {
namespace {

using testing::DetailOf;

TEST(Status, NamesTheFieldThatAnInvalidArgumentBeginsWith) {
  const grpc::Status status =
      ToGrpc(absl::InvalidArgumentError("sampling.top_p: is 2, must be from 0 to 1"));
  EXPECT_EQ(status.error_code(), grpc::INVALID_ARGUMENT);
  const auto bad = DetailOf<google::rpc::BadRequest>(status);
  ASSERT_EQ(bad.field_violations_size(), 1);
  EXPECT_EQ(bad.field_violations(0).field(), "sampling.top_p");
  EXPECT_EQ(bad.field_violations(0).description(), "is 2, must be from 0 to 1");
}

TEST(Status, NamesNoFieldWhereTheMessageBeginsWithASentence) {
  const grpc::Status status = ToGrpc(absl::InvalidArgumentError("This is wrong: all of it"));
  EXPECT_EQ(DetailOf<google::rpc::BadRequest>(status).field_violations_size(), 0);
}

TEST(Status, NamesAnElementOfAList) {
  const grpc::Status status = ToGrpc(absl::InvalidArgumentError("messages[3].name: is set"));
  EXPECT_EQ(DetailOf<google::rpc::BadRequest>(status).field_violations(0).field(),
            "messages[3].name");
}

TEST(Status, CarriesTheReasonAndWhenToComeAgain) {
  const grpc::Status status =
      ToGrpc(WithReason(absl::ResourceExhaustedError("queue is full"), "QUEUE_FULL"));
  EXPECT_EQ(status.error_code(), grpc::RESOURCE_EXHAUSTED);
  EXPECT_EQ(DetailOf<google::rpc::ErrorInfo>(status).reason(), "QUEUE_FULL");
  EXPECT_EQ(DetailOf<google::rpc::ErrorInfo>(status).domain(), "longspan");
  EXPECT_EQ(DetailOf<google::rpc::RetryInfo>(status).retry_delay().nanos(), 500'000'000);
}

TEST(Status, OnlyAFullQueueIsWorthARetry) {
  const grpc::Status status =
      ToGrpc(WithReason(absl::ResourceExhaustedError("can never fit"), "NEVER_FITS"));
  EXPECT_EQ(DetailOf<google::rpc::ErrorInfo>(status).reason(), "NEVER_FITS");
  EXPECT_FALSE(DetailOf<google::rpc::RetryInfo>(status).has_retry_delay());
}

// Clients bound all headers of an answer to 8 KiB; the message is in it percent-encoded (three
// bytes for one) and, with its details, in base64.
TEST(Status, FitsTheHeadersHoweverLongWhatItQuotes) {
  std::string name;
  for (int i = 0; i < 100000; ++i) name += "é";
  const grpc::Status status = ToGrpc(absl::InvalidArgumentError("model: is '" + name + "'"));
  EXPECT_LT(status.error_message().size() * 3 + status.error_details().size() * 4 / 3, 5000u);
  google::rpc::Status details;
  ASSERT_TRUE(details.ParseFromString(status.error_details()));  // still valid UTF-8
  EXPECT_EQ(details.details_size(), 1);
}

}  // namespace
}  // namespace longspan
