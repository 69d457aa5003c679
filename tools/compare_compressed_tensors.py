"""Every quantized tensor of DST against what the compressed-tensors library makes of SRC, byte for byte.
usage: compare_compressed_tensors.py SRC DST     (torch, safetensors, compressed-tensors)"""
import glob, json, sys, torch
from safetensors import safe_open
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
from compressed_tensors.compressors.naive_quantized.base import FloatQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam, maybe_pad_tensor_for_block_quant


def tensors(folder):
    out = {}
    for path in glob.glob(folder + "/*.safetensors"):
        with safe_open(path, "pt") as f:
            for name in f.keys(): out[name] = f.get_tensor(name)
    return out


def same(a, b):
    return a.numel() == b.numel() and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def experts(src):
    """(module, weight, the tensor whose extremes give the global scale)"""
    for name, t in src.items():
        stem = name.rpartition(".")[0]
        if name.startswith("mtp.") or not name.endswith((".gate_up_proj", ".down_proj")) or t.dim() != 3: continue
        for e in range(t.shape[0]):
            w, half = t[e], t.shape[1] // 2
            if name.endswith("down_proj"): yield f"{stem}.{e}.down_proj", w, w
            else:
                yield f"{stem}.{e}.gate_proj", w[:half], w
                yield f"{stem}.{e}.up_proj", w[half:], w


# Run as one product by readers, hence one global scale.
SETS = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["shared_expert.gate_proj", "shared_expert.up_proj"],
        ["linear_attn.in_proj_qkv", "linear_attn.in_proj_z"], ["linear_attn.in_proj_b", "linear_attn.in_proj_a"]]


def dense(src, out):
    for name in out:
        module = name.removesuffix(".weight_packed")
        if module == name or ".experts." in module: continue
        w = src[module + ".weight"]
        part = next(((module.removesuffix(p), s) for s in SETS for p in s if module.endswith("." + p)), None)
        yield module, w, torch.cat([src[part[0] + p + ".weight"] for p in part[1]]) if part else w


def extremes(w, args):
    """What llm-compressor's memoryless_minmax observer gives for an FP8 weight."""
    if args.strategy == "tensor": return w.min(), w.max()
    if args.strategy == "channel": return w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    rows, cols = args.block_structure
    w = maybe_pad_tensor_for_block_quant(w, (rows, cols))
    blocks = w.reshape(w.shape[0] // rows, rows, w.shape[1] // cols, cols)
    return blocks.amin((1, 3)), blocks.amax((1, 3))


def main(source, result):
    src, out = tensors(source), tensors(result)
    config = QuantizationConfig.model_validate(json.load(open(result + "/config.json"))["quantization_config"])
    by_bits = {g.weights.num_bits: g.weights for g in config.config_groups.values()}
    by_strategy = {str(getattr(g.weights.strategy, "value", g.weights.strategy)): g.weights for g in config.config_groups.values()}
    counts, wrong = {}, 0
    routed = {module: w for module, w, _ in experts(src)}
    todo = {name for name in out if name.endswith(".weight_packed")}
    for module, w, whole in [*experts(src), *dense(src, out)]:
        if module + ".weight_packed" not in out: continue
        todo.discard(module + ".weight_packed")
        scale = generate_gparam(whole.min(), whole.max())
        groups = w.reshape(w.shape[0], -1, 16)
        s, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), by_bits[4], global_scale=scale)
        packed = pack_fp4_to_uint8(quantize(w, s, zero, by_bits[4], global_scale=scale).to(w.dtype))
        ok = (same(scale.float(), out[module + ".weight_global_scale"]) and same(packed, out[module + ".weight_packed"])
              and same(s.to(torch.float8_e4m3fn), out[module + ".weight_scale"]))
        counts["NVFP4"] = counts.get("NVFP4", 0) + 1
        wrong += not ok
        if not ok: print("differs:", module)
    assert not todo, sorted(todo)[:3]
    for name, t in out.items():
        if t.dtype != torch.float8_e4m3fn or not name.endswith(".weight"): continue
        module, found = name.removesuffix(".weight"), out[name + "_scale"]
        w = routed[module] if ".experts." in name else src[name]
        kind = "tensor" if module + ".input_scale" in out else "channel" if found.shape == (w.shape[0], 1) else "block"
        if kind == "channel" and "channel" not in by_strategy: kind = "block"  # one row: the same shape
        args = by_strategy[kind]
        s, zero = calculate_qparams(*extremes(w, args), args)
        q = FloatQuantizationCompressor.compress({"weight": w, "weight_scale": s}, QuantizationScheme(targets=[], weights=args))
        ok = same(q["weight"], t) and s.dtype == found.dtype and s.shape == found.shape and same(s, found)
        if kind == "tensor": ok = ok and out[module + ".input_scale"].shape == (1,) and out[module + ".input_scale"].dtype == s.dtype
        counts["FP8 " + kind] = counts.get("FP8 " + kind, 0) + 1
        wrong += not ok
        if not ok: print("differs:", name)
    print(", ".join(f"{n} {k} matrices" for k, n in counts.items()) + f", {wrong} differ")
    return wrong != 0


if __name__ == "__main__": sys.exit(main(*sys.argv[1:3]))
