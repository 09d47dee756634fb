"""Writes the tokenizer goldens from the reference implementations, for the strings of cases.py.

usage: make_goldens.py default.json   MODEL_DIR                     (Python package sentencepiece 0.2.0)
       make_goldens.py gemma.json     GEMMA_GGUF LLAMA_TOKENIZE     (the same, and llama.cpp's llama-tokenize)

Each case has the ids without a beginning-of-sequence token, "special" with control tokens in the text
taken as tokens and "plain" with them as text. sentencepiece takes user-defined symbols anywhere and
control symbols nowhere, so the reference is made from the model with the markers' types set so.
For Gemma the ids are llama.cpp's; where sentencepiece's differ, they stand beside them.
"""

import concurrent.futures
import json
import struct
import subprocess
import sys
import tempfile

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


def llama_ids(tool, gguf, text, mode):
    with tempfile.NamedTemporaryFile() as file:
        file.write(text)
        file.flush()
        command = [tool, "-m", gguf, "-f", file.name, "--ids", "--no-bos", "--no-escape", "--log-disable"]
        if mode == "plain":
            command.append("--no-parse-special")
        return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


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
        assert b"<unk>" not in text or unknown >= 0
        row = case(text)
        for mode, encode in reference.items():
            # Python's sentencepiece takes str; its own replacement of stray bytes is the library's.
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


def make_gemma(path, gguf, tool):
    model = model_from_gguf(gguf)
    unknown = next(i for i, p in enumerate(model.pieces) if p.type == UNKNOWN)
    reference = sentencepiece_ids(model, lambda p: p.type == CONTROL)
    texts = cases()
    rows = [case(text) for text in texts]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for mode, encode in reference.items():
            found = pool.map(lambda text, mode=mode: llama_ids(tool, gguf, text, mode), texts)
            for row, text, ids in zip(rows, texts, found):
                row[mode] = ids
                other = split_unknown(encode, text, unknown if mode == "special" else None)
                if other != ids:
                    row[mode + "_sentencepiece"] = other
    version = subprocess.run([tool, "--version"], capture_output=True, text=True).stderr.split("\n")[0]
    about = f"Gemma 3 270M's GGUF, by llama.cpp's llama-tokenize ({version}) and sentencepiece {sentencepiece.__version__}"
    write(path, about + " (make_goldens.py)", rows)


if __name__ == "__main__":
    if sys.argv[1].endswith("default.json"):
        make_default(*sys.argv[1:])
    else:
        make_gemma(*sys.argv[1:])
