"""A compressed-tensors checkpoint of ours in the words of another tool: the same codes and scales under other names.
usage: rename_checkpoint.py modelopt|modelopt-file|fp8 SRC DST     (numpy, safetensors, torch)
modelopt: NVFP4 and FP8 per tensor; modelopt-file: the same said in hf_quant_config.json; fp8: FP8_BLOCK alone."""
import glob, json, os, shutil, sys, torch
from safetensors import safe_open
from safetensors.torch import save_file

RECIPROCAL = {".weight_global_scale": ".weight_scale_2", ".input_global_scale": ".input_scale"}
ALGORITHM = {(True, True): "NVFP4", (True, False): "W4A16_NVFP4", (False, True): "FP8"}


def tensors(folder):
    for path in sorted(glob.glob(folder + "/*.safetensors")):
        with safe_open(path, "pt") as f:
            for name in f.keys(): yield name, f.get_tensor(name)


def to_modelopt(src):
    out, layers = {}, {}
    for name, t in src.items():
        end = "." + name.rpartition(".")[2]
        module = name.removesuffix(end)
        if end in RECIPROCAL: out[module + RECIPROCAL[end]] = (1 / t.float()).reshape(())
        elif end == ".weight_packed": out[module + ".weight"] = t
        elif end in (".weight_scale", ".input_scale") and t.numel() == 1: out[name] = t.float().reshape(())
        else: out[name] = t
        if end in (".weight_packed", ".weight") and (end == ".weight_packed" or t.dtype == torch.float8_e4m3fn):
            nvfp4 = end == ".weight_packed"
            has_input = module + (".input_global_scale" if nvfp4 else ".input_scale") in src
            layers[module] = {"quant_algo": ALGORITHM[nvfp4, has_input]} | ({"group_size": 16} if nvfp4 else {})
    return out, {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}


def main(kind, source, result):
    config = json.load(open(source + "/config.json"))
    ours, src = config.pop("quantization_config"), dict(tensors(source))
    os.makedirs(result)
    for path in glob.glob(source + "/*"):
        if not path.endswith((".safetensors", "index.json", "/config.json", "recipe.yaml")): shutil.copy(path, result)
    names = [x for x in ours["ignore"] if not x.startswith("re:")]
    if kind == "fp8":
        out = {n.replace(".weight_scale", ".weight_scale_inv"): t for n, t in src.items()}
        config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                                         "weight_block_size": [128, 128], "modules_to_not_convert": [*names, "mtp"]}
    else:
        out, block = to_modelopt(src)
        if kind == "modelopt": config["quantization_config"] = {"quant_method": "modelopt", "ignore": [*names, "mtp*"]} | block
        else: json.dump({"producer": {"name": "modelopt"}, "quantization": block | {"exclude_modules": [*names, "mtp*"]}},
                        open(result + "/hf_quant_config.json", "w"), indent=2)
    json.dump(config, open(result + "/config.json", "w"), indent=2)
    save_file({n: t.contiguous() for n, t in out.items()}, result + "/model.safetensors", {"format": "pt"})


if __name__ == "__main__": main(*sys.argv[1:4])
