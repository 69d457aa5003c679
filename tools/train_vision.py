"""Trains the vision tower of a small checkpoint on pictures of coloured shapes (make_shape_images.py), in place: only
model.visual.* changes, so all figures of text stay as they were. models/demo was made so.
usage: train_vision.py MODEL [SECONDS]      (torch, transformers, pillow; a GPU: two minutes)

Prints how many of 2,048 new pictures of each size are answered word for word, with the tower rounded to BF16."""
import glob, itertools, json, math, os, struct, sys, time
import numpy as np
import torch
import torch.nn.functional as F
import transformers.models.qwen3_5_moe.modeling_qwen3_5_moe as M
from tokenizers import Tokenizer

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
sys.dont_write_bytecode = True
import make_shape_images as shapes

BATCH, PEAK, WARM = 256, 2e-3, 200
PATCH, MERGE = 16, 2
UNIT = PATCH * MERGE
SIZE = shapes.SIZE
SIZES = [(96, 96), (96, 128), (96, 96), (128, 96), (96, 160), (96, 96), (160, 96), (128, 128)]  # height, width: in turns

# What the library does picture by picture, expert by expert or with an answer from the GPU in between, without.

def attend_together(self, hidden_states, cu_seqlens=None, position_embeddings=None, patches=0, **kwargs):
    q, k, v = self.qkv(hidden_states).reshape(len(hidden_states), 3, self.num_heads, -1).permute(1, 0, 2, 3).unbind(0)
    q, k = M.apply_rotary_pos_emb_vision(q, k, *position_embeddings)
    q, k, v = (x.reshape(-1, patches, self.num_heads, self.head_dim).transpose(1, 2) for x in (q, k, v))
    return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(len(hidden_states), -1))

def all_experts(self, x, picks, weights):
    w = torch.zeros(len(x), self.num_experts, device=x.device).scatter(1, picks, weights.float())
    gate, up = torch.einsum("nd,efd->nef", x, self.gate_up_proj).chunk(2, dim=-1)
    return torch.einsum("nef,edf->nd", self.act_fn(gate) * up * w[..., None], self.down_proj)

def solve_by_squares(system, b, upper, unitriangular):
    """Of up to 64 rows with ones on the diagonal, by products: (I - a)^-1 = (I + a)(I + a^2)(I + a^4)..."""
    a = -system.tril(-1)
    x = b + a @ b
    for _ in range(5):
        a = a @ a
        x = x + a @ x
    return x

