#include "server/request_conversion.h"

#include <cmath>
#include <limits>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "models/checkpoint.h"
#include "tests/support/paths.h"

namespace longspan {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::SizeIs;
using ::testing::StartsWith;

class RequestConversion : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    auto checkpoint = Checkpoint::Open(testing::SourcePath("models/default"));
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    tokenizer_ = Tokenizer::Create(**checkpoint)->release();
    spec_ = new ModelSpec;
    spec_->vocab = tokenizer_->vocab_size();
  }
  RequestConversion() {
    context_.tokenizer = tokenizer_;
    context_.spec = spec_;
    context_.max_context = 1000;
    context_.model_names = {"small", "tiny"};
    context_.max_prompt_bytes = 4096;
    request_.set_text("Once upon a time");
  }
  std::string Refusal() {
    auto converted = ToRequest(request_, context_);
    return converted.ok() ? "accepted" : std::string(converted.status().message());
  }

  static Tokenizer* tokenizer_;
  static ModelSpec* spec_;
  ConversionContext context_;
  v1::CompleteRequest request_;
};
Tokenizer* RequestConversion::tokenizer_ = nullptr;
ModelSpec* RequestConversion::spec_ = nullptr;

TEST_F(RequestConversion, FillsDefaultsAndTheRestOfTheContext) {
  auto r = ToRequest(request_, context_);
  ASSERT_TRUE(r.ok()) << r.status();
  EXPECT_EQ(r->prompt, tokenizer_->Encode("Once upon a time"));
  EXPECT_EQ(r->stopping.max_tokens, 1000 - static_cast<int>(r->prompt.size()));
  EXPECT_EQ(r->sampling.temperature, 1);
  EXPECT_EQ(r->sampling.top_p, 1);
  EXPECT_EQ(r->sampling.repetition_penalty, 1);
  EXPECT_FALSE(r->sampling.seed.has_value());
  EXPECT_EQ(r->n, 1);
  EXPECT_TRUE(r->output.skip_special_tokens);
  EXPECT_THAT(r->id, StartsWith("cmpl-"));
}

TEST_F(RequestConversion, MakesADifferentIdForEachRequest) {
  EXPECT_NE(ToRequest(request_, context_)->id, ToRequest(request_, context_)->id);
}

TEST_F(RequestConversion, CarriesEveryKnob) {
  request_.set_request_id("mine");
  request_.set_priority(-7);
  auto& s = *request_.mutable_sampling();
  s.set_temperature(0.5f);
  s.set_top_p(0.9f);
  s.set_top_k(40);
  s.set_min_p(0.1f);
  s.set_seed(~uint64_t{0});
  s.set_n(3);
  s.set_presence_penalty(0.25f);
  s.set_frequency_penalty(-0.5f);
  s.set_repetition_penalty(1.5f);
  (*s.mutable_logit_bias())[7] = -100;
  (*s.mutable_logit_bias())[3] = 2;
  auto& stop = *request_.mutable_stopping();
  stop.set_max_tokens(17);
  stop.set_min_tokens(2);
  stop.add_stop("\n\n");
  stop.add_stop_token_ids(11);
  stop.set_ignore_eos(true);
  stop.set_include_stop_in_output(true);
  auto& out = *request_.mutable_output();
  out.set_logprobs(5);
  out.set_prompt_logprobs(0);
  out.set_skip_special_tokens(false);
  out.set_return_attention_spans(true);
  auto r = ToRequest(request_, context_);
  ASSERT_TRUE(r.ok()) << r.status();
  EXPECT_EQ(r->id, "mine");
  EXPECT_EQ(r->priority, -7);
  EXPECT_EQ(r->sampling.temperature, 0.5f);
  EXPECT_EQ(r->sampling.top_p, 0.9f);
  EXPECT_EQ(r->sampling.top_k, 40);
  EXPECT_EQ(r->sampling.min_p, 0.1f);
  EXPECT_EQ(r->sampling.seed, ~uint64_t{0});
  EXPECT_EQ(r->n, 3);
  EXPECT_EQ(r->sampling.presence_penalty, 0.25f);
  EXPECT_EQ(r->sampling.frequency_penalty, -0.5f);
  EXPECT_EQ(r->sampling.repetition_penalty, 1.5f);
  EXPECT_THAT(r->sampling.logit_bias, ElementsAre(std::pair(3, 2.f), std::pair(7, -100.f)));
  EXPECT_EQ(r->stopping.max_tokens, 17);
  EXPECT_EQ(r->stopping.min_tokens, 2);
  EXPECT_THAT(r->stopping.stop, ElementsAre("\n\n"));
  EXPECT_THAT(r->stopping.stop_token_ids, ElementsAre(11));
  EXPECT_TRUE(r->stopping.ignore_eos);
  EXPECT_TRUE(r->stopping.include_stop_in_output);
  EXPECT_EQ(r->output.logprobs, 5);
  EXPECT_EQ(r->output.prompt_logprobs, 0);
  EXPECT_FALSE(r->output.skip_special_tokens);
  EXPECT_TRUE(r->output.attention_spans);
}

