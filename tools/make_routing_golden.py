"""How many tokens transformers' router sends to each expert, float32, each calibration sample a sequence of its own.
usage: make_routing_golden.py MODEL CALIBRATION.jsonl SAMPLES TOKENS OUT.json    (torch, transformers >= 5)"""
import json, sys, torch
from tokenizers import Tokenizer
import transformers.models.qwen3_5_moe.modeling_qwen3_5_moe as M
from transformers import AutoConfig
from safetensors.torch import load_file
import glob, os

model, calibration, samples, tokens, out = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
torch.set_num_threads(2)
config = AutoConfig.from_pretrained(model)
text = config.get_text_config()
text._attn_implementation = "eager"
net = M.Qwen3_5MoeForCausalLM(text).float().eval()
weights = {}
for path in glob.glob(os.path.join(model, "*.safetensors")): weights.update(load_file(path))
names = {n: n.replace("model.", "model.language_model.", 1) if n.startswith("model.") else n for n in net.state_dict()}
net.load_state_dict({n: weights[s].float() for n, s in names.items()})
layers, experts, k = text.num_hidden_layers, text.num_experts, text.num_experts_per_tok
counts = torch.zeros(layers, experts, dtype=torch.long)
gap = 1.0                                       # the closest call between the last expert taken and the first left out
tokenizer = Tokenizer.from_file(os.path.join(model, "tokenizer.json"))
for line in [l for l in open(calibration)][:samples]:
    ids = torch.tensor([tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids[:tokens]])
    seen = []
    hooks = [l.mlp.gate.register_forward_hook(lambda m, i, o: seen.append((i[0].reshape(-1, i[0].shape[-1]) @ m.weight.T)))
             for l in net.model.layers]
    with torch.no_grad(): net(input_ids=ids, use_cache=False)
    for h in hooks: h.remove()
    for layer, logits in enumerate(seen):
        p = logits.softmax(-1).sort(-1, descending=True)
        gap = min(gap, (p.values[:, k - 1] - p.values[:, k]).min().item())
        counts[layer] += torch.bincount(p.indices[:, :k].reshape(-1), minlength=experts)
print("closest call", gap, "tokens", int(counts[0].sum()) // k)
json.dump(dict(samples=samples, max_tokens=tokens, routed=counts.tolist()), open(out, "w"))