class Cases:
    """Pictures of one size as make_shape_images.py draws them, questions and answers, all drawn on the device."""
    def __init__(self, tokenizer, device, height=SIZE, width=SIZE):
        from PIL import Image, ImageDraw
        self.device, self.height, self.width = device, height, width
        self.rows = height // UNIT * (width // UNIT)
        self.grid = torch.tensor([[1, height // PATCH, width // PATCH]], device=device)
        sides = range(22, 31)
        masks = np.zeros((len(shapes.SHAPES), len(sides), height, width), np.uint8)
        for (i, draw), (j, w) in itertools.product(enumerate(shapes.SHAPES.values()), enumerate(sides)):
            im = Image.new("L", (width, height))
            draw(ImageDraw.Draw(im), [0, 0, w * width // SIZE, w * height // SIZE], 1)
            masks[i, j] = np.asarray(im)
        self.masks = torch.tensor(masks, device=device)
        self.colours = torch.tensor(list(shapes.COLOURS.values()), device=device)
        self.places = torch.tensor(list(shapes.PLACES.values()), device=device)
        ids, labels, end = [], [], tokenizer.token_to_id("<|im_end|>")
        for (q, a), shape, colour, place in itertools.product(shapes.QUESTIONS.items(), shapes.SHAPES, shapes.COLOURS, shapes.PLACES):
            p = f"<|im_start|>user\n<|vision_start|>{'<|image_pad|>' * self.rows}<|vision_end|>{q}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
            a = a.format(shape=shape, colour=colour, Colour=colour.capitalize(), place=place) + "<|im_end|>"
            p, a = (tokenizer.encode(x, add_special_tokens=False).ids for x in (p, a))
            ids.append(p + a)
            labels.append([-100] * (len(p) - 1) + a + [-100])
        longest = max(map(len, ids))
        self.ids = torch.tensor([x + [end] * (longest - len(x)) for x in ids], device=device)
        self.labels = torch.tensor([x + [-100] * (longest - len(x)) for x in labels], device=device)
        self.questions = list(shapes.QUESTIONS)

    def draw(self, n):
        h, w = self.height, self.width
        pick = lambda k: torch.randint(k, (n,), device=self.device)
        q, s, c, p = pick(len(self.questions)), pick(len(shapes.SHAPES)), pick(len(shapes.COLOURS)), pick(len(shapes.PLACES))
        at = self.places[p] * (SIZE // 2) + 4 + torch.stack([pick(9), pick(9)], 1)  # x, y
        dx = torch.arange(w, device=self.device)[None, None, :] - (at[:, 0] * w // SIZE)[:, None, None]
        dy = torch.arange(h, device=self.device)[None, :, None] - (at[:, 1] * h // SIZE)[:, None, None]
        flat = dy.clamp(min=0) * w + dx.clamp(min=0)
        inside = self.masks[s, pick(9)].flatten(1).gather(1, flat.flatten(1)).view(n, h, w) * ((dx >= 0) & (dy >= 0))
        pixels = torch.where(inside[..., None] > 0, self.colours[c][:, None, None, :], pick(41)[:, None, None, None])
        row = ((q * len(shapes.SHAPES) + s) * len(shapes.COLOURS) + c) * len(shapes.PLACES) + p
        return patches(pixels), self.ids[row], self.labels[row], q

def patches(pixels):
    """[n][h][w][3] bytes to the rows that the released preprocessor makes of them (no resampling at these sizes)."""
    n, h, w, _ = pixels.shape
    x = ((pixels.float() / 255 - 0.5) / 0.5).permute(0, 3, 1, 2).unsqueeze(1).expand(n, 2, 3, h, w)
    x = x.reshape(n, 1, 2, 3, h // UNIT, MERGE, PATCH, w // UNIT, MERGE, PATCH).permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9)
    return x.reshape(n * (h // PATCH) * (w // PATCH), 3 * 2 * PATCH * PATCH)

class Forward:
    """The library's modules in the library's order, for pictures of one size."""
    def __init__(self, model, cases):
        self.m, self.head, self.rows, v = model.model, model.lm_head, cases.rows, model.model.visual
        kinds = (cases.ids[:1] == model.config.image_token_id).int()
        self.image = kinds[0].nonzero()[:, 0]
        self.positions = self.m.get_rope_index(cases.ids[:1], mm_token_type_ids=kinds, image_grid_thw=cases.grid)[0]
        self.grid_index, self.grid_weight = M.get_vision_interpolation_indices_and_weights(
            cases.grid, num_grid_per_side=v.num_grid_per_side, mode=v.interpolation_mode, align_corners=v.interpolation_align_corners,
            spatial_merge_size=MERGE, kwargs={})
        self.rotation = v.rotary_pos_emb(self.grid_weight, M.get_vision_position_ids(cases.grid, MERGE, kwargs={}))

    def __call__(self, pixels, ids):
        v, lm, n = self.m.visual, self.m.language_model, len(ids)
        x = v.patch_embed(pixels)
        x = x + (v.pos_embed(self.grid_index) * self.grid_weight[:, :, None]).sum(1).repeat(n, 1)
        rotation = tuple(r.repeat(n, 1) for r in self.rotation)
        for block in v.blocks:
            x = block(x, cu_seqlens=None, position_embeddings=rotation, patches=len(x) // n)
        h = lm.embed_tokens(ids).index_copy(1, self.image, v.merger(x).view(n, self.rows, -1))
        turn = lm.rotary_emb(h, self.positions.expand(3, n, -1))
        for layer in lm.layers:
            h = layer(h, position_embeddings=turn)
        return self.head(lm.norm(h))

@torch.no_grad()
def score(model, cases, n=2048):
    """By the library's own forward: greedy text is the expected one when each expected token is the likeliest after those before."""
    by = {q: [] for q in cases.questions}
    for _ in range(n // 128):
        pixels, ids, labels, q = cases.draw(128)
        logits = model(input_ids=ids, pixel_values=pixels, image_grid_thw=cases.grid.expand(128, 3), use_cache=False,
                       mm_token_type_ids=(ids == model.config.image_token_id).int()).logits
        good = ((logits.argmax(-1) == labels) | (labels == -100)).all(-1).tolist()
        for i, g in zip(q.tolist(), good):
            by[cases.questions[i]].append(g)
    every = sum(by.values(), [])
    return {"all": sum(every) / len(every), **{q: round(sum(v) / len(v), 3) for q, v in by.items()}}

def write_into(model_dir, tensors):
    """Replaces the bytes of these tensors in the shards."""
    left = dict(tensors)
    for path in sorted(glob.glob(os.path.join(model_dir, "*.safetensors"))):
        with open(path, "r+b") as f:
            header_bytes = struct.unpack("<Q", f.read(8))[0]
            header = json.loads(f.read(header_bytes))
            for name in [n for n in header if n in left]:
                t = left.pop(name)
                assert header[name]["dtype"] == "BF16" and header[name]["shape"] == list(t.shape), name
                f.seek(8 + header_bytes + header[name]["data_offsets"][0])
                f.write(t.contiguous().view(torch.int16).cpu().numpy().tobytes())
    assert not left, left.keys()

class Recorded:
    """A step with pictures of one size; on a GPU recorded once, since it is thousands of small kernels."""
    def __init__(self, model, cases, tower, optimizer):
        self.cases, self.tower, self.optimizer = cases, tower, optimizer
        self.forward = Forward(model, cases)
        self.inputs = cases.draw(BATCH)[:3]
        self.graph = None
        if cases.device == "cuda":
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                self.step()
                self.step()
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.loss = self.step()

    def step(self):
        pixels, ids, labels = self.inputs
        loss = F.cross_entropy(self.forward(pixels, ids).float().flatten(0, 1), labels.flatten(), ignore_index=-100)
        self.optimizer.zero_grad(set_to_none=False)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.tower.values(), 1.0)
        self.optimizer.step()
        return loss

    def __call__(self):
        for to, x in zip(self.inputs, self.cases.draw(BATCH)):
            to.copy_(x)
        if not self.graph:
            return self.step()
        self.graph.replay()
        return self.loss

def train(model, every_size, tower, seconds):
    device = every_size[0].device
    lr = torch.tensor(0.0, device=device)
    optimizer = torch.optim.AdamW(tower.values(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01, capturable=device == "cuda")
    recorded = {(c.height, c.width): Recorded(model, c, tower, optimizer) for c in every_size}
    begin = time.time()
    for i in itertools.count():
        done = (time.time() - begin) / seconds
        if done >= 1:
            return
        lr.fill_(PEAK * min(1, (i + 1) / WARM) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))))
        loss = recorded[SIZES[i % len(SIZES)]]()
        if i % 400 == 0 or device == "cpu":
            print(f"{time.time() - begin:6.1f} s  step {i}  loss {loss.item():.4f}", flush=True)

def main(model_dir, seconds):
    torch.manual_seed(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = M.Qwen3_5MoeForConditionalGeneration.from_pretrained(model_dir, dtype=torch.float32).to(device)
    tokenizer = Tokenizer.from_file(os.path.join(model_dir, "tokenizer.json"))
    cases = [Cases(tokenizer, device, *size) for size in dict.fromkeys(SIZES)]
    tower = {n: p for n, p in model.named_parameters() if n.startswith("model.visual.")}
    for p in model.parameters():
        p.requires_grad_(False)
    for c in cases:
        print("before", c.height, c.width, score(model, c, 512), flush=True)
    for p in tower.values():
        p.requires_grad_(True)
    kept = M.Qwen3_5MoeVisionAttention.forward, M.Qwen3_5MoeExperts.forward, torch.linalg.solve_triangular
    M.Qwen3_5MoeVisionAttention.forward, M.Qwen3_5MoeExperts.forward, torch.linalg.solve_triangular = attend_together, all_experts, solve_by_squares
    torch.backends.cuda.matmul.allow_tf32 = True
    train(model, cases, tower, seconds)
    torch.backends.cuda.matmul.allow_tf32 = False
    M.Qwen3_5MoeVisionAttention.forward, M.Qwen3_5MoeExperts.forward, torch.linalg.solve_triangular = kept
    with torch.no_grad():
        for p in tower.values():
            p.copy_(p.bfloat16())
    for c in cases:
        print("after", c.height, c.width, score(model, c), flush=True)
    write_into(model_dir, {n: p.bfloat16() for n, p in tower.items()})

if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 120)
