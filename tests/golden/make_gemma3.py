#!/usr/bin/env python3
"""Makes the golden logits of gemma3_text from the reference implementation.

    make_gemma3.py OUTPUT_FOLDER        (PyTorch 2.11, transformers 5.17; CPU, seconds)

Writes OUTPUT_FOLDER/gemma3_{linear_rope,old_schema}/: config.json, model.safetensors, golden.json
(prompt tokens, shapes, versions) and logits.f32 ([tokens, vocab] little-endian floats of an fp32 forward
with eager attention). Weights are random from a fixed seed.

  linear_rope  5:1 pattern, bf16 weights, window 8, linear rope scaling 8 on the full layers
  old_schema   another pattern, fp32 weights, window 5, no scaling, config.json in the older rope schema
               (rope_theta, rope_local_base_freq)
"""

import json
import pathlib
import sys

import torch
import transformers
from safetensors.torch import save_file
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

S, F = "sliding_attention", "full_attention"
COMMON = dict(
    vocab_size=256,
    head_dim=32,
    max_position_embeddings=512,
    rms_norm_eps=1e-6,
    attn_implementation="eager",
)
VARIANTS = {
    "gemma3_linear_rope": dict(
        seed=11,
        dtype=torch.bfloat16,
        tokens=72,
        old_schema=False,
        config=dict(
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=7,
            num_attention_heads=4,
            num_key_value_heads=1,
            query_pre_attn_scalar=24,
            sliding_window=8,
            layer_types=[S, S, S, S, S, F, S],
            rope_parameters={
                S: {"rope_type": "default", "rope_theta": 10000.0},
                F: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
            },
        ),
    ),
    "gemma3_old_schema": dict(
        seed=12,
        dtype=torch.float32,
        tokens=72,
        old_schema=True,
        config=dict(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            query_pre_attn_scalar=32,
            sliding_window=5,
            layer_types=[F, S, S, F, S, S],
            rope_parameters={
                S: {"rope_type": "default", "rope_theta": 5000.0},
                F: {"rope_type": "default", "rope_theta": 200000.0},
            },
        ),
    ),
}


def randomise(model, seed, dtype):
    """Weights that make attention sharp enough to matter; rounded to the dtype that is stored."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() == 1:
                value = 0.3 * noise
            elif "embed_tokens" in name or "lm_head" in name:
                value = noise / p.shape[1] ** 0.5
            else:
                value = 1.5 * noise / p.shape[1] ** 0.5
            p.copy_(value.to(dtype).float())


def make(out, name, variant):
    config = Gemma3TextConfig(**COMMON, **variant["config"])
    for kind in (S, F):
        for key, value in variant["config"]["rope_parameters"][kind].items():
            assert config.rope_parameters[kind][key] == value, config.rope_parameters
    model = Gemma3ForCausalLM(config).float().eval()
    randomise(model, variant["seed"], variant["dtype"])
    model.tie_weights()
    assert model.config._attn_implementation == "eager"

    generator = torch.Generator().manual_seed(variant["seed"] + 1000)
    tokens = torch.randint(3, 256, (1, variant["tokens"]), generator=generator)
    tokens[0, 0] = 2
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits[0].float().contiguous()

    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        k: v.to(variant["dtype"]).contiguous()
        for k, v in model.state_dict().items()
        if not k.startswith("lm_head")
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    text = config.to_dict()
    text.pop("_attn_implementation", None)
    text.pop("attn_implementation", None)
    text["architectures"] = ["Gemma3ForCausalLM"]
    text["dtype"] = str(variant["dtype"]).split(".")[1]
    if variant["old_schema"]:
        rope = text.pop("rope_parameters")
        text["rope_theta"] = rope[F]["rope_theta"]
        text["rope_local_base_freq"] = rope[S]["rope_theta"]
        text["rope_scaling"] = None
    (folder / "config.json").write_text(json.dumps(text, indent=1, sort_keys=True) + "\n")

    # The stored folder read back by the reference gives the same logits.
    again = Gemma3ForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        error = (again.eval()(tokens, use_cache=False).logits[0] - logits).abs().max().item()
    assert error < 1e-5, f"{name}: reload differs by {error}"

    (folder / "logits.f32").write_bytes(logits.numpy().astype("<f4").tobytes())
    golden = {
        "tokens": tokens[0].tolist(),
        "rows": logits.shape[0],
        "vocab": logits.shape[1],
        "seed": variant["seed"],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (folder / "golden.json").write_text(json.dumps(golden) + "\n")
    size = (folder / "model.safetensors").stat().st_size
    print(f"{name}: {size} bytes of weights, logits in [{logits.min():.3f}, {logits.max():.3f}],"
          f" std {logits.std():.3f}, reload error {error:.1e}")


def main():
    torch.manual_seed(0)
    out = pathlib.Path(sys.argv[1])
    for name, variant in VARIANTS.items():
        make(out, name, variant)


if __name__ == "__main__":
    main()
