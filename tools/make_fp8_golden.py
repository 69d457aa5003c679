"""tests/golden/fp8_products.safetensors: what compressed-tensors makes of one matrix under the presets FP8 and
FP8_BLOCK (129 rows: a ragged block), and products with inputs that its own emulation quantized, in double.
usage: make_fp8_golden.py OUT     (torch, safetensors, compressed-tensors)"""
import sys, torch
from safetensors.torch import save_file
from compressed_tensors.compressors.naive_quantized.base import FloatQuantizationCompressor
from compressed_tensors.quantization.lifecycle.forward import dequantize, fake_quantize
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp
from compare_compressed_tensors import extremes

ROWS, COLS, TOKENS = 129, 256, 3


def weights():
    """Exact in BF16, and the same in C: a small integer times a power of two."""
    out, state = [], 1
    for i in range(ROWS * COLS):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        out.append(((state >> 33) % 256 - 128) * 2.0 ** -(9 + i // 64 % 5))
    return torch.tensor(out, dtype=torch.bfloat16).reshape(ROWS, COLS)


def main(path):
    torch.manual_seed(3)
    w, x, out = weights(), torch.randn(TOKENS, COLS) * torch.tensor([[1.0], [30.0], [0.01]]), {}
    x[0, 128:] *= 100  # two groups of one row apart
    out["x"] = x
    for name in "FP8", "FP8_BLOCK":
        scheme = preset_name_to_scheme(name, ["Linear"])
        scale, zero = calculate_qparams(*extremes(w, scheme.weights), scheme.weights)
        codes = FloatQuantizationCompressor.compress({"weight": w, "weight_scale": scale}, scheme)["weight"]
        back = dequantize(codes.float(), scale.float(), args=scheme.weights, dtype=torch.float32)
        args = scheme.input_activations
        if args.dynamic: s, z = compute_dynamic_scales_and_zp(x, args, None)
        else:
            s, z = calculate_qparams(*(f(x.bfloat16()) for f in (torch.min, torch.max)), args)
            s = s.float() / 8  # most of one row saturates
            out[name + ".input_scale"] = s
        inputs = fake_quantize(x, s, None, args)
        out |= {name + ".codes": codes.view(torch.uint8), name + ".scale": scale.reshape(-1), name + ".y": inputs.double() @ back.double().T}
    save_file({k: v.contiguous() for k, v in out.items()}, path)


if __name__ == "__main__": main(sys.argv[1])
