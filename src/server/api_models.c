/* /v1/models, /v1/models/ID and /server_info. */
#include "server/api_routes.h"
#include "server/video.h"
#include <string.h>

static void write_defaults(struct exchange *x)
{
    const struct api_defaults *d = &x->api->defaults;
    struct json_out *o = &x->out;
    json_out_key_open(o, "default_sampling_params", '{');
    json_out_key(o, "temperature");
    json_out_float(o, d->temperature);
    json_out_key(o, "top_p");
    json_out_float(o, d->top_p);
    json_out_key(o, "min_p");
    json_out_float(o, d->min_p);
    json_out_key(o, "repetition_penalty");
    json_out_float(o, d->repetition_penalty);
    json_out_key_int(o, "top_k", d->top_k);
    json_out_close(o, '}');
}

static void write_model(struct exchange *x, const char *id)
{
    const struct api *a = x->api;
    struct json_out *o = &x->out;
    json_out_open(o, '{');
    json_out_key_text(o, "id", id);
    json_out_key_text(o, "object", "model");
    json_out_key_int(o, "created", a->created);
    json_out_key_text(o, "owned_by", "quench");
    json_out_key_text(o, "root", a->o.served_names[0]);
    json_out_key_null(o, "parent");
    json_out_key_int(o, "max_model_len", a->o.max_model_len);
    json_out_key_open(o, "capabilities", '{');
    json_out_key_bool(o, "vision", a->o.config->has_vision);
    json_out_key_bool(o, "tools", true);
    json_out_key_bool(o, "reasoning", a->think_end >= 0);
    json_out_close(o, '}');
    write_defaults(x);
    json_out_close(o, '}');
}

bool api_models(struct exchange *x, const char *id)
{
    const struct api *a = x->api;
    if (id && !api_serves(a, id))
        return fault_status(&x->fault, 404, "model_not_found",
                            "the model '%.200s' does not exist; served is '%s'", id, a->o.served_names[0]);
    if (id) {
        write_model(x, id);
        return exchange_answered(x);
    }
    json_out_open(&x->out, '{');
    json_out_key_text(&x->out, "object", "list");
    json_out_key_open(&x->out, "data", '[');
    for (int i = 0; i < a->o.n_served_names; i++) write_model(x, a->o.served_names[i]);
    json_out_close(&x->out, ']');
    json_out_close(&x->out, '}');
    return exchange_answered(x);
}

/* What requests may ask for here. No paths, no keys. */
bool api_server_info(struct exchange *x)
{
    const struct api_options *o = &x->api->o;
    struct json_out *out = &x->out;
    json_out_open(out, '{');
    json_out_key_text(out, "model", o->served_names[0]);
    json_out_key_int(out, "max_model_len", o->max_model_len);
    json_out_key_int(out, "vocab_size", x->api->n_vocab);
    json_out_key_int(out, "max_n", o->max_n ? o->max_n : 16);
    json_out_key_int(out, "max_images", o->config->has_vision ? conversation_images_most(x->api) : 0);
    json_out_key_int(out, "max_videos", o->config->has_vision ? video_most(x->api) : 0);
    json_out_key_bool(out, "images_by_url", o->n_media_hosts > 0);
    json_out_key_bool(out, "strict_params", o->strict_params);
    json_out_key_int(out, "response_store_bytes", (int64_t)o->store_bytes);
    write_defaults(x);
    json_out_close(out, '}');
    return exchange_answered(x);
}
