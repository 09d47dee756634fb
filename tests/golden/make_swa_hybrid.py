#!/usr/bin/env python3
"""Makes the golden logits of swa_hybrid: an independent forward pass in NumPy, in doubles.

    make_swa_hybrid.py tiny OUTPUT_FOLDER              (numpy)
    make_swa_hybrid.py default MODEL_FOLDER OUTPUT     (numpy, sentencepiece)

`tiny` writes OUTPUT_FOLDER/swa_hybrid_*/ for each of VARIANTS: config.json, model.safetensors with random
weights from a fixed seed, golden.json (prompt, sizes) and logits.f32 ([tokens, vocab] little-endian).
`default` runs a checkpoint folder on PROMPT and writes OUTPUT/golden.json: the prompt's tokens and, at
some rows, the logits of the 32 most likely and of 64 fixed ids.

Every matrix of scores is kept whole; a query at t sees keys t - window < j <= t on sliding layers, all
j <= t on full ones.
"""

import json
import pathlib
import struct
import sys

import numpy as np

S, F = "sliding_attention", "full_attention"


# --- safetensors -----------------------------------------------------------------------------------


def read_safetensors(folder):
    """All tensors of a folder, as float64."""
    tensors = {}
    for path in sorted(pathlib.Path(folder).glob("*.safetensors")):
        raw = path.read_bytes()
        (size,) = struct.unpack_from("<Q", raw)
        for name, info in json.loads(raw[8 : 8 + size]).items():
            if name == "__metadata__":
                continue
            begin, end = (8 + size + o for o in info["data_offsets"])
            if info["dtype"] == "BF16":
                bits = np.frombuffer(raw[begin:end], "<u2").astype(np.uint32) << 16
                data = bits.view(np.float32)
            else:
                assert info["dtype"] == "F32", info
                data = np.frombuffer(raw[begin:end], "<f4")
            tensors[name] = data.reshape(info["shape"]).astype(np.float64)
    return tensors


