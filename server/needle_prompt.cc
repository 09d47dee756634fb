#include "server/needle_prompt.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "kernels/check.h"

namespace longspan {
namespace {

constexpr absl::string_view kNoise =
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.";

// Keys: common nouns of at least five letters. Those that are one token are used where a tokenizer
// has enough of them, so that a key is one thing to find.
constexpr absl::string_view kKeys =
    "animal apple arrow basket beach bottle bread breakfast breeze brick bridge brush butter "
    "button "
    "cabin candle captain carpet carriage castle cattle chain chamber chest chicken chimney church "
    "circle clerk cliff cloak clock cloth cloud coach coast coffee collar companion company corner "
    "cottage creek crown desert diamond dinner doctor donkey dragon drawer earth fence flame floor "
    "flour flower forest furniture garden gentleman glass goose grass hedge honey horse hotel "
    "house "
    "hunter island jacket jewel journey kingdom kitchen kitten knife knight ladder lantern leather "
    "letter library lightning linen lunch maiden marriage merchant messenger mirror monkey "
    "mountain "
    "mouse music neighbour ocean orange orchard palace paper parlour peasant pencil piano picture "
    "pillow plate platform porch powder prince princess queen rabbit railway river robber saddle "
    "sailor sheep shell shelter silver snake soldier spear stable stair station steel stone sword "
    "teacher thread thunder ticket tower train treasure valley vessel village wagon water wheel "
    "whistle widow window witch";
constexpr size_t kEnoughKeys = 32;

// A needle goes back at most so far to a sentence end; text without any is cut at a word instead.
constexpr int64_t kLongestSentence = 256;
// So many places of the text are tried for a beginning and an end that both fall on sentences.
constexpr int kCutsTried = 4096;

// Tokens of the answer beyond the values themselves, for each value.
constexpr int kSpareTokens = 4;

// Words that end in a full stop without ending a sentence.
constexpr absl::string_view kAbbreviations[] = {"Mr.",  "Mrs.",  "Ms.", "Dr.", "St.",
                                                "Esq.", "Prof.", "No.", "Jr."};

bool EndsSentence(absl::string_view word, absl::string_view next) {
  absl::string_view bare = word;
  while (!bare.empty() && absl::StrContains("\"')]", bare.substr(bare.size() - 1))) {
    bare.remove_suffix(1);
  }
  if (bare.empty() || !absl::StrContains(".!?", bare.substr(bare.size() - 1))) return false;
  if (bare.size() == 2 && bare[1] == '.') return false;  // an initial
  if (std::find(std::begin(kAbbreviations), std::end(kAbbreviations), bare) !=
      std::end(kAbbreviations)) {
    return false;
  }
  return next.empty() || !absl::ascii_islower(next[0]);
}

std::string NeedleSentence(absl::string_view key, absl::string_view value) {
  return absl::StrCat("One of the special magic numbers for ", key, " is: ", value, ".");
}

// RULER's template for one value, or for several.
struct Wording {
  absl::string_view head, ask, ask_tail, answer, answer_tail;
};
constexpr Wording kOne = {
    "A special magic number is hidden within the following text. Make sure to memorize it. I will "
    "quiz "
    "you about the number afterwards.\n",
    "\nWhat is the special magic number for ", " mentioned in the provided text?",
    " The special magic number for ", " mentioned in the provided text is"};
constexpr Wording kSeveral = {
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. I "
    "will "
    "quiz you about the numbers afterwards.\n",
    "\nWhat are all the special magic numbers for ", " mentioned in the provided text?",
    " The special magic numbers for ", " mentioned in the provided text are"};

// "a", "a, and b", "a, b, and c": as RULER writes lists.
std::string Listed(const std::vector<std::string>& items) {
  if (items.size() == 1) return items[0];
  std::vector<std::string> first(items.begin(), items.end() - 1);
  return absl::StrCat(absl::StrJoin(first, ", "), ", and ", items.back());
}

uint64_t Mix(uint64_t x) {  // the finaliser of SplitMix64
  x ^= x >> 30;
  x *= 0xbf58476d1ce4e5b9;
  x ^= x >> 27;
  x *= 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

bool HasDigit(absl::string_view text) {
  return std::any_of(text.begin(), text.end(), absl::ascii_isdigit);
}

}  // namespace

// Numbers that depend on the cell alone.
class NeedlePrompter::Draw {
 public:
  explicit Draw(const NeedleSpec& spec) {
    for (const uint64_t part :
         {spec.seed, static_cast<uint64_t>(spec.context_length),
          std::bit_cast<uint64_t>(spec.depth_percent), static_cast<uint64_t>(spec.trial)}) {
      state_ = Mix(state_ + part + kStep);
    }
  }
  int64_t Below(int64_t n) {
    state_ += kStep;
    return static_cast<int64_t>(Mix(state_) % static_cast<uint64_t>(n));
  }
  std::string Value() { return absl::StrCat(1000000 + Below(9000000)); }

