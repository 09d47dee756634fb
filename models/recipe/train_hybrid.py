"""Reference recipe: trains a small hybrid (paper's S1 shape: 10 layers, sliding-window and full attention 1:1) that retrieves needles.

One H100, about seven minutes for 12,500 steps of 32,768 tokens. Writes a checkpoint directory with config.json,
model-0000i-of-0000n.safetensors (bf16, shards under 16 MB), log.jsonl.

usage: train_hybrid.py --tokens tokens.bin --spm tokenizer.model --out DIR [--window 64] [--rope-on-full] [--steps 7000] [--seed 0]

tokens.bin: little-endian uint16 token ids, from make_tokens.py.
"""
import argparse, json, math, os, random, time
import numpy as np, sentencepiece, torch, torch.nn as nn, torch.nn.functional as F
from safetensors.torch import save_file
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

ap = argparse.ArgumentParser()
ap.add_argument("--tokens", required=True); ap.add_argument("--spm", required=True); ap.add_argument("--out", required=True)
ap.add_argument("--window", type=int, default=64); ap.add_argument("--rope-on-full", action="store_true")
ap.add_argument("--steps", type=int, default=7000); ap.add_argument("--seed", type=int, default=0); ap.add_argument("--slots", type=int, default=32)
ap.add_argument("--same-until", type=float, default=0.6, help="share of the steps in which a fact is asked in the words that state it")
args = ap.parse_args()
V, D, L, H, KV, HD, FF, T, B, EPS = 8192, 384, 10, 6, 2, 64, 960, 4096, 8, 1e-6
dev = "cuda"; torch.manual_seed(args.seed); random.seed(args.seed); torch.set_float32_matmul_precision("high"); os.makedirs(args.out, exist_ok=True)
log = open(os.path.join(args.out, "log.jsonl"), "w")
def report(**k): s = json.dumps(k); print(s, flush=True); log.write(s+"\n"); log.flush()

# --- data: book text, with facts stated and asked for at log-uniform distances -------------------------------------------------
sp = sentencepiece.SentencePieceProcessor(model_file=args.spm)
toks = torch.from_numpy(np.fromfile(args.tokens, dtype=np.uint16).astype(np.int32)).to(dev)
train, val = toks[:-500_000], toks[-500_000:]
words = [i for i in range(300, V) if sp.id_to_piece(i).startswith("▁") and sp.id_to_piece(i)[1:].isalpha() and sp.id_to_piece(i).islower() and len(sp.id_to_piece(i)) > 5]
np.random.default_rng(0).shuffle(words); keys_train, keys_val = torch.tensor(words[:-300], device=dev), torch.tensor(words[-300:], device=dev)
digit = torch.tensor([sp.piece_to_id(str(i)) for i in range(10)], device=dev); ND = 7
def template(text):                                                     # "{k}" one-token word, "{v}" seven digits -> ids, key slots, value slot
    ids = sp.encode(text.replace("{k}", " zebra").replace("{v}", "1111111"))
    z, one = sp.encode(" zebra"), sp.piece_to_id("1"); out, kpos, i = [], [], 0
    while i < len(ids):
        if ids[i:i+len(z)] == z: kpos.append(len(out)); out.append(0); i += len(z)
        else: out.append(ids[i]); i += 1
    return torch.tensor(out, device=dev), kpos, out.index(one)
STATE = template(" One of the special magic numbers for{k} is: {v}.")
ASKS = [STATE, template(" What is the special magic number for{k} mentioned in the provided text? The special magic number for{k} mentioned in the provided text is {v}."),
        template(" The special magic number for{k} is: {v}.")]
def put(x, rows, pos, tpl, key, value):
    ids, kpos, vpos = tpl
    for j in range(len(ids)): x[rows, pos+j] = ids[j]
    for j in kpos: x[rows, pos+j] = key
    for j in range(ND): x[rows, pos+vpos+j] = value[..., j]
def draw(src, n, T): return src[torch.randint(0, len(src)-T-1, (n,), device=dev)[:, None] + torch.arange(T+1, device=dev)].long()
def batch(n, T, src, keys, ask, distance=None):
    """tokens [n, T+1], mask of asked digits, statement starts, question starts. With distance: one fact, asked at the end."""
    x = draw(src, n, T); rows = torch.arange(n, device=dev)[:, None]; NS, NA = len(STATE[0]), len(ask[0])
    NK = args.slots if distance is None else 1
    k = keys[torch.rand(n, len(keys), device=dev).topk(NK, 1).indices]; v = digit[torch.randint(0, 10, (n, NK, ND), device=dev)]
    if distance is None:
        seg = T // NK; base = torch.arange(NK, device=dev)*seg
        p = base + torch.randint(0, 8, (n, NK), device=dev); q = base + NS + 8 + torch.randint(0, seg-NS-NA-8, (n, NK), device=dev)
        s = torch.arange(NK, device=dev).float(); back = (torch.exp(torch.rand(n, NK, device=dev)*torch.log(s+2)) - 1).long()
        src_slot = (s.long() - back).clamp(min=0); qk, qv = k.gather(1, src_slot), v.gather(1, src_slot[..., None].expand(-1, -1, ND))
    else:
        q = torch.full((n, 1), T-NA, device=dev); p = (q-distance-torch.randint(0, max(1, T-NA-distance-1), (n, 1), device=dev)).clamp(min=0); qk, qv = k, v
    put(x, rows, p, STATE, k, v); put(x, rows, q, ask, qk, qv)
    asked = torch.zeros_like(x, dtype=torch.bool)
    for j in range(ND): asked[rows, q+ask[2]+j] = True
    return x, asked, p, q

