#!/bin/sh
# usage: bench/quantize_speed.sh FOLDER [ROUNDS]
# One layer of the released width (1.70 GB, quench synth) in FOLDER, from the page cache: cp -r and data-free
# quantization by turns, and cp with sync. cp alone leaves its copy in the page cache; quantize has synced all that
# it wrote when it ends. CSV: what, median, lowest and highest seconds, cp's median over this median, peak RSS.
set -e
quench=$(realpath "${QUENCH:-build/quench}")
rounds=${2:-5}
mkdir -p "$1" && cd "$1"
trap 'rm -rf copy quantized config one.log times' EXIT

# The released shape with one layer and a small vocabulary; no MTP head, no vision tower.
config() {
    cat <<'END'
{"architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe", "tie_word_embeddings": false,
 "text_config": {"model_type": "qwen3_5_moe_text", "dtype": "bfloat16", "vocab_size": 2048, "hidden_size": 2048,
  "num_hidden_layers": 1, "full_attention_interval": 4, "num_attention_heads": 16, "num_key_value_heads": 2,
  "head_dim": 256, "attn_output_gate": true, "attention_bias": false, "hidden_act": "silu", "rms_norm_eps": 1e-06,
  "max_position_embeddings": 262144, "partial_rotary_factor": 0.25,
  "rope_parameters": {"rope_type": "default", "rope_theta": 10000000, "partial_rotary_factor": 0.25,
   "mrope_interleaved": true, "mrope_section": [11, 11, 10]},
  "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
  "linear_conv_kernel_dim": 4, "mamba_ssm_dtype": "float32", "num_experts": 256, "num_experts_per_tok": 8,
  "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "mtp_num_hidden_layers": 0,
  "eos_token_id": 0, "tie_word_embeddings": false}}
END
}

# timed NAME COMMAND...: after a sync, so that nobody pays for another's writes
timed() {
    name=$1
    shift
    rm -rf copy quantized
    sync
    /usr/bin/time -o one.log -f '%e %M' "$@" >/dev/null
    echo "$name $(cat one.log)" >>times
}

[ -d layer ] || { mkdir config && config >config/config.json && "$quench" synth config layer --quiet >/dev/null; }
: >times
for round in $(seq "$rounds"); do
    cat layer/* >/dev/null
    timed cp cp -r layer copy
    timed quantize "$quench" quantize layer quantized --recipe nvfp4a16 --method nearest --quiet
    timed cp+sync sh -c 'cp -r layer copy && sync copy/*'
done
echo "what,seconds,lowest,highest,cp_over_this,peak_rss_mib"
for name in cp cp+sync quantize; do
    awk -v n="$name" '$1 == n { print $2, $3 }' times | sort -n | awk -v n="$name" -v cp="$cp" '
        { t[NR] = $1; if ($2 > rss) rss = $2 }
        END { m = t[int((NR + 1) / 2)]; printf "%s,%.3f,%.3f,%.3f,%s,%d\n", n, m, t[1], t[NR], cp ? sprintf("%.3f", cp / m) : "1.000", rss / 1024 }'
    [ "$name" != cp ] || cp=$(awk '$1 == "cp" { print $2 }' times | sort -n | awk '{ t[NR] = $1 } END { print t[int((NR + 1) / 2)] }')
done
