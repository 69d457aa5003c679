"""What YaRN is to transformers, in float32: inverse frequencies and attention factors, and of a model with YaRN by the vendor's
recipe the logits of a text and of a picture's prompt.
usage: make_yarn_goldens.py MODEL GOLDEN_TEXT.safetensors GOLDEN_IMAGE.safetensors OUT.json OUT.safetensors
(torch, transformers >= 5, safetensors)"""
import json, sys
import torch
import transformers
import transformers.models.qwen3_5_moe.modeling_qwen3_5_moe as M
from safetensors.torch import load_file, save_file
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeConfig, Qwen3_5MoeTextConfig

RECIPE = dict(mrope_interleaved=True, mrope_section=[11, 11, 10], rope_type="yarn", rope_theta=10000000, partial_rotary_factor=0.25,
              factor=4.0, original_max_position_embeddings=262144)
CASES = [  # head_dim, what differs from the recipe
    (256, {}), (256, dict(factor=1.0)), (256, dict(factor=2)), (256, dict(factor=3.84)), (256, dict(factor=16.0)),
    (256, dict(original_max_position_embeddings=4096)), (256, dict(truncate=False)), (256, dict(attention_factor=1.25)),
    (256, dict(beta_fast=64, beta_slow=2.5)), (256, dict(beta_fast=8.0, beta_slow=8.0)),
    (80, dict(mrope_section=[4, 3, 3], rope_theta=500.0, original_max_position_embeddings=512)),
    (128, dict(mrope_section=[6, 5, 5], rope_theta=1e6, original_max_position_embeddings=32768, factor=8.0, truncate=False)),
]


def frequencies(head_dim, change):
    rope = {**RECIPE, **change}
    config = Qwen3_5MoeTextConfig(head_dim=head_dim, max_position_embeddings=262144, rope_parameters=dict(rope))
    inverse, factor = ROPE_INIT_FUNCTIONS["yarn"](config, device="cpu")
    return dict(head_dim=head_dim, rope_parameters=rope, inverse=[float(x) for x in inverse], attention_factor=float(factor))


def main(path, text, image, out_json, out_tensors):
    with open(out_json, "w") as f:
        json.dump(dict(source=f"transformers {transformers.__version__}, _compute_yarn_parameters", cases=[frequencies(*c) for c in CASES]), f)
    config = Qwen3_5MoeConfig.from_pretrained(path)
    config.text_config.rope_parameters = dict(RECIPE)
    model = M.Qwen3_5MoeForConditionalGeneration.from_pretrained(path, config=config, dtype=torch.float32, attn_implementation="eager").eval()
    rotary = model.model.language_model.rotary_emb
    assert rotary.rope_type == "yarn" and abs(rotary.attention_scaling - 1.1386294) < 1e-6
    ids = load_file(text)["ids"][:160].long()[None]
    picture = load_file(image)
    prompt = picture["ids"].long()[None]
    kinds = (prompt == model.config.image_token_id).int()
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
        seen = model(input_ids=prompt, pixel_values=picture["pixel_values"], image_grid_thw=picture["grid_thw"], mm_token_type_ids=kinds,
                     use_cache=False).logits[0].float()
    at = torch.tensor([0, 1, 7, 31, 64, 100, 127, 159], dtype=torch.int32)
    seen_at = torch.tensor([0, 3, 10, 17, 18, 25, 35], dtype=torch.int32)
    save_file(dict(ids=ids[0].int(), argmax=logits.argmax(-1).int(), logits_at=at, logits=logits[at.long()].contiguous(),
                   picture_ids=prompt[0].int(), picture_logits_at=seen_at, picture_logits=seen[seen_at.long()].contiguous()), out_tensors)
    plain = load_file(image)["logits"]
    print("picture's logits differ from those without YaRN by", float((plain - seen).norm() / plain.norm()))


main(*sys.argv[1:6])
