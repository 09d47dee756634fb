#pragma once
// Prompts of RULER's needle-in-a-haystack family (arXiv 2404.06654), of an exact token length:
//
//   A special magic number is hidden within the following text. Make sure to memorize it. I will
//   quiz you about the number afterwards.\n HAYSTACK with "One of the special magic numbers for KEY
//   is: VALUE." in it \nWhat is the special magic number for KEY mentioned in the provided text?
//   The special magic number for KEY mentioned in the provided text is
//
// (with more than one value asked for: "Some special magic numbers are", "What are all the",
// "are"). Everything is a function of (spec, tokenizer, text): the same cell is always the same
// prompt.
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "kernels/span_record.h"
#include "models/tokenizer.h"

namespace longspan {

enum class Haystack : uint8_t { kNoise, kEssay, kNeedles };  // kEssay: any prose, the caller's too

// One cell of a needle grid.
struct NeedleSpec {
  int keys = 1;                // needles with different keys, of which the first is asked for
  bool asks_all_keys = false;  // or all of them (RULER's multi-query)
  int values = 1;              // of each key, each in a needle of its own
  int context_length = 0;      // tokens: prompt and answer together
  double depth_percent = 0;    // of the first asked needle; the others lie at random depths
  uint64_t seed = 0;
  uint32_t trial = 0;
  int max_tokens = 0;  // of the answer; 0: enough for it
};

struct NeedlePrompt {
  std::vector<int32_t> tokens;  // tokens.size() + max_tokens == context_length
  int max_tokens = 0;
  std::vector<std::string> expected;  // values asked for, the first one at the cell's depth
  std::vector<ProbeRange> values;  // where their digits lie in `tokens`, in the order of `expected`
};

// Haystack text as token ids, cut at sentence ends where possible. Immutable and safe from any
// thread; the tokenizer must outlive it.
class NeedlePrompter {
 public:
  // `prose` is used by Haystack::kEssay alone: runs of white space become single spaces, and it is
  // repeated when a context is longer. InvalidArgument if it holds no text.
  static absl::StatusOr<std::unique_ptr<NeedlePrompter>> Create(const Tokenizer& tokenizer,
                                                                Haystack haystack,
                                                                absl::string_view prose);

  // InvalidArgument with both numbers when the context is too short for needles, question and
  // answer.
  absl::StatusOr<NeedlePrompt> Build(const NeedleSpec& spec) const;
  int max_keys() const { return static_cast<int>(keys_.size()); }

 private:
  // What a token begins; prompts are cut and needles inserted at the highest kind near the place.
  enum class Begins : uint8_t { kNothing, kWord, kSentence };
  struct Text {
    std::vector<int32_t> tokens;
    std::vector<Begins> begins;
    void Append(absl::Span<const int32_t> sentence, const Tokenizer& tokenizer);
  };
  struct Needle {
    std::string key, value;
    bool asked = false;
    std::vector<int32_t> ids;
    ProbeRange digits;   // of the value, within ids
    int64_t offset = 0;  // tokens of haystack before it
  };
  class Draw;

  NeedlePrompter(const Tokenizer& tokenizer, Haystack haystack);
  std::vector<int32_t> Continue(absl::string_view before, absl::string_view text) const;
  absl::string_view Separator() const;
  std::vector<Needle> DrawNeedles(const NeedleSpec& spec, Draw& draw) const;
  absl::Status EncodeNeedles(std::vector<Needle>& needles) const;
  std::vector<int32_t> Question(const std::vector<std::string>& queries,
                                const std::vector<std::string>& expected, int* answer_tokens) const;
  Text CutHaystack(int64_t tokens, Draw& draw, absl::Span<const Needle> needles) const;
  Text DistractorText(int64_t tokens, Draw& draw, absl::Span<const Needle> needles) const;
  static int64_t SentenceBefore(const Text& text, int64_t wanted);
  static void Join(const Text& text, const std::vector<Needle>& needles, NeedlePrompt& prompt);

  const Tokenizer& tokenizer_;
  const Haystack haystack_;
  std::vector<std::string> keys_;
  Text text_;
  std::vector<int64_t> ends_;  // token indices in text_ where a sentence has just ended
};

// Where the sentences of `prose` begin and end: the pieces' concatenation, with single spaces
// between, is `prose` with its white space collapsed.
std::vector<std::string> SplitSentences(absl::string_view prose);

// RULER's string_match_all: the share of `expected` that `answer` contains, ignoring case.
double ScoreAnswer(absl::string_view answer, absl::Span<const std::string> expected);

}  // namespace longspan