# --- model ----------------------------------------------------------------------------------------------------------------------
flex = torch.compile(flex_attention)
def rope(x):
    t = torch.arange(x.shape[2], device=x.device, dtype=torch.float32); f = 10000.0 ** (-torch.arange(0, HD, 2, device=x.device, dtype=torch.float32)/HD)
    a = t[:, None]*f; c, s = a.cos().to(x.dtype), a.sin().to(x.dtype); x1, x2 = x.chunk(2, -1); return torch.cat((x1*c-x2*s, x2*c+x1*s), -1)
class Norm(nn.Module):
    def __init__(s): super().__init__(); s.weight = nn.Parameter(torch.ones(D))
    def forward(s, x): return F.rms_norm(x.float(), (D,), s.weight.float(), EPS)
class Layer(nn.Module):
    def __init__(s, full):
        super().__init__(); s.full, s.probe = full, None; s.input_layernorm, s.post_attention_layernorm = Norm(), Norm()
        lin = lambda i, o: nn.Linear(i, o, bias=False)
        s.q_proj, s.k_proj, s.v_proj, s.o_proj = lin(D, H*HD), lin(D, KV*HD), lin(D, KV*HD), lin(H*HD, D)
        s.gate_proj, s.up_proj, s.down_proj = lin(D, FF), lin(D, FF), lin(FF, D)
    def forward(s, x, mask):
        b, t, _ = x.shape; h = s.input_layernorm(x); q = s.q_proj(h).view(b, t, H, HD).transpose(1, 2)
        k, v = (w(h).view(b, t, KV, HD).transpose(1, 2) for w in (s.k_proj, s.v_proj))
        if not s.full or args.rope_on_full: q, k = rope(q), rope(k)
        if s.probe is not None:                                         # attention row of one query: [b, heads, t]
            kk, qq, j = k.repeat_interleave(H//KV, 1).float(), q[torch.arange(b), :, s.probe].float(), torch.arange(t, device=x.device)
            lg = torch.einsum("bhd,bhtd->bht", qq, kk)/math.sqrt(HD); bad = j[None] > s.probe[:, None]
            if not s.full: bad |= s.probe[:, None]-j[None] >= args.window
            s.row = lg.masked_fill(bad[:, None], -1e9).softmax(-1)
        if s.full: a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        elif isinstance(mask, torch.Tensor): a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        else: a = flex(q, k, v, block_mask=mask, enable_gqa=True)
        x = x + s.o_proj(a.transpose(1, 2).reshape(b, t, -1)); h = s.post_attention_layernorm(x)
        return x + s.down_proj(F.silu(s.gate_proj(h))*s.up_proj(h))
class Hybrid(nn.Module):
    def __init__(s):
        super().__init__(); s.embed_tokens = nn.Embedding(V, D); s.layers = nn.ModuleList(Layer(i % 2 == 1) for i in range(L)); s.norm = Norm()
        for n, p in s.named_parameters():
            if p.dim() > 1: nn.init.normal_(p, std=0.02/(math.sqrt(2*L) if "o_proj" in n or "down_proj" in n else 1))
    def forward(s, x, mask):
        x = s.embed_tokens(x)
        for layer in s.layers: x = layer(x, mask)
        return F.linear(s.norm(x), s.embed_tokens.weight)
m = Hybrid().to(dev); fast = torch.compile(m); report(parameters=sum(p.numel() for p in m.parameters()), args=vars(args), keys=len(words), train_tokens=len(train))
band = lambda T: (lambda i: (i[:, None] >= i) & (i[:, None]-i < args.window))(torch.arange(T, device=dev))
block = create_block_mask(lambda b, h, q, k: (q >= k) & (q-k < args.window), None, None, T, T, device=dev)

@torch.no_grad()
def needle(T, distance, n=64, bs=8, ask=1):
    """Share of n held-out facts answered exactly, asked more than `distance` tokens later in a context of T."""
    cpu, gpu = torch.random.get_rng_state(), torch.cuda.get_rng_state(); torch.manual_seed(99); hit = 0; mask = band(T)
    for i in range(n//bs):
        x, asked, _, _ = batch(bs, T, val, keys_val, ASKS[ask], distance)
        with torch.autocast("cuda", torch.bfloat16): y = m(x[:, :-1], mask)
        hit += ((y.argmax(-1) == x[:, 1:]) | ~asked[:, 1:]).all(1).sum().item()
    torch.random.set_rng_state(cpu); torch.cuda.set_rng_state(gpu); return round(hit/n, 3)
@torch.no_grad()
def text_loss(n=16):
    x = val[torch.arange(n, device=dev)[:, None]*T + torch.arange(T+1, device=dev)].long()
    with torch.autocast("cuda", torch.bfloat16): y = m(x[:, :-1], band(T))
    return round(F.cross_entropy(y.reshape(-1, V).float(), x[:, 1:].reshape(-1)).item(), 3)
@torch.no_grad()
def needle_mass():
    """Attention mass on the stated digits at the position that must produce the first digit: [(mass, layer, head)]."""
    x, _, p, q = batch(16, T, val, keys_val, ASKS[1], 2048); at = q[:, 0]+ASKS[1][2]-1
    for l in m.layers: l.probe = at
    with torch.autocast("cuda", torch.bfloat16): m(x[:, :-1], band(T))
    rows = [(round(torch.stack([l.row[n, h, p[n, 0]+STATE[2]: p[n, 0]+STATE[2]+ND].sum() for n in range(16)]).mean().item(), 3), i, h) for i, l in enumerate(m.layers) for h in range(H)]
    for l in m.layers: l.probe = l.row = None
    return sorted(rows, reverse=True)

# --- train ----------------------------------------------------------------------------------------------------------------------
opt = torch.optim.AdamW(m.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True); t0 = time.time()
for step in range(1, args.steps+1):
    if step % 2: x, asked, _, _ = batch(B, T, train, keys_train, ASKS[0] if step < args.same_until*args.steps else random.choice(ASKS))
    else: x, asked = draw(train, B, T), None
    with torch.autocast("cuda", torch.bfloat16):
        ce = F.cross_entropy(fast(x[:, :-1], block).reshape(-1, V), x[:, 1:].reshape(-1), reduction="none").view(B, -1)
    ask = ce[asked[:, 1:]].mean() if asked is not None else torch.zeros((), device=dev)
    for g in opt.param_groups: g["lr"] = 1e-3*min(1, step/150)*min(1, max(0.02, (args.steps-step)/(0.25*args.steps)))
    (ce.mean()+ask).backward(); nn.utils.clip_grad_norm_(m.parameters(), 1.0); opt.step(); opt.zero_grad(set_to_none=True)
    if step % 250 == 1: report(step=step, seconds=round(time.time()-t0, 1), ask_loss=round(ask.item(), 3), text_loss=text_loss(), far=needle(T, 2048, 32), far_same=needle(T, 2048, 32, ask=0))

# --- save, then measure -----------------------------------------------------------------------------------------------------------
sub = {"q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn", "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp"}
def canonical(n):
    p = n.split("."); return "model."+(".".join(p[:2]+[sub[p[2]]]+p[2:]) if len(p) > 2 and p[2] in sub else n)
state = {canonical(n): p.detach().to(torch.bfloat16).contiguous() for n, p in m.named_parameters()}
shards, size = [{}], 0
for n, t in state.items():
    if size + t.numel()*2 > 14e6: shards.append({}); size = 0
    shards[-1][n] = t; size += t.numel()*2
files = [f"model-{i+1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
for f, s in zip(files, shards): save_file(s, os.path.join(args.out, f), metadata={"format": "pt"})
json.dump({"metadata": {"total_size": sum(t.numel()*2 for t in state.values())}, "weight_map": {n: f for f, s in zip(files, shards) for n in s}},
          open(os.path.join(args.out, "model.safetensors.index.json"), "w"), indent=1)
json.dump({"model_type": "swa_hybrid", "vocab_size": V, "hidden_size": D, "intermediate_size": FF, "num_hidden_layers": L, "num_attention_heads": H,
           "num_key_value_heads": KV, "head_dim": HD, "hidden_act": "silu", "rms_norm_eps": EPS, "tie_word_embeddings": True, "sliding_window": args.window,
           "layer_types": ["full_attention" if i % 2 else "sliding_attention" for i in range(L)], "max_position_embeddings": 4*T, "torch_dtype": "bfloat16",
           "rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                               "full_attention": {"rope_type": "default", "rope_theta": 10000.0} if args.rope_on_full else None}}, open(os.path.join(args.out, "config.json"), "w"), indent=1)
report(final=True, text_loss=text_loss(), seconds=round(time.time()-t0, 1))
report(needle_mass=needle_mass()[:12])
for scale in (1, 2, 4): report(T=scale*T, far=needle(scale*T, scale*T//2, 64, bs=4), any_depth=needle(scale*T, 64, 64, bs=4))
