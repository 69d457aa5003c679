"""What transformers computes for a picture, in float32: pixel values, grid, tower output, position ids and logits.
usage: make_picture_golden.py MODEL PICTURE OUT.safetensors     (torch, transformers, pillow)"""
import json, sys
import torch
import transformers.models.qwen3_5_moe.modeling_qwen3_5_moe as M
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import Qwen2VLImageProcessor

def main(model_dir, picture, out):
    model = M.Qwen3_5MoeForConditionalGeneration.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager").eval()
    tokenizer = Tokenizer.from_file(model_dir + "/tokenizer.json")
    with open(model_dir + "/preprocessor_config.json") as f:
        pc = json.load(f)
    keys = ("size", "patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std")
    px = Qwen2VLImageProcessor(**{k: pc[k] for k in keys})(images=[Image.open(picture).convert("RGB")], return_tensors="pt")
    grid = px["image_grid_thw"]
    rows = int(grid[0].prod()) // 4
    prompt = f"<|im_start|>user\n<|vision_start|>{'<|image_pad|>' * rows}<|vision_end|>What is in the image?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False).ids])
    kinds = (ids == model.config.image_token_id).int()
    with torch.no_grad():
        tower = model.model.visual(px["pixel_values"], grid_thw=grid)
        tower = tower.pooler_output if hasattr(tower, "pooler_output") else tower[0] if isinstance(tower, tuple) else tower
        logits = model(input_ids=ids, pixel_values=px["pixel_values"], image_grid_thw=grid, mm_token_type_ids=kinds, use_cache=False).logits[0].float()
        positions = model.model.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=grid)[0]
    save_file(dict(ids=ids[0].int(), pixel_values=px["pixel_values"].float().contiguous(), grid_thw=grid.int(), vision_out=tower.float().contiguous(),
                   logits=logits.contiguous(), position_ids=positions.int().contiguous()), out)
    print("the answer's first token:", tokenizer.decode([int(logits[-1].argmax())]))

main(*sys.argv[1:4])
