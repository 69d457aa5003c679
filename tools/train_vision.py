"""Trains the vision tower of a small checkpoint on pictures of coloured shapes (make_shape_images.py), in place: only
model.visual.* changes, so all figures of text stay as they were. models/demo was made so.
usage: train_vision.py MODEL [SECONDS]      (torch, transformers, pillow; a GPU: two minutes)

Prints how many of 2,000 new pictures of 96 x 96 are answered word for word, before and after, with the tower rounded to BF16."""
import glob, importlib.util, json, math, os, random, struct, sys, time
import numpy as np
import torch
import torch.nn.functional as F
import transformers.models.qwen3_5_moe.modeling_qwen3_5_moe as M
from tokenizers import Tokenizer

here = os.path.dirname(os.path.abspath(__file__))
spec = importlib.util.spec_from_file_location("shapes", os.path.join(here, "make_shape_images.py"))
shapes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(shapes)

SIZES = [(96, 96)] * 6 + [(64, 64), (128, 96), (96, 128), (128, 128)]
BATCH, PEAK, WARM = 256, 1.5e-3, 100
PATCH, MERGE = 16, 2

class Pictures(torch.utils.data.IterableDataset):
    """Batches of pixels, questions and answers, without end."""
    def __init__(self, seed, sizes):
        self.seed, self.sizes = seed, sizes

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        r = random.Random(self.seed * 1000 + (info.id if info else 0))
        while True:
            size = r.choice(self.sizes)
            drawn = [shapes.random_case(r, size) for _ in range(BATCH)]
            yield np.stack([np.asarray(im) for im, _, _ in drawn]), [q for _, q, _ in drawn], [a for _, _, a in drawn]

def patches(pixels):
    """[n][h][w][3] bytes to the rows that the released preprocessor makes of them (no resampling at these sizes)."""
    n, h, w, _ = pixels.shape
    x = (pixels.float() / 255 - 0.5) / 0.5
    x = x.permute(0, 3, 1, 2).unsqueeze(1).expand(n, 2, 3, h, w)
    m = PATCH * MERGE
    x = x.reshape(n, 1, 2, 3, h // m, MERGE, PATCH, w // m, MERGE, PATCH).permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9)
    return x.reshape(n * (h // PATCH) * (w // PATCH), 3 * 2 * PATCH * PATCH)

class Asker:
    def __init__(self, model, tokenizer, device):
        self.model, self.tokenizer, self.device = model, tokenizer, device
        self.end = tokenizer.token_to_id("<|im_end|>")

    def batch(self, pixels, questions, answers):
        n, h, w, _ = pixels.shape
        rows = (h // (PATCH * MERGE)) * (w // (PATCH * MERGE))
        ids, labels = [], []
        for q, a in zip(questions, answers):
            p = f"<|im_start|>user\n<|vision_start|>{'<|image_pad|>' * rows}<|vision_end|>{q}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
            p = self.tokenizer.encode(p, add_special_tokens=False).ids
            b = self.tokenizer.encode(a + "<|im_end|>", add_special_tokens=False).ids
            ids.append(p + b)
            labels.append([-100] * len(p) + b)
        longest = max(map(len, ids))
        ids = torch.tensor([x + [self.end] * (longest - len(x)) for x in ids], device=self.device)
        labels = torch.tensor([x + [-100] * (longest - len(x)) for x in labels], device=self.device)
        grid = torch.tensor([[1, h // PATCH, w // PATCH]] * n, device=self.device)
        logits = self.model(input_ids=ids, pixel_values=patches(torch.from_numpy(pixels).to(self.device)), image_grid_thw=grid,
                            mm_token_type_ids=(ids == self.model.config.image_token_id).int(), use_cache=False).logits.float()
        return logits[:, :-1], labels[:, 1:]

    @torch.no_grad()
    def score(self, n, seed):
        """Share answered word for word: greedy text is the expected one when each expected token is the likeliest after those before."""
        right, asked, by = 0, 0, {}
        for pixels, questions, answers in Pictures(seed, [(96, 96)]):
            logits, labels = self.batch(pixels, questions, answers)
            ok = ((logits.argmax(-1) == labels) | (labels == -100)).all(-1).tolist()
            for q, good in zip(questions, ok):
                by.setdefault(q, []).append(good)
            right, asked = right + sum(ok), asked + len(ok)
            if asked >= n:
                return right / asked, {q: round(sum(v) / len(v), 3) for q, v in by.items()}

def write_into(model_dir, tensors):
    """Replaces the bytes of these tensors in the shards."""
    left = dict(tensors)
    for path in sorted(glob.glob(os.path.join(model_dir, "*.safetensors"))):
        with open(path, "r+b") as f:
            header = json.loads(f.read(n := struct.unpack("<Q", f.read(8))[0]))
            for name in [n for n in header if n in left]:
                t = left.pop(name)
                assert header[name]["dtype"] == "BF16" and header[name]["shape"] == list(t.shape), name
                f.seek(8 + n + header[name]["data_offsets"][0])
                f.write(t.contiguous().view(torch.int16).cpu().numpy().tobytes())
    assert not left, left.keys()

def main(model_dir, seconds):
    torch.manual_seed(1)
    torch.backends.cuda.matmul.allow_tf32 = True
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = M.Qwen3_5MoeForConditionalGeneration.from_pretrained(model_dir, dtype=torch.float32).to(device)
    asker = Asker(model, Tokenizer.from_file(os.path.join(model_dir, "tokenizer.json")), device)
    for p in model.parameters():
        p.requires_grad_(False)
    tower = {n: p.requires_grad_(True) for n, p in model.named_parameters() if n.startswith("model.visual.")}
    print("before", *asker.score(2000, 7), flush=True)
    optimizer = torch.optim.AdamW(tower.values(), lr=PEAK, betas=(0.9, 0.98), weight_decay=0.01)
    loader = iter(torch.utils.data.DataLoader(Pictures(1, SIZES), batch_size=None, num_workers=min(12, os.cpu_count())))
    begin = time.time()
    for step in range(1 << 30):
        done = (time.time() - begin) / seconds
        if done >= 1:
            break
        for g in optimizer.param_groups:
            g["lr"] = PEAK * min(1, (step + 1) / WARM) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        logits, labels = asker.batch(*next(loader))
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tower.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0:
            print(f"{time.time() - begin:6.1f} s  step {step}  loss {loss.item():.4f}", flush=True)
    with torch.no_grad():
        for p in tower.values():
            p.copy_(p.bfloat16())
    print("after", *asker.score(2000, 7), flush=True)
    write_into(model_dir, {n: p.bfloat16() for n, p in tower.items()})

if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 120)