 private:
  static constexpr uint64_t kStep = 0x9e3779b97f4a7c15;
  uint64_t state_ = 0;
};

void NeedlePrompter::Text::Append(absl::Span<const int32_t> sentence, const Tokenizer& tokenizer) {
  for (size_t i = 0; i < sentence.size(); ++i) {
    const std::string piece = tokenizer.Piece(sentence[i]);
    const bool word = !piece.empty() && absl::ascii_isspace(piece[0]);
    tokens.push_back(sentence[i]);
    begins.push_back(i == 0 ? Begins::kSentence : word ? Begins::kWord : Begins::kNothing);
  }
}

NeedlePrompter::NeedlePrompter(const Tokenizer& tokenizer, Haystack haystack)
    : tokenizer_(tokenizer), haystack_(haystack) {
  std::vector<std::string> all = absl::StrSplit(kKeys, ' ');
  for (const std::string& key : all) {
    if (Continue("for", absl::StrCat(" ", key)).size() == 1) keys_.push_back(key);
  }
  if (keys_.size() < kEnoughKeys) keys_ = std::move(all);
}

absl::StatusOr<std::unique_ptr<NeedlePrompter>> NeedlePrompter::Create(const Tokenizer& tokenizer,
                                                                       Haystack haystack,
                                                                       absl::string_view prose) {
  std::unique_ptr<NeedlePrompter> prompter(new NeedlePrompter(tokenizer, haystack));
  if (haystack == Haystack::kNeedles) return prompter;
  const std::vector<std::string> sentences = haystack == Haystack::kNoise
                                                 ? std::vector<std::string>{std::string(kNoise)}
                                                 : SplitSentences(prose);
  for (const std::string& sentence : sentences) {
    const auto ids = prompter->Continue("end.", absl::StrCat(prompter->Separator(), sentence));
    if (ids.empty()) continue;
    prompter->text_.Append(ids, tokenizer);
    prompter->ends_.push_back(static_cast<int64_t>(prompter->text_.tokens.size()));
  }
  if (prompter->ends_.empty()) {
    return absl::InvalidArgumentError("haystack_text holds no text");
  }
  return prompter;
}

// Ids of `text` as it is written after `before`.
std::vector<int32_t> NeedlePrompter::Continue(absl::string_view before,
                                              absl::string_view text) const {
  const Tokenizer::EncodeOptions plain = {.add_bos = false, .parse_special = false};
  const std::vector<int32_t> prefix = tokenizer_.Encode(before, plain);
  std::vector<int32_t> whole = tokenizer_.Encode(absl::StrCat(before, text), plain);
  const auto parted = std::mismatch(prefix.begin(), prefix.end(), whole.begin(), whole.end());
  if (parted.first != prefix.end())
    return tokenizer_.Encode(text, plain);  // pieces span the border
  whole.erase(whole.begin(), parted.second);
  return whole;
}

absl::string_view NeedlePrompter::Separator() const {
  return haystack_ == Haystack::kEssay ? " " : "\n";
}

std::vector<NeedlePrompter::Needle> NeedlePrompter::DrawNeedles(const NeedleSpec& spec,
                                                                Draw& draw) const {
  std::vector<std::string> keys = keys_;
  std::vector<Needle> needles;
  for (int k = 0; k < spec.keys; ++k) {
    std::swap(keys[k], keys[k + draw.Below(static_cast<int64_t>(keys.size()) - k)]);
    for (int v = 0; v < spec.values; ++v) {
      Needle needle;
      needle.key = keys[k];
      needle.value = draw.Value();
      while (std::any_of(needles.begin(), needles.end(),
                         [&](const Needle& other) { return other.value == needle.value; })) {
        needle.value = draw.Value();
      }
      needle.asked = k == 0 || spec.asks_all_keys;
      needles.push_back(std::move(needle));
    }
  }
  return needles;
}

// `tokens` tokens that end with a sentence and, where the text allows it, begin with one.
NeedlePrompter::Text NeedlePrompter::CutHaystack(int64_t tokens, Draw& draw,
                                                 absl::Span<const Needle> needles) const {
  if (haystack_ == Haystack::kNeedles) return DistractorText(tokens, draw, needles);
  const int64_t total = static_cast<int64_t>(text_.tokens.size());
  const int64_t ends = static_cast<int64_t>(ends_.size());
  const int64_t first = draw.Below(ends);
  int64_t begin = 0;
  Begins best = Begins::kNothing;
  for (int64_t i = 0; i < std::min<int64_t>(ends, kCutsTried); ++i) {
    const int64_t end = ends_[(first + i) % ends];
    const int64_t candidate = ((end - tokens) % total + total) % total;
    if (i == 0 || text_.begins[candidate] > best) {
      best = text_.begins[candidate];
      begin = candidate;
    }
    if (best == Begins::kSentence) break;
  }
  Text cut;
  for (int64_t i = 0; i < tokens; ++i) {
    cut.tokens.push_back(text_.tokens[(begin + i) % total]);
    cut.begins.push_back(text_.begins[(begin + i) % total]);
  }
  return cut;
}

// Needles with other keys, which nobody asks for.
NeedlePrompter::Text NeedlePrompter::DistractorText(int64_t tokens, Draw& draw,
                                                    absl::Span<const Needle> needles) const {
  Text text;
  while (static_cast<int64_t>(text.tokens.size()) < tokens) {
    const std::string& key = keys_[draw.Below(static_cast<int64_t>(keys_.size()))];
    const std::string value = draw.Value();
    if (std::any_of(needles.begin(), needles.end(), [&](const Needle& needle) {
          return needle.key == key || needle.value == value;
        })) {
      continue;
    }
    text.Append(Continue("end.", absl::StrCat(Separator(), NeedleSentence(key, value))),
                tokenizer_);
  }
  const int64_t surplus = static_cast<int64_t>(text.tokens.size()) - tokens;
  text.tokens.erase(text.tokens.begin(), text.tokens.begin() + surplus);
  text.begins.erase(text.begins.begin(), text.begins.begin() + surplus);
  return text;
}

namespace {

// Tokens of `ids` that hold the digits of `value`.
absl::StatusOr<ProbeRange> FindValue(const Tokenizer& tokenizer, const std::vector<int32_t>& ids,
                                     const std::string& value) {
  std::string bytes;
  std::vector<size_t> begin_of;
  for (const int32_t id : ids) {
    begin_of.push_back(bytes.size());
    bytes += tokenizer.Piece(id);
  }
  const size_t at = bytes.rfind(value);
  if (at == std::string::npos) {
    return absl::FailedPreconditionError(
        absl::StrCat("the model's tokenizer cannot write the number ", value));
  }
  const auto first = std::upper_bound(begin_of.begin(), begin_of.end(), at) - 1;
  const auto last = std::lower_bound(begin_of.begin(), begin_of.end(), at + value.size());
  return ProbeRange{static_cast<int32_t>(first - begin_of.begin()),
                    static_cast<int32_t>(last - begin_of.begin())};
}

}  // namespace

// Sets each needle's tokens and where its value's digits lie in them.
absl::Status NeedlePrompter::EncodeNeedles(std::vector<Needle>& needles) const {
  for (Needle& needle : needles) {
    needle.ids =
        Continue("end.", absl::StrCat(Separator(), NeedleSentence(needle.key, needle.value)));
    absl::StatusOr<ProbeRange> digits = FindValue(tokenizer_, needle.ids, needle.value);
    if (!digits.ok()) return digits.status();
    needle.digits = *digits;
  }
  return absl::OkStatus();
}

// The question, the beginning of the answer, and in *answer_tokens what the whole answer takes.
// Where the space before a number is a token of its own it ends the prompt, so that the first token
// of the answer is a digit and its query row is the one that must find the needle.
std::vector<int32_t> NeedlePrompter::Question(const std::vector<std::string>& queries,
                                              const std::vector<std::string>& expected,
                                              int* answer_tokens) const {
  const Wording& words = expected.size() == 1 ? kOne : kSeveral;
  const std::string query = Listed(queries);
  std::vector<int32_t> ids = Continue("end.", absl::StrCat(words.ask, query, words.ask_tail,
                                                           words.answer, query, words.answer_tail));
  const std::vector<int32_t> answer = Continue("is", absl::StrCat(" ", Listed(expected), "."));
  size_t given = 0;
  while (given + 1 < answer.size() && !HasDigit(tokenizer_.Piece(answer[given]))) ++given;
  ids.insert(ids.end(), answer.begin(), answer.begin() + static_cast<int64_t>(given));
  *answer_tokens = static_cast<int>(answer.size() - given + kSpareTokens * expected.size());
  return ids;
}

// Moves `wanted` back to where a sentence begins, or a word if there is none near.
int64_t NeedlePrompter::SentenceBefore(const Text& text, int64_t wanted) {
  const int64_t size = static_cast<int64_t>(text.tokens.size());
  if (wanted >= size) return size;
  for (int64_t at = wanted; at >= 0 && at > wanted - kLongestSentence; --at) {
    if (at == 0 || text.begins[at] == Begins::kSentence) return at;
  }
  int64_t at = wanted;
  while (at > 0 && text.begins[at] == Begins::kNothing) --at;
  return at;
}

absl::StatusOr<NeedlePrompt> NeedlePrompter::Build(const NeedleSpec& spec) const {
  if (spec.keys < 1 || spec.keys > max_keys() || spec.values < 1) {
    return absl::InvalidArgumentError(absl::StrCat("num_keys is ", spec.keys, " and num_values is ",
                                                   spec.values, "; keys must be between 1 and ",
                                                   max_keys(), ", values at least 1"));
  }
  Draw draw(spec);
  std::vector<Needle> needles = DrawNeedles(spec, draw);
  if (absl::Status status = EncodeNeedles(needles); !status.ok()) return status;
  std::vector<std::string> queries;
  NeedlePrompt prompt;
  for (const Needle& needle : needles) {
    if (!needle.asked) continue;
    if (queries.empty() || queries.back() != needle.key) queries.push_back(needle.key);
    prompt.expected.push_back(needle.value);
  }
  const Wording& words = prompt.expected.size() == 1 ? kOne : kSeveral;
  prompt.tokens = tokenizer_.Encode(words.head, {.add_bos = true, .parse_special = false});
  const std::vector<int32_t> tail = Question(queries, prompt.expected, &prompt.max_tokens);
  if (spec.max_tokens > 0) prompt.max_tokens = spec.max_tokens;

  int64_t fixed = static_cast<int64_t>(prompt.tokens.size() + tail.size()) + prompt.max_tokens;
  for (const Needle& needle : needles) fixed += static_cast<int64_t>(needle.ids.size());
  if (fixed > spec.context_length) {
    return absl::InvalidArgumentError(
        absl::StrCat("context length ", spec.context_length,
                     " is too short: needles, question and answer take ", fixed, " tokens"));
  }
  const Text text = CutHaystack(spec.context_length - fixed, draw, needles);
  for (Needle& needle : needles) {
    const bool at_depth = &needle == &needles[0];
    const double depth = at_depth ? spec.depth_percent : static_cast<double>(draw.Below(101));
    needle.offset =
        SentenceBefore(text, std::llround(depth / 100 * static_cast<double>(text.tokens.size())));
  }
  Join(text, needles, prompt);
  prompt.tokens.insert(prompt.tokens.end(), tail.begin(), tail.end());
  CHECK_EQ(static_cast<int64_t>(prompt.tokens.size()) + prompt.max_tokens, spec.context_length);
  return prompt;
}

// Appends the haystack with the needles in it, and tells where the asked values came to lie.
void NeedlePrompter::Join(const Text& text, const std::vector<Needle>& needles,
                          NeedlePrompt& prompt) {
  std::vector<size_t> order(needles.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return needles[a].offset < needles[b].offset; });
  std::vector<ProbeRange> values(needles.size());
  int64_t copied = 0;
  for (const size_t i : order) {
    const Needle& needle = needles[i];
    prompt.tokens.insert(prompt.tokens.end(), text.tokens.begin() + copied,
                         text.tokens.begin() + needle.offset);
    copied = needle.offset;
    const int32_t base = static_cast<int32_t>(prompt.tokens.size());
    values[i] = {base + needle.digits.begin, base + needle.digits.end};
    prompt.tokens.insert(prompt.tokens.end(), needle.ids.begin(), needle.ids.end());
  }
  prompt.tokens.insert(prompt.tokens.end(), text.tokens.begin() + copied, text.tokens.end());
  for (size_t i = 0; i < needles.size(); ++i) {
    if (needles[i].asked) prompt.values.push_back(values[i]);
  }
}

std::vector<std::string> SplitSentences(absl::string_view prose) {
  const std::vector<absl::string_view> words =
      absl::StrSplit(prose, absl::ByAnyChar(" \t\r\n\f\v"), absl::SkipEmpty());
  std::vector<std::string> sentences;
  std::string sentence;
  for (size_t i = 0; i < words.size(); ++i) {
    absl::StrAppend(&sentence, sentence.empty() ? "" : " ", words[i]);
    const absl::string_view next = i + 1 < words.size() ? words[i + 1] : absl::string_view();
    if (next.empty() || EndsSentence(words[i], next)) {
      sentences.push_back(std::move(sentence));
      sentence.clear();
    }
  }
  return sentences;
}

double ScoreAnswer(absl::string_view answer, absl::Span<const std::string> expected) {
  if (expected.empty()) return 0;
  const std::string text = absl::AsciiStrToLower(answer);
  int found = 0;
  for (const std::string& value : expected) {
    found += absl::StrContains(text, absl::AsciiStrToLower(value));
  }
  return static_cast<double>(found) / static_cast<double>(expected.size());
}

}  // namespace longspan
