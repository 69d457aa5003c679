"""What the MTP head gives for a golden text, by numpy in float64 from the equations of the model's definition: its normed
rows for tokens 0 .. N-2 from the golden's hidden states, and a second guess for each, made from the first.
usage: make_mtp_golden.py MODEL GOLDEN_TEXT.safetensors OUT.safetensors    (numpy, safetensors)"""
import glob, json, os, struct, sys
import numpy as np
from safetensors.numpy import load_file, save_file

model, golden, out = sys.argv[1:4]
config = json.load(open(os.path.join(model, "config.json")))
text = config.get("text_config", config)
hidden, heads, kv_heads, dim = (text[k] for k in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"))
eps, picks = text["rms_norm_eps"], text["num_experts_per_tok"]
rope = text["rope_parameters"]
rotated = int(dim * rope["partial_rotary_factor"])


def tensors(path):
    with open(path, "rb") as f:
        header = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
        base = f.tell()
        for name, t in header.items():
            if name == "__metadata__": continue
            begin, end = t["data_offsets"]
            f.seek(base + begin)
            raw = f.read(end - begin)
            if t["dtype"] == "BF16":
                x = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
            else:
                x = np.frombuffer(raw, {"F32": "<f4", "I32": "<i4"}[t["dtype"]])
            yield name, x.reshape(t["shape"]).astype(np.float64)


W = {}
for path in glob.glob(os.path.join(model, "*.safetensors")):
    W.update((n, x) for n, x in tensors(path) if n.startswith("mtp.") or n == "lm_head.weight" or n.endswith("embed_tokens.weight"))
embed = next(x for n, x in W.items() if n.endswith("embed_tokens.weight"))
head = W.get("lm_head.weight", embed)
sigmoid = lambda x: 1 / (1 + np.exp(-x))
silu = lambda x: x * sigmoid(x)
norm = lambda x, name: x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * (1 + W[name])
L = "mtp.layers.0."


def rotate(x, position):
    j = np.arange(rotated // 2)
    angle = position * rope["rope_theta"] ** (-2.0 * j / rotated)
    a, b = x[:, : rotated // 2].copy(), x[:, rotated // 2 : rotated].copy()
    x = x.copy()
    x[:, : rotated // 2] = a * np.cos(angle) - b * np.sin(angle)
    x[:, rotated // 2 : rotated] = b * np.cos(angle) + a * np.sin(angle)
    return x


def moe(x):
    logits = W[L + "mlp.gate.weight"] @ x
    p = np.exp(logits - logits.max())
    chosen = np.argsort(-p, kind="stable")[:picks]
    y = np.zeros(hidden)
    for e in chosen:
        gate, up = np.split(W[L + "mlp.experts.gate_up_proj"][e] @ x, 2)
        y += p[e] / p[chosen].sum() * (W[L + "mlp.experts.down_proj"][e] @ (silu(gate) * up))
    shared = lambda part: W[L + f"mlp.shared_expert.{part}_proj.weight"]
    return y + sigmoid(W[L + "mlp.shared_expert_gate.weight"] @ x) * (shared("down") @ (silu(shared("gate") @ x) * (shared("up") @ x)))


def row(token, f, position, keys, values):
    """One row of the head; keys, values: those of earlier rows, to which its own are added."""
    y = W["mtp.fc.weight"] @ np.concatenate([norm(embed[token], "mtp.pre_fc_norm_embedding.weight"),
                                             norm(f, "mtp.pre_fc_norm_hidden.weight")])
    x = norm(y, L + "input_layernorm.weight")
    A = lambda n: W[L + f"self_attn.{n}.weight"]
    qg = (A("q_proj") @ x).reshape(heads, 2, dim)
    q = rotate(norm(qg[:, 0], L + "self_attn.q_norm.weight"), position)
    keys.append(rotate(norm((A("k_proj") @ x).reshape(kv_heads, dim), L + "self_attn.k_norm.weight"), position))
    values.append((A("v_proj") @ x).reshape(kv_heads, dim))
    o = np.zeros((heads, dim))
    for h in range(heads):
        g = h // (heads // kv_heads)
        s = np.array([k[g] @ q[h] for k in keys]) * dim ** -0.5
        p = np.exp(s - s.max())
        o[h] = sum(w * v[g] for w, v in zip(p / p.sum(), values)) * sigmoid(qg[h, 1])
    y = y + A("o_proj") @ o.reshape(-1)
    y = y + moe(norm(y, L + "post_attention_layernorm.weight"))
    return norm(y, "mtp.norm.weight")


G = dict(tensors(golden))
ids, f = G["ids"].astype(int), G["hidden_80"][-1]
keys, values, rows, first, second, guesses = [], [], [], [], [], []
for t in range(len(f) - 1):
    m = row(ids[t + 1], f[t], t, keys, values)
    guess = int((head @ m).argmax())
    n = row(guess, m, t + 1, list(keys), list(values))
    rows.append(m), guesses.append(n), first.append(guess), second.append(int((head @ n).argmax()))
hits = np.mean([a == b for a, b in zip(first, ids[2:])])
print(f"{len(rows)} rows; the first guess is the text's next token in {100 * hits:.1f} %")
save_file({"rows": np.array(rows, np.float32), "guesses": np.array(guesses, np.float32), "first": np.array(first, np.int32),
           "second": np.array(second, np.int32)}, out)
