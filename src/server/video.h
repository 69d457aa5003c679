/* Videos in conversations: parts of type video_url, and the text that stands for them in prompts. Source:
 * vLLM, video/jpeg of its media_io_kwargs; transformers, processing_qwen3_vl.py. */
#ifndef SERVER_VIDEO_H
#define SERVER_VIDEO_H
#include "server/conversation.h"

int video_most(const struct api *a); /* of a request */
/* {"video_url": {"url": "data:video/jpeg;base64,FRAME,FRAME,..."}}, or the URL itself. */
bool video_part(struct prompt_text *p, const struct api *a, const json_t *part, const char *param,
                struct fault *f);
/* A template writes one place for a video. Each pair of its frames has one of its own, after its time. text:
 * malloc'd, another one on return. The body's media_io_kwargs say when the frames were. */
bool video_places(char **text, size_t *bytes, const struct prompt_text *p, const struct api *a,
                  const json_t *body, struct fault *f);
#endif
