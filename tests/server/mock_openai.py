#!/usr/bin/env python3
"""A server that speaks enough of the OpenAI API to test clients: streams words with known delays, keeps a record of what it
did when, refuses on demand. Its first line of output is its URL.

mock_openai.py [--port N] [--ttft MS] [--itl MS] [--key KEY] [--record FILE] [--fail-every N] [--page FILE] [--close]

The last user message chooses the answer: slow, think, tool, markup, error, cut, progress, or an echo with the number of pictures."""
import argparse
import base64
import hashlib
import json
import re
import ssl
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOOL = {"name": "get_weather", "arguments": '{"city": "Oulu"}'}
MARKUP = ("# Title\n\nSome **bold** and *slanted* text, `code<b>` and [a link](https://example.org/x).\n\n"
          "[bad](javascript:alert(1)) <img src=x onerror=\"window.hacked=1\"> <script>window.hacked=1</script>\n\n"
          "- one\n- two\n  - inner\n\n```python\nprint('<b>')\n" + "x = 1  # " + "long " * 60 + "\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n"
          + "unbroken" * 60)


def policy(page):
    def digest(tag):
        inner = re.search(b"<%s>(.*?)</%s>" % (tag, tag), page, re.S).group(1)
        return base64.b64encode(hashlib.sha256(inner).digest()).decode()
    return (f"default-src 'none'; style-src 'sha256-{digest(b'style')}'; script-src 'sha256-{digest(b'script')}'; connect-src 'self'; "
            "img-src data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
            "require-trusted-types-for 'script'; trusted-types 'none'")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body, kind="application/json", **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, status, message, **headers):
        self.answer(status, {"error": {"message": message, "type": "mock", "param": None, "code": status}}, **headers)

    def allowed(self):
        if not options.key or self.headers.get("Authorization") == "Bearer " + options.key:
            return True
        self.refuse(401, "Invalid API key")
        return False

    def do_GET(self):
        if self.path == "/" and options.page:
            with open(options.page, "rb") as f:
                page = f.read()
            return self.answer(200, page, "text/html; charset=utf-8", Content_Security_Policy=policy(page))
        if self.path in ("/health", "/ready"):
            return self.answer(503 if options.loading and self.path == "/ready" else 200, {})
        if self.path == "/metrics":
            n = served["tokens"]
            text = (f'vllm:spec_decode_num_drafts_total{{model_name="mock"}} {n // 2}.0\n'
                    f'vllm:spec_decode_num_draft_tokens_total{{model_name="mock"}} {n}.0\n'
                    f'vllm:spec_decode_num_accepted_tokens_total{{model_name="mock"}} {n // 2}.0\n'
                    f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{model_name="mock",position="0"}} {n // 4}.0\n')
            return self.answer(200, text.encode(), "text/plain")
        if not self.allowed():
            return None
        if self.path == "/v1/models":
            return self.answer(200, {"object": "list", "data": [{"id": "mock", "object": "model", "max_model_len": 4096}]})
        return self.refuse(404, "no such route")

    def chunk(self, data):
        if options.close:
            self.wfile.write(data)
        else:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def event(self, value):
        self.chunk(b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n")

    def do_POST(self):
        arrived = time.monotonic()
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.allowed():
            return
        with lock:
            served["requests"] += 1
            number = served["requests"]
        entry = {"number": number, "arrived": arrived, "body": body if options.keep else None, "sent": [], "left": False}
        record.append(entry)
        if options.fail_every and number % options.fail_every == 0:
            return self.refuse(503, "the queue is full", Retry_After="3")
        if not body.get("stream"):
            return self.refuse(400, "this mock only streams")
        try:
            (self.chat if self.path.endswith("/chat/completions") else self.completion)(body, entry)
        except (BrokenPipeError, ConnectionResetError):
            entry["left"] = True
            self.close_connection = True

    def start(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        if options.close:
            self.send_header("Connection", "close")
            self.close_connection = True
        else:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def words(self, entry, pieces, wrap, ttft, itl):
        due = time.monotonic() + ttft
        for piece in pieces:
            time.sleep(max(0, due - time.monotonic()))
            entry["sent"].append(time.monotonic())
            self.event(wrap(piece, len(entry["sent"])))
            with lock:
                served["tokens"] += 1
            due += itl

    def end(self, usage):
        self.event({"choices": [], "usage": usage})
        self.event(b"[DONE]")
        if not options.close:
            self.wfile.write(b"0\r\n\r\n")

    def completion(self, body, entry):
        self.start()
        n, prompt = body["max_tokens"], len(body["prompt"].split())
        # the first word says which entry of the record this is
        self.words(entry, ["n%d " % entry["number"], *("w%d " % i for i in range(1, n))],
                   lambda text, i: {"choices": [{"index": 0, "text": text, "finish_reason": "length" if i == n else None}]},
                   options.ttft / 1e3, options.itl / 1e3)
        self.end({"prompt_tokens": prompt, "completion_tokens": n, "total_tokens": prompt + n})

    def chat(self, body, entry):
        last = body["messages"][-1]
        parts = last["content"] if isinstance(last["content"], list) else [{"type": "text", "text": last["content"]}]
        text = " ".join(p["text"] for p in parts if p["type"] == "text")
        pictures = [p["image_url"]["url"] for p in parts if p["type"] == "image_url"]
        most = body.get("max_completion_tokens") or 10**9
        ttft, itl, finish = options.ttft / 1e3, options.itl / 1e3, "stop"
        if "error" in text:
            return self.refuse(400, "messages[0]: expected something else, found 'error'")
        deltas = [{"content": w} for w in re.findall(r"\S+\s*", f"You said: {text} ({len(pictures)} pictures, {len(body['messages'])} messages)")]
        if "slow" in text:
            deltas, itl = [{"content": "word%d " % i} for i in range(400)], 0.05
        elif "think" in text:
            deltas = [{"reasoning": "step%d " % i, "reasoning_content": "step%d " % i} for i in range(5)] + [{"content": "Thought "}, {"content": "out."}] * ("only" not in text)
        elif "tool" in text and last["role"] == "user":
            a = TOOL["arguments"]
            deltas = [{"tool_calls": [{"index": 0, "id": "call_1", "type": "function", "function": {"name": TOOL["name"], "arguments": ""}}]}]
            deltas += [{"tool_calls": [{"index": 0, "function": {"arguments": c}}]} for c in (a[:6], a[6:])]
            finish = "tool_calls"
        elif "markup" in text:
            deltas = [{"content": MARKUP[i:i + 7]} for i in range(0, len(MARKUP), 7)]
        elif options.fill:
            deltas = [{"content": "w%d " % i} for i in range(min(most, 10000))]
        if len(deltas) > most:
            deltas, finish = deltas[:most], "length"
        self.start()
        self.event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
        if "progress" in text:
            for i in (100, 200):
                self.chunk(b": prompt 100/300\n\n" if i == 100 else b": prompt 200/300\n\n")
                time.sleep(0.3)
        prompt, n = sum(len(json.dumps(m)) for m in body["messages"]) // 4, len(deltas)

        def usage(i):
            return {"prompt_tokens": prompt, "completion_tokens": i, "total_tokens": prompt + i,
                    "prompt_tokens_details": {"cached_tokens": prompt // 2},
                    "completion_tokens_details": {"reasoning_tokens": 5 if "think" in text else 0,
                                                  "accepted_prediction_tokens": 3, "rejected_prediction_tokens": 1}}
        live = body.get("stream_options", {}).get("continuous_usage_stats")

        def wrap(delta, i):
            e = {"choices": [{"index": 0, "delta": delta, "finish_reason": finish if i == n else None}]}
            return {**e, "usage": usage(i)} if live else e
        self.words(entry, deltas, wrap, ttft, itl)
        if "cut" in text:
            self.close_connection = True
            return self.connection.shutdown(2)
        return self.end(usage(n))


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024


def main():
    s = Server(("127.0.0.1", options.port), Handler)
    if options.cert:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(options.cert)
        s.socket = context.wrap_socket(s.socket, server_side=True)
    print(("https" if options.cert else "http") + "://127.0.0.1:%d" % s.server_address[1], flush=True)
    threading.Thread(target=s.serve_forever, daemon=True).start()
    sys.stdin.read()  # until whoever started it closes the pipe
    if options.record:
        with open(options.record, "w", encoding="utf-8") as f:
            json.dump(record, f)


arguments = argparse.ArgumentParser()
arguments.add_argument("--port", type=int, default=0)
arguments.add_argument("--ttft", type=float, default=20)
arguments.add_argument("--itl", type=float, default=5)
arguments.add_argument("--key")
arguments.add_argument("--record")
arguments.add_argument("--fail-every", type=int, default=0)
arguments.add_argument("--page")
arguments.add_argument("--cert")
arguments.add_argument("--close", action="store_true", help="end of body by closing, not chunked")
arguments.add_argument("--fill", action="store_true", help="chat answers have as many words as were asked for")
arguments.add_argument("--loading", action="store_true", help="alive, not ready")
arguments.add_argument("--keep", action="store_true", help="the record has the bodies")
if __name__ == "__main__":
    options = arguments.parse_args()
    lock, served, record = threading.Lock(), {"requests": 0, "tokens": 0}, []
    main()
