/* config.json of the released models, as far as it describes the network; layer_types follow from
 * full_attention_interval. Source: Qwen/Qwen3.6-35B-A3B, config.json (tests/checkpoint has the whole file).
 */
#include "quantize/synth.h"
#include <string.h>

static const char QWEN_35B_A3B[] =
    "{\"architectures\": [\"Qwen3_5MoeForConditionalGeneration\"], \"model_type\": \"qwen3_5_moe\","
    " \"image_token_id\": 248056, \"video_token_id\": 248057, \"vision_start_token_id\": 248053,"
    " \"vision_end_token_id\": 248054, \"tie_word_embeddings\": false, \"text_config\": {"
    " \"model_type\": \"qwen3_5_moe_text\", \"dtype\": \"bfloat16\", \"vocab_size\": 248320,"
    " \"hidden_size\": 2048, \"num_hidden_layers\": 40, \"full_attention_interval\": 4,"
    " \"num_attention_heads\": 16, \"num_key_value_heads\": 2, \"head_dim\": 256,"
    " \"attn_output_gate\": true, \"attention_bias\": false, \"hidden_act\": \"silu\","
    " \"rms_norm_eps\": 1e-06, \"max_position_embeddings\": 262144, \"partial_rotary_factor\": 0.25,"
    " \"rope_parameters\": {\"rope_type\": \"default\", \"rope_theta\": 10000000,"
    " \"partial_rotary_factor\": 0.25, \"mrope_interleaved\": true, \"mrope_section\": [11, 11, 10]},"
    " \"linear_num_key_heads\": 16, \"linear_num_value_heads\": 32, \"linear_key_head_dim\": 128,"
    " \"linear_value_head_dim\": 128, \"linear_conv_kernel_dim\": 4, \"mamba_ssm_dtype\": \"float32\","
    " \"num_experts\": 256, \"num_experts_per_tok\": 8, \"moe_intermediate_size\": 512,"
    " \"shared_expert_intermediate_size\": 512, \"mtp_num_hidden_layers\": 1,"
    " \"mtp_use_dedicated_embeddings\": false, \"eos_token_id\": 248044, \"tie_word_embeddings\": false},"
    " \"vision_config\": {\"model_type\": \"qwen3_5_moe\", \"depth\": 27, \"hidden_size\": 1152,"
    " \"num_heads\": 16, \"intermediate_size\": 4304, \"hidden_act\": \"gelu_pytorch_tanh\","
    " \"in_channels\": 3, \"patch_size\": 16, \"temporal_patch_size\": 2, \"spatial_merge_size\": 2,"
    " \"num_position_embeddings\": 2304, \"out_hidden_size\": 2048, \"deepstack_visual_indexes\": []}}";

const char *synth_known_config(const char *name)
{
    return strcmp(name, "35b-a3b") == 0 ? QWEN_35B_A3B : NULL;
}