TEST_F(RequestConversion, TakesTokenIdsAsTheyAre) {
  for (int id : {5, 6, 7}) request_.mutable_token_ids()->add_ids(id);
  EXPECT_THAT(ToRequest(request_, context_)->prompt, ElementsAre(5, 6, 7));
}

TEST_F(RequestConversion, TruncationKeepsTheLastTokens) {
  for (int id : {5, 6, 7}) request_.mutable_token_ids()->add_ids(id);
  request_.set_truncate_prompt_tokens(2);
  EXPECT_THAT(ToRequest(request_, context_)->prompt, ElementsAre(6, 7));
  request_.set_truncate_prompt_tokens(9);
  EXPECT_THAT(ToRequest(request_, context_)->prompt, SizeIs(3));
  request_.set_truncate_prompt_tokens(0);
  EXPECT_EQ(Refusal(), "truncate_prompt_tokens: is 0, must be at least 1");
}

TEST_F(RequestConversion, KnowsTheModelByAllItsNamesAndNoOther) {
  for (const char* name : {"", "small", "tiny"}) {
    request_.set_model(name);
    EXPECT_EQ(Refusal(), "accepted") << name;
  }
  request_.set_model("gpt");
  EXPECT_EQ(ToRequest(request_, context_).status().code(), absl::StatusCode::kNotFound);
}

TEST_F(RequestConversion, RefusesWhatIsNoPrompt) {
  request_.set_text("");
  EXPECT_EQ(Refusal(), "prompt: is empty");
  request_.clear_prompt();
  EXPECT_EQ(Refusal(), "prompt: is not set");
  request_.set_text(std::string(5000, 'x'));
  EXPECT_EQ(Refusal(), "prompt: has 5000 bytes, the limit is 4096");
  request_.mutable_token_ids()->add_ids(0xffffffff);
  EXPECT_EQ(Refusal(), "prompt: token id 4294967295 is not in the vocabulary of 8192");
}

// Metadata carries printable ASCII only; gRPC aborts the process over anything else.
TEST_F(RequestConversion, RefusesIdsThatMetadataCannotCarry) {
  for (const char* id : {"a b", "\n", "caf\xc3\xa9", "\x7f", "\x01"}) {
    request_.set_request_id(id);
    EXPECT_THAT(Refusal(), StartsWith("request_id: has byte")) << id;
  }
  request_.set_request_id(std::string("a\0b", 3));
  EXPECT_THAT(Refusal(), StartsWith("request_id: has byte 0"));
  request_.set_request_id(std::string(257, 'a'));
  EXPECT_EQ(Refusal(), "request_id: has 257 bytes, the limit is 256");
  request_.set_request_id("7b1f-~!");
  EXPECT_EQ(Refusal(), "accepted");
}

TEST_F(RequestConversion, BoundsWhatItKeepsOnlyToIgnore) {
  request_.set_cache_salt(std::string(257, 's'));
  EXPECT_EQ(Refusal(), "cache_salt: has 257 bytes, the limit is 256");
}

TEST_F(RequestConversion, TooLargeCountsStayWhatTheyAre) {
  request_.mutable_sampling()->set_n(std::numeric_limits<uint32_t>::max());
  request_.mutable_stopping()->set_max_tokens(std::numeric_limits<uint32_t>::max());
  auto r = ToRequest(request_, context_);
  ASSERT_TRUE(r.ok());
  EXPECT_EQ(r->n, 4294967295);
  EXPECT_EQ(r->stopping.max_tokens, 4294967295);
}

TEST_F(RequestConversion, RefusesAChatWithoutATemplateByName) {
  v1::ChatRequest chat;
  chat.add_messages()->set_content("hi");
  const absl::Status status = ToRequest(chat, context_).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("'small' has no chat template"));
}

TEST_F(RequestConversion, DeltasOfOneChoiceAddUp) {
  v1::OutputOptions options;
  options.set_return_token_ids(true);
  v1::Choice choice;
  Event event;
  event.token = 300;
  event.text = "a";
  AppendDelta(event, options, *tokenizer_, &choice);
  event.token = 301;
  event.text = "b";
  event.finish = FinishReason::kStop;
  event.stop_token = 2;
  event.stop_is_eos = true;
  AppendDelta(event, options, *tokenizer_, &choice);
  EXPECT_EQ(choice.text(), "ab");
  EXPECT_THAT(choice.token_ids(), ElementsAre(300, 301));
  EXPECT_EQ(choice.finish_reason(), v1::FINISH_REASON_STOP);
  EXPECT_EQ(choice.eos_token_id(), 2u);
}

}  // namespace
}  // namespace longspan