def to_bf16(x):
    """Bits of float32 values rounded to bfloat16, ties to even."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def write_safetensors(path, tensors, dtype):
    header, data = {}, b""
    for name, value in sorted(tensors.items()):
        raw = (to_bf16(value) if dtype == "BF16" else value.astype("<f4")).tobytes()
        header[name] = {
            "dtype": dtype,
            "shape": list(value.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


# --- the model -------------------------------------------------------------------------------------


def rms_norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def rotate(x, rope):
    """x: [tokens, heads, head_dim]; pairs are (i, i + head_dim / 2)."""
    if rope is None:
        return x
    half = x.shape[-1] // 2
    frequency = rope["rope_theta"] ** (-np.arange(half) / half) / rope.get("factor", 1.0)
    angle = np.arange(x.shape[0])[:, None, None] * frequency
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle),
                           b * np.cos(angle) + a * np.sin(angle)], -1)


def attention(q, k, v, window):
    """q: [tokens, heads, dim]; k, v: [tokens, kv heads, dim]."""
    tokens, heads, dim = q.shape
    back = np.arange(tokens)[:, None] - np.arange(tokens)[None, :]
    visible = (back >= 0) & ((back < window) if window else True)
    out = np.empty_like(q)
    for h in range(heads):
        g = h // (heads // k.shape[1])
        scores = np.where(visible, q[:, h] @ k[:, g].T / np.sqrt(dim), -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, h] = p / p.sum(-1, keepdims=True) @ v[:, g]
    return out


def forward(config, w, tokens):
    eps, dim = config["rms_norm_eps"], config["head_dim"]
    x = w["model.embed_tokens.weight"][tokens]
    for i, kind in enumerate(config["layer_types"]):
        p = f"model.layers.{i}."
        h = rms_norm(x, w[p + "input_layernorm.weight"], eps)
        q, k, v = ((h @ w[f"{p}self_attn.{n}_proj.weight"].T).reshape(len(tokens), -1, dim)
                   for n in "qkv")
        rope = config["rope_parameters"][kind]
        a = attention(rotate(q, rope), rotate(k, rope), v,
                      config["sliding_window"] if kind == S else None)
        x = x + a.reshape(len(tokens), -1) @ w[p + "self_attn.o_proj.weight"].T
        h = rms_norm(x, w[p + "post_attention_layernorm.weight"], eps)
        gate = h @ w[p + "mlp.gate_proj.weight"].T
        up = h @ w[p + "mlp.up_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[p + "mlp.down_proj.weight"].T
    x = rms_norm(x, w["model.norm.weight"], eps)
    return x @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


# --- tiny random models ----------------------------------------------------------------------------


def tiny(seed, types, heads, kv_heads, head_dim, window, sliding_rope, full_rope, tied, dtype):
    config = {
        "model_type": "swa_hybrid",
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": len(types),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tied,
        "sliding_window": window,
        "layer_types": types,
        "max_position_embeddings": 512,
        "torch_dtype": {"BF16": "bfloat16", "F32": "float32"}[dtype],
        "rope_parameters": {S: sliding_rope, F: full_rope},
    }
    return dict(seed=seed, config=config, dtype=dtype)


def default_rope(theta):
    return {"rope_type": "default", "rope_theta": theta}


VARIANTS = {
    # The shape of the default model: GQA 3, no positions on the full layers.
    "swa_hybrid_nope": tiny(1, [S, F, S, F], 6, 2, 8, 4, default_rope(10000.0), None, True, "BF16"),
    # As many key-value heads as query heads, rope everywhere, an output matrix of its own.
    "swa_hybrid_untied": tiny(2, [F, S, S, F], 3, 3, 12, 7, default_rope(500.0),
                              default_rope(1e5), False, "F32"),
    # One key-value head, 3:1, no positions on the sliding layers, scaled positions on the full one.
    "swa_hybrid_scaled": tiny(3, [S, S, S, F, S], 4, 1, 16, 16, None,
                              {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
                              True, "BF16"),
}


def random_weights(variant):
    config, random = variant["config"], np.random.default_rng(variant["seed"])
    dim, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    w = {"model.embed_tokens.weight": random.normal(size=(config["vocab_size"], dim))}
    if not config["tie_word_embeddings"]:
        w["lm_head.weight"] = random.normal(size=(config["vocab_size"], dim)) / dim**0.5
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        for name, shape in {
            "self_attn.q_proj": (q, dim),
            "self_attn.k_proj": (kv, dim),
            "self_attn.v_proj": (kv, dim),
            "self_attn.o_proj": (dim, q),
            "mlp.gate_proj": (inner, dim),
            "mlp.up_proj": (inner, dim),
            "mlp.down_proj": (dim, inner),
        }.items():
            w[f"{p}{name}.weight"] = 1.2 * random.normal(size=shape) / shape[1] ** 0.5
        for name in ("input_layernorm", "post_attention_layernorm"):
            w[f"{p}{name}.weight"] = 1 + 0.2 * random.normal(size=dim)
    w["model.norm.weight"] = 1 + 0.2 * random.normal(size=dim)
    return w


def make_tiny(out):
    for name, variant in VARIANTS.items():
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        write_safetensors(folder / "model.safetensors", random_weights(variant), variant["dtype"])
        (folder / "config.json").write_text(json.dumps(variant["config"], indent=1) + "\n")
        tokens = np.random.default_rng(variant["seed"] + 1000).integers(0, 96, 80)
        logits = forward(variant["config"], read_safetensors(folder), tokens)
        (folder / "logits.f32").write_bytes(logits.astype("<f4").tobytes())
        golden = {"tokens": tokens.tolist(), "rows": logits.shape[0], "vocab": logits.shape[1],
                  "seed": variant["seed"]}
        (folder / "golden.json").write_text(json.dumps(golden) + "\n")
        print(f"{name}: logits in [{logits.min():.2f}, {logits.max():.2f}]")


# --- the default model -----------------------------------------------------------------------------

PROMPT = (
    "The old miller had three sons, and when he grew tired of the noise of the wheel he called them into the"
    " garden. \"I shall give the mill,\" said he, \"to the one who brings me the thing that is heard farthest"
    " and weighs least.\" The eldest went to the town and bought a silver bell. The second went to the forest"
    " and caught a bird that sang before the sun was up."
    " One of the special magic numbers for garden is: 4819273."
    " But the youngest sat down by the river and thought, and a beggar came along the road and asked him for"
    " bread. He had only a crust, and he broke it in two. \"What do you look for, my son?\" said the beggar."
    " \"For the thing that is heard farthest and weighs least.\" \"Then you have given it away already,\" said"
    " the beggar, \"for a kind word crosses the sea.\" The boy went home with empty hands, and his brothers"
    " laughed at him; but the father opened the window, and all along the valley the people were telling one"
    " another of the boy who had broken his only crust. So the mill was his, and he ground the poor folk's"
    " corn for nothing on the first day of every month as long as he lived. The bell is cracked and the bird"
    " has flown, but in that valley they tell the story yet."
    " What is the special magic number for garden mentioned in the provided text? The special magic number"
    " for garden mentioned in the provided text is 4819273"
)


def make_default(model, out):
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(model / "tokenizer.model"))
    config = json.loads((model / "config.json").read_text())
    tokens = [processor.piece_to_id("<|doc|>")] + processor.encode(PROMPT)
    logits = forward(config, read_safetensors(model), np.array(tokens))
    rows = sorted({0, 1, 63, 64, 65, 128, 200, *range(len(tokens) - 9, len(tokens))})
    fixed = np.arange(64) * (config["vocab_size"] // 64)
    entries = []
    for row in rows:
        top = np.argsort(-logits[row], kind="stable")[:32]
        ids = [*top.tolist(), *(i for i in fixed.tolist() if i not in set(top.tolist()))]
        entries.append({"row": row, "ids": ids, "logits": [round(float(logits[row, i]), 5) for i in ids]})
    out.mkdir(parents=True, exist_ok=True)
    golden = {"prompt": PROMPT, "tokens": tokens, "rows": entries}
    (out / "golden.json").write_text(json.dumps(golden) + "\n")
    answer = [int(logits[t].argmax()) for t in range(len(tokens) - 9, len(tokens) - 1)]
    print(f"{len(tokens)} tokens; greedy before the end: {processor.decode(answer)!r};"
          f" the text: {processor.decode(tokens[-8:])!r}")


def main():
    if sys.argv[1] == "tiny":
        make_tiny(pathlib.Path(sys.argv[2]))
    else:
        make_default(pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3]))


if __name__ == "__main__":
    main()
