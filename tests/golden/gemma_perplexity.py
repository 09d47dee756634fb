#!/usr/bin/env python3
"""Perplexity of Gemma 3 270M on a text, from weights dequantised to fp32, in plain NumPy.

    gemma_perplexity.py MODEL.gguf TEXT OUTPUT.json      (numpy, gguf; about a minute)

Writes the tokens (beginning-of-sequence first), the mean negative log-likelihood of tokens 1.. given
those before them, its exponential, and the most likely token after each prefix. Tokens are merged as a
sentencepiece BPE does it: the adjacent pair whose union has the highest score first.
"""

import hashlib
import json
import math
import pathlib
import sys

import gguf
import numpy as np


def load(path):
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    weights = {}
    for tensor in reader.tensors:
        w = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        weights[tensor.name] = np.asarray(w, np.float32).reshape(tensor.shape[::-1])
    return fields, weights


def tokenize(text, fields):
    pieces, scores = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"]
    ids = {piece: i for i, piece in enumerate(pieces)}
    user_defined = {p for p, kind in zip(pieces, fields["tokenizer.ggml.token_type"]) if kind == 4}
    assert not any(ord(c) > 127 for c in text) and "  " not in text and "<" not in text
    tokens = [fields["tokenizer.ggml.bos_token_id"]]
    # User-defined pieces (runs of newlines here) stand alone, the longest first.
    parts, plain, i = [], "", 0
    while i < len(text):
        run = len(text[i:]) - len(text[i:].lstrip("\n"))
        if run and "\n" * run in user_defined:
            parts += [list(plain), ["\n" * run]]
            plain, i = "", i + run
        else:
            plain, i = plain + text[i].replace(" ", "\u2581"), i + 1
    for part in parts + [list(plain)]:
        while True:
            best = max(((scores[ids[a + b]], -k) for k, (a, b) in enumerate(zip(part, part[1:]))
                        if a + b in ids), default=None)
            if best is None:
                break
            k = -best[1]
            part[k : k + 2] = [part[k] + part[k + 1]]
        tokens += [ids[piece] for piece in part]
    return tokens


def rms_norm(x, weight, eps):  # GGUF holds 1 + w
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def rotate(x, theta):
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[0])[:, None, None] * theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def hidden_states(fields, w, tokens):
    get = lambda key: fields["gemma3." + key]
    eps, dim = get("attention.layer_norm_rms_epsilon"), get("attention.key_length")
    heads, window = get("attention.head_count"), get("attention.sliding_window")
    assert get("attention.head_count_kv") == 1
    back = np.arange(len(tokens))[:, None] - np.arange(len(tokens))[None, :]
    x = w["token_embd.weight"][tokens] * np.float32(math.sqrt(get("embedding_length")))
    for i in range(get("block_count")):
        full = i % 6 == 5
        visible = (back >= 0) & (full | (back < window))
        theta = get("rope.freq_base") if full else 10000.0
        p = f"blk.{i}."
        h = rms_norm(x, w[p + "attn_norm.weight"], eps)
        q = (h @ w[p + "attn_q.weight"].T).reshape(len(tokens), heads, dim)
        k = (h @ w[p + "attn_k.weight"].T).reshape(len(tokens), 1, dim)
        v = h @ w[p + "attn_v.weight"].T
        q = rotate(rms_norm(q, w[p + "attn_q_norm.weight"], eps), theta)
        k = rotate(rms_norm(k, w[p + "attn_k_norm.weight"], eps), theta)[:, 0]
        out = np.empty_like(q)
        for head in range(heads):
            s = np.where(visible, q[:, head] @ k.T / np.float32(math.sqrt(dim)), -np.inf)
            e = np.exp(s - s.max(-1, keepdims=True))
            out[:, head] = e / e.sum(-1, keepdims=True) @ v
        h = out.reshape(len(tokens), -1) @ w[p + "attn_output.weight"].T
        x = x + rms_norm(h, w[p + "post_attention_norm.weight"], eps)
        h = rms_norm(x, w[p + "ffn_norm.weight"], eps)
        h = gelu(h @ w[p + "ffn_gate.weight"].T) * (h @ w[p + "ffn_up.weight"].T)
        x = x + rms_norm(h @ w[p + "ffn_down.weight"].T, w[p + "post_ffw_norm.weight"], eps)
    return rms_norm(x, w["output_norm.weight"], eps)


def main():
    model, text, out = map(pathlib.Path, sys.argv[1:4])
    fields, w = load(model)
    tokens = tokenize(text.read_text(), fields)
    x = hidden_states(fields, w, tokens)
    nll, most_likely = [], []
    for t in range(0, len(tokens) - 1, 64):
        logits = (x[t : t + 64] @ w["token_embd.weight"].T).astype(np.float64)
        top = logits.max(-1)
        norm = top + np.log(np.exp(logits - top[:, None]).sum(-1))
        most_likely += logits.argmax(-1).tolist()
        for i in range(min(64, len(tokens) - 1 - t)):
            nll.append(norm[i] - logits[i, tokens[t + i + 1]])
    result = {
        "sha256": hashlib.sha256(model.read_bytes()).hexdigest(),
        "mean_nll": sum(nll) / len(nll),
        "perplexity": math.exp(sum(nll) / len(nll)),
        "tokens": tokens,
        "most_likely": most_likely[: len(nll)],
    }
    out.write_text(json.dumps(result) + "\n")
    print(f"{len(tokens)} tokens, perplexity {result['perplexity']:.4f}")


if __name__ == "__main__":
    main()
