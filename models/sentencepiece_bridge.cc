#include "models/sentencepiece_bridge.h"

#include <sentencepiece_model.pb.h>
#include <sentencepiece_processor.h>

#include <exception>
#include <utility>

#include "kernels/check.h"

namespace longspan {

using sentencepiece::ModelProto;
using sentencepiece::TrainerSpec;

struct SentencePiece::Impl {
  sentencepiece::SentencePieceProcessor processor;
};

SentencePiece::SentencePiece(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
SentencePiece::~SentencePiece() = default;

bool SentencePiece::Parse(std::string_view serialized, Vocabulary* vocabulary) {
  ModelProto proto;
  if (!proto.ParseFromArray(serialized.data(), static_cast<int>(serialized.size()))) return false;
  const auto& trainer = proto.trainer_spec();
  const auto& normalizer = proto.normalizer_spec();
  vocabulary->algorithm = static_cast<Vocabulary::Algorithm>(trainer.model_type());
  vocabulary->byte_fallback = trainer.byte_fallback();
  vocabulary->whitespace_is_suffix = trainer.treat_whitespace_as_suffix();
  vocabulary->unknown_surface = trainer.unk_surface();
  vocabulary->bos = trainer.bos_id();
  vocabulary->eos = trainer.eos_id();
  vocabulary->add_dummy_prefix = normalizer.add_dummy_prefix();
  vocabulary->remove_extra_whitespaces = normalizer.remove_extra_whitespaces();
  vocabulary->escape_whitespaces = normalizer.escape_whitespaces();
  vocabulary->has_character_map = !normalizer.precompiled_charsmap().empty() ||
                                  !proto.denormalizer_spec().precompiled_charsmap().empty();
  vocabulary->pieces.reserve(proto.pieces_size());
  for (const auto& piece : proto.pieces()) {
    vocabulary->pieces.push_back(
        {piece.piece(), piece.score(), static_cast<PieceType>(piece.type())});
  }
  return true;
}

std::unique_ptr<SentencePiece> SentencePiece::Create(const Vocabulary& vocabulary,
                                                     std::string* error) {
  ModelProto proto;
  auto* trainer = proto.mutable_trainer_spec();
  trainer->set_model_type(static_cast<TrainerSpec::ModelType>(vocabulary.algorithm));
  trainer->set_byte_fallback(vocabulary.byte_fallback);
  trainer->set_vocab_size(static_cast<int>(vocabulary.pieces.size()));
  auto* normalizer = proto.mutable_normalizer_spec();
  normalizer->set_add_dummy_prefix(vocabulary.add_dummy_prefix);
  normalizer->set_remove_extra_whitespaces(vocabulary.remove_extra_whitespaces);
  normalizer->set_escape_whitespaces(vocabulary.escape_whitespaces);
  proto.mutable_pieces()->Reserve(static_cast<int>(vocabulary.pieces.size()));
  for (const VocabularyPiece& piece : vocabulary.pieces) {
    auto* out = proto.add_pieces();
    out->set_piece(piece.text);
    out->set_score(piece.score);
    out->set_type(static_cast<ModelProto::SentencePiece::Type>(piece.type));
  }
  auto impl = std::make_unique<Impl>();
  try {  // the library's trie builder throws
    const auto status = impl->processor.Load(std::make_unique<ModelProto>(std::move(proto)));
    if (!status.ok()) {
      *error = status.ToString();
      return nullptr;
    }
  } catch (const std::exception& e) {
    *error = e.what();
    return nullptr;
  }
  return std::unique_ptr<SentencePiece>(new SentencePiece(std::move(impl)));
}

void SentencePiece::Encode(std::string_view text, std::vector<int32_t>* ids) const {
  std::vector<int> out;
  const auto status = impl_->processor.Encode(text, &out);
  CHECK(status.ok()) << status.ToString();  // a validated vocabulary encodes any bytes
  ids->insert(ids->end(), out.begin(), out.end());
}

int32_t SentencePiece::Find(std::string_view piece) const {
  // The library gives the unknown piece's id for what it does not know.
  const int id = impl_->processor.PieceToId(piece);
  return impl_->processor.IdToPiece(id) == piece ? id : -1;
}

}  // namespace longspan
