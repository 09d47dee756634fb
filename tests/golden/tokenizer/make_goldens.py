"""Writes the tokenizer goldens from the reference implementations, for the strings of cases.py.

usage: make_goldens.py default.json   MODEL_DIR                     (Python package sentencepiece 0.2.0)
       make_goldens.py gemma.json     GEMMA_GGUF LIBLLAMA           (the same, and llama.cpp's libllama.so)

Each case has the ids without a beginning-of-sequence token, "special" with control tokens in the text
taken as tokens and "plain" with them as text. sentencepiece takes user-defined symbols anywhere and
control symbols nowhere, so the reference is made from the model with the markers' types set so.
For Gemma the ids are llama.cpp's; where sentencepiece's differ, they stand beside them, and Longspan
gives those:
- a byte that is not UTF-8 is U+FFFD for sentencepiece, and its own byte token for llama.cpp;
- U+2581 in the text is a space for sentencepiece everywhere, so that two of them are the user-defined
  token of two spaces; llama.cpp looks for user-defined tokens before it turns spaces into U+2581;
- </s> is a user-defined token (HTML) in this vocabulary; llama.cpp takes it for a control token by name.
"""

import ctypes
import json
import struct
import sys

import sentencepiece
from cases import cases
from sentencepiece import sentencepiece_model_pb2 as pb

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def sentencepiece_ids(model, is_marker):
    """{"special": encode, "plain": encode} of the model with its markers taken, and not."""
    out = {}
    for mode, kind in (("special", USER), ("plain", CONTROL)):
        proto = pb.ModelProto()
        proto.CopyFrom(model)
        for piece in proto.pieces:
            if is_marker(piece):
                piece.type = kind
        out[mode] = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString()).encode
    return out


def read_gguf_tokenizer(path):
    formats = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
    with open(path, "rb") as file:
        def read(code):
            return struct.unpack("<" + code, file.read(struct.calcsize("<" + code)))[0]

        def value(kind):
            if kind == 8:
                return file.read(read("Q"))
            if kind == 9:
                element, count = read("I"), read("Q")
                return [value(element) for _ in range(count)]
            return read(formats[kind])

        assert file.read(4) == b"GGUF"
        read("I"), read("Q")
        metadata = {}
        for _ in range(read("Q")):
            key = file.read(read("Q")).decode()
            metadata[key] = value(read("I"))
    return metadata


def model_from_gguf(path):
    metadata = read_gguf_tokenizer(path)
    proto = pb.ModelProto()
    proto.trainer_spec.model_type = pb.TrainerSpec.BPE
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.add_dummy_prefix = metadata["tokenizer.ggml.add_space_prefix"]
    proto.normalizer_spec.remove_extra_whitespaces = False
    for text, score, kind in zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"],
                                 metadata["tokenizer.ggml.token_type"]):
        text = text.decode()
        proto.pieces.add(piece=text.replace(" ", "\u2581") if kind == USER else text, score=score, type=kind)
    proto.pieces[metadata["tokenizer.ggml.unknown_token_id"]].type = UNKNOWN
    return proto


class LlamaModelParams(ctypes.Structure):
    """Only handed from one call to the next, so its size need only be enough."""

    _fields_ = [("opaque", ctypes.c_char * 512)]


class Llama:
    """What `llama-tokenize --no-bos --no-escape --ids` prints, without a process for each string."""

    def __init__(self, library, gguf):
        self.lib = ctypes.CDLL(library)
        self.lib.llama_model_default_params.restype = LlamaModelParams
        self.lib.llama_model_load_from_file.argtypes = [ctypes.c_char_p, LlamaModelParams]
        self.lib.llama_model_load_from_file.restype = ctypes.c_void_p
        self.lib.llama_model_get_vocab.argtypes = [ctypes.c_void_p]
        self.lib.llama_model_get_vocab.restype = ctypes.c_void_p
        self.lib.llama_tokenize.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.c_void_p,
                                            ctypes.c_int32, ctypes.c_bool, ctypes.c_bool]
        model = self.lib.llama_model_load_from_file(gguf.encode(), self.lib.llama_model_default_params())
        self.vocab = self.lib.llama_model_get_vocab(model)

    def encode(self, text, special):
        ids = (ctypes.c_int32 * (4 * len(text) + 16))()
        count = self.lib.llama_tokenize(self.vocab, text, len(text), ids, len(ids), False, special)
        assert count >= 0
        return list(ids[:count])


def case(text):
    try:
        return {"text": text.decode()}
    except UnicodeDecodeError:
        return {"hex": text.hex()}


def write(path, about, rows):
    with open(path, "w") as file:
        file.write('{"about": %s,\n"cases": [\n' % json.dumps(about))
        file.write(",\n".join(json.dumps(row, separators=(",", ":")) for row in rows))
        file.write("\n]}\n")


def make_default(path, model_dir):
    model = pb.ModelProto()
    with open(f"{model_dir}/tokenizer.model", "rb") as file:
        model.ParseFromString(file.read())
    unknown = next(i for i, p in enumerate(model.pieces) if p.type == UNKNOWN)
    reference = sentencepiece_ids(model, lambda p: p.type in (CONTROL, USER))
    rows = []
    for text in cases():
        row = case(text)
        for mode, encode in reference.items():
            row[mode] = split_unknown(encode, text, unknown if mode == "special" else None)
        rows.append(row)
    write(path, f"models/default, by sentencepiece {sentencepiece.__version__} (make_goldens.py)", rows)


def split_unknown(encode, text, unknown):
    """The reference has no way to take the text <unk> as a token, so it is split out here."""
    if unknown is None:
        return encode(text)
    ids = []
    for i, part in enumerate(text.split(b"<unk>")):
        ids += ([unknown] if i else []) + encode(part)
    return ids


def make_gemma(path, gguf, library):
    model = model_from_gguf(gguf)
    unknown = next(i for i, p in enumerate(model.pieces) if p.type == UNKNOWN)
    reference = sentencepiece_ids(model, lambda p: p.type == CONTROL)
    llama = Llama(library, gguf)
    rows = []
    for text in cases():
        row = case(text)
        for mode, encode in reference.items():
            row[mode] = llama.encode(text, mode == "special")
            other = split_unknown(encode, text, unknown if mode == "special" else None)
            if other != row[mode]:
                row[mode + "_sentencepiece"] = other
        rows.append(row)
    about = f"Gemma 3 270M's GGUF, by llama.cpp and sentencepiece {sentencepiece.__version__} (make_goldens.py)"
    write(path, about, rows)


if __name__ == "__main__":
    if sys.argv[1].endswith("default.json"):
        make_default(*sys.argv[1:])
    else:
        make_gemma(*sys.argv[1:])
