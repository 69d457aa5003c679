"""Random checkpoints of odd shapes with the logits transformers computes for them in float32.
usage: make_shape_goldens.py OUTDIR    (torch, transformers >= 5, safetensors; only needed to make them anew)

Each shape differs from the released one where an engine might have assumed it: head counts, experts, top-k, layer
pattern, rotary fraction and sections, tied embeddings, no vision tower, no MTP head, one shard, F16 and F32 tensors."""
import json, os, sys, torch
from safetensors.torch import save_file
from transformers import AutoConfig
import transformers.models.qwen3_5_moe.modeling_qwen3_5_moe as M
from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeTextConfig

L, F = "linear_attention", "full_attention"
BASE = dict(vocab_size=96, hidden_size=48, num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=1, head_dim=32,
            linear_num_key_heads=1, linear_num_value_heads=3, linear_key_head_dim=16, linear_value_head_dim=24,
            linear_conv_kernel_dim=4, moe_intermediate_size=32, shared_expert_intermediate_size=48, num_experts=5,
            num_experts_per_tok=2, max_position_embeddings=512, rms_norm_eps=1e-6, hidden_act="silu",
            layer_types=[F, L, F], tie_word_embeddings=False,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5,
                                 mrope_interleaved=True, mrope_section=[3, 3, 2]))
SHAPES = {
    "tied": dict(tie_word_embeddings=True),
    "all_linear": dict(layer_types=[L, L], num_hidden_layers=2, linear_num_key_heads=3, linear_num_value_heads=3,
                       linear_conv_kernel_dim=2, num_experts=7, num_experts_per_tok=7),
    "all_full": dict(layer_types=[F, F], num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, head_dim=20,
                     num_experts_per_tok=1, rms_norm_eps=1e-5,
                     rope_parameters=dict(rope_type="default", rope_theta=500.0, partial_rotary_factor=1.0,
                                          mrope_interleaved=True, mrope_section=[4, 3, 3])),
    "wide_group": dict(num_attention_heads=6, num_key_value_heads=2, linear_num_key_heads=2, linear_num_value_heads=8,
                       layer_types=[L, F, L], vocab_size=101, hidden_size=52),
}
DTYPES = {"tied": torch.bfloat16, "all_linear": torch.float16, "all_full": torch.float32, "wide_group": torch.bfloat16}
out = sys.argv[1]
for name, change in SHAPES.items():
    torch.manual_seed(len(name))
    cfg = Qwen3_5MoeTextConfig(**{**BASE, **change})
    cfg._attn_implementation = "eager"
    model = M.Qwen3_5MoeForCausalLM(cfg).float().eval()
    for p_name, p in model.named_parameters():
        scale = 0.3 if p.dim() > 1 else 0.5
        p.data = (torch.randn_like(p) * scale / (p.shape[-1] ** 0.5 if p.dim() > 1 else 1)).to(DTYPES[name]).float()
        if p_name.endswith("A_log"): p.data = p.data.abs()
    ids = torch.randint(0, cfg.vocab_size, (1, 150))
    with torch.no_grad(): logits = model(input_ids=ids, use_cache=False).logits[0].float()
    folder = os.path.join(out, name); os.makedirs(folder, exist_ok=True)
    tensors = {n: p.data.to(DTYPES[name]).contiguous() for n, p in model.named_parameters()}
    save_file(tensors, os.path.join(folder, "model.safetensors"), metadata=dict(format="pt"))
    text = {**BASE, **change, "model_type": "qwen3_5_moe_text", "architectures": ["Qwen3_5MoeForCausalLM"]}
    json.dump(text, open(os.path.join(folder, "config.json"), "w"), indent=1)
    at = [0, 1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 149]
    save_file(dict(ids=ids[0].int(), at=torch.tensor(at, dtype=torch.int32), logits=logits[at].contiguous(),
                   argmax=logits.argmax(-1).int()), os.path.join(folder, "golden.safetensors"))
    print(name, sum(t.numel() for t in tensors.values()), "parameters", sorted(n for n in tensors if "layers.0" in n)[:3])
