"""What transformers computes for a video given as frames, in float32: pixel values, grid, the prompt's text, tower output,
position ids and logits; and to which sizes its processor resizes clips.
usage: make_video_golden.py MODEL OUT.safetensors FRAME...     (torch, torchvision, transformers, pillow)

The frames are those of a second each. One vision_start and vision_end around all pairs, which transformers leaves since 5.12,
are taken away, as vLLM does and transformers did: docs/decisions/011-images.md says why."""
import json, random, re, sys
import numpy as np
import torch
import transformers.models.qwen3_5_moe.modeling_qwen3_5_moe as M
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor, smart_resize

SIZES = {"shortest_edge": 4096, "longest_edge": 25165824}

def processor():
    return Qwen3VLVideoProcessor(size=SIZES, patch_size=16, temporal_patch_size=2, merge_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3,
                                 do_sample_frames=False, cap_pixels_per_frame=False)

def resizings(n):
    rows, draw = [], random.Random(5)
    while len(rows) < n:
        t, h, w = draw.choice([2, 3, 4, 5, 7, 32, 100, 767, 768]), int(2 ** draw.uniform(0, 12)), int(2 ** draw.uniform(0, 12))
        try:
            rows.append([t, h, w, *smart_resize(t, h, w, 2, 32, SIZES["shortest_edge"], SIZES["longest_edge"])])
        except ValueError:
            rows.append([t, h, w, 0, 0])
    return torch.tensor(rows, dtype=torch.int32)

def main(model_dir, out, *frames):
    model = M.Qwen3_5MoeForConditionalGeneration.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager").eval()
    tokenizer = Tokenizer.from_file(model_dir + "/tokenizer.json")
    clip = np.stack([np.asarray(Image.open(f).convert("RGB")) for f in frames])
    px = processor()(videos=[torch.from_numpy(clip).permute(0, 3, 1, 2)], return_tensors="pt")
    grid = px["video_grid_thw"]
    times = Qwen3VLProcessor._calculate_timestamps(None, list(range(len(frames))), 1.0, 2)
    rows = int(grid[0][1:].prod()) // 4
    pairs = "".join(f"<{t:.1f} seconds><|vision_start|>{'<|video_pad|>' * rows}<|vision_end|>" for t in times)
    prompt = f"<|im_start|>user\n{pairs}What happens?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False).ids])
    kinds = (ids == model.config.video_token_id).int() * 2
    with torch.no_grad():
        tower = model.model.visual(px["pixel_values_videos"], grid_thw=grid)
        tower = tower.pooler_output if hasattr(tower, "pooler_output") else tower[0] if isinstance(tower, tuple) else tower
        logits = model(input_ids=ids, pixel_values_videos=px["pixel_values_videos"], video_grid_thw=grid, mm_token_type_ids=kinds,
                       use_cache=False).logits[0].float()
        positions = model.model.get_rope_index(ids, mm_token_type_ids=kinds, video_grid_thw=grid)[0]
    short = re.sub(r"(<\|video_pad\|>)+", "<|video_pad|>", prompt)
    save_file(dict(ids=ids[0].int(), pixel_values=px["pixel_values_videos"].float().contiguous(), grid_thw=grid.int(),
                   vision_out=tower.float().contiguous(), logits=logits.contiguous(), position_ids=positions.int().contiguous(),
                   prompt=torch.tensor(list(short.encode()), dtype=torch.uint8), sizes=resizings(400)), out)
    print(short, grid.tolist(), "the answer's first token:", repr(tokenizer.decode([int(logits[-1].argmax())])))

main(*sys.argv[1:])
