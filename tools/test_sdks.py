#!/usr/bin/env python3
"""The official clients against `quench serve`: their streaming, tool, schema, image and log-probability
examples, and lm-eval's own code for log-likelihoods.

usage: test_sdks.py QUENCH MODEL          needs openai, anthropic, and for its part lm_eval
"""
import base64
import http.server
import json
import os
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import zlib

KEY = "sk-test"
CAPITAL = "What is the capital of Finland?"
WEATHER = {
    "name": "get_weather",
    "description": "Current weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]}},
        "required": ["city"],
    },
}
ASK_WEATHER = "What is the weather in Oslo in fahrenheit?"


def check(claim, what, found=None):
    if not claim:
        raise SystemExit(f"test_sdks: {what}: {found!r}")


def png(rgb, side=64):
    rows = b"".join(b"\0" + bytes(rgb) * side for _ in range(side))

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return base64.b64encode(data).decode()


class Server:
    def __init__(self, quench, model, *flags, environment=None):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [quench, "serve", model, "--port", str(port), "--max-model-len", "2048", "--served-model-name", "demo",
             *flags], stdout=self.log, stderr=self.log, env={**os.environ, **(environment or {})})

    def __enter__(self):
        for _ in range(300):
            try:
                urllib.request.urlopen(self.url + "/ready", timeout=5)
                return self
            except OSError:
                time.sleep(0.1)
                if self.process.poll() is not None:
                    break
        self.log.seek(0)
        raise SystemExit("test_sdks: the server does not start: " + self.log.read().decode())

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(30)


def openai_chat(client, openai):
    models = client.models.list()
    check([m.id for m in models] == ["demo"], "models", models)
    check(client.models.retrieve("demo").max_model_len == 2048, "a model's length")
    ask = {"model": "demo", "messages": [{"role": "user", "content": CAPITAL}], "temperature": 0}
    whole = client.chat.completions.create(**ask)
    check("Helsinki" in whole.choices[0].message.content, "an answer", whole)
    check(whole.choices[0].message.reasoning, "its reasoning", whole)
    text, usage = "", None
    for chunk in client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
    check(text == whole.choices[0].message.content, "a stream's text", text)
    check(usage.completion_tokens == whole.usage.completion_tokens, "a stream's usage", usage)
    with client.chat.completions.stream(**ask) as stream:
        events = [e.type for e in stream]
        final = stream.get_final_completion()
    check(final.choices[0].message.content == text and "content.done" in events, "the stream helper", final)
    several = client.chat.completions.create(**{**ask, "temperature": 1}, n=3, seed=7, max_tokens=20)
    again = client.chat.completions.create(**{**ask, "temperature": 1}, n=3, seed=7, max_tokens=20)
    texts = [[(c.message.reasoning, c.message.content) for c in r.choices] for r in (several, again)]
    check(len(texts[0]) == 3 and texts[0] == texts[1], "a seed's texts", texts)
    stopped = client.chat.completions.create(**ask, stop=["Hels"], reasoning_effort="none")
    check(stopped.choices[0].message.content == "The capital of Finland is ", "a stop string", stopped)
    scored = client.chat.completions.create(**ask, logprobs=True, top_logprobs=3)
    entry = scored.choices[0].logprobs.content[0]
    check(len(entry.top_logprobs) == 3 and entry.logprob == entry.top_logprobs[0].logprob, "log-probabilities", entry)
    for kind, make in ((openai.NotFoundError, {**ask, "model": "gpt-4"}),
                       (openai.BadRequestError, {**ask, "temperature": -1}),
                       (openai.BadRequestError, {**ask, "max_tokens": 5000})):
        try:
            client.chat.completions.create(**make)
            check(False, "no error", make)
        except kind as e:
            check(e.body["message"] and e.param in ("model", "temperature", "max_tokens"), "an error", e)
    try:
        client.with_options(api_key="wrong").models.list()
        check(False, "a wrong key was taken")
    except openai.AuthenticationError:
        pass


def openai_tools(client):
    tools = [{"type": "function", "function": WEATHER}]
    messages = [{"role": "user", "content": ASK_WEATHER}]
    ask = {"model": "demo", "messages": messages, "tools": tools, "temperature": 0}
    first = client.chat.completions.create(**ask).choices[0]
    check(first.finish_reason == "tool_calls", "a call", first)
    call = first.message.tool_calls[0]
    check(json.loads(call.function.arguments) == {"city": "Oslo", "unit": "fahrenheit"}, "its arguments", call)
    pieces = {}
    for chunk in client.chat.completions.create(**ask, stream=True):
        for piece in chunk.choices[0].delta.tool_calls or []:
            name, arguments = pieces.get(piece.index, ("", ""))
            pieces[piece.index] = (name + (piece.function.name or ""), arguments + (piece.function.arguments or ""))
    check(pieces == {0: ("get_weather", call.function.arguments)}, "a streamed call", pieces)
    with client.chat.completions.stream(**ask) as stream:
        deltas = [e for e in stream if e.type == "tool_calls.function.arguments.delta"]
        done = stream.get_final_completion().choices[0].message.tool_calls[0]
    check(deltas[-1].arguments == done.function.arguments == call.function.arguments,
          "the stream helper's call", deltas)
    messages += [first.message, {"role": "tool", "tool_call_id": call.id, "content": "21 degrees"}]
    after = client.chat.completions.create(**ask).choices[0]
    check(after.message.content, "an answer after a call", after)
    forced = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "Hello."}], tools=tools, temperature=0, max_tokens=200,
        reasoning_effort="none", tool_choice={"type": "function", "function": {"name": "get_weather"}})
    arguments = json.loads(forced.choices[0].message.tool_calls[0].function.arguments)
    check(isinstance(arguments["city"], str) and arguments.get("unit", "celsius") in ("celsius", "fahrenheit"),
          "a forced call", arguments)


def openai_schema(client):
    from pydantic import BaseModel

    class City(BaseModel):
        name: str
        is_large: bool
        rank: int

    ask = {"model": "demo", "messages": [{"role": "user", "content": CAPITAL}], "temperature": 0, "max_tokens": 300}
    for effort in ("none", "low"):
        r = client.chat.completions.create(
            **ask, reasoning_effort=effort,
            response_format={"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": {
                "type": "object", "required": ["name", "rank"], "additionalProperties": False,
                "properties": {"name": {"type": "string", "maxLength": 12}, "rank": {"enum": [1, 2, 3]}}}}})
        value = json.loads(r.choices[0].message.content)
        check(set(value) == {"name", "rank"} and value["rank"] in (1, 2, 3), "a schema", r)
    r = client.chat.completions.create(**ask, reasoning_effort="none", extra_body={
        "structured_outputs": {"choice": ["Oslo", "Helsinki", "Rome"]}})
    check(r.choices[0].message.content == "Helsinki", "a choice", r)
    r = client.chat.completions.create(**ask, reasoning_effort="none", extra_body={
        "structured_outputs": {"regex": "[A-Z][a-z]{3,9}!"}})
    check(r.choices[0].message.content.endswith("!") and r.choices[0].message.content[0].isupper(), "a regex", r)
    # The model knows little of numbers: bound what pydantic's schema leaves free.
    class Small(BaseModel):
        is_large: bool

    parsed = client.chat.completions.parse(**ask, reasoning_effort="none", response_format=Small)
    check(isinstance(parsed.choices[0].message.parsed, Small), "parse()", parsed)


def openai_image(client):
    url = "data:image/png;base64," + png((220, 30, 30))
    r = client.chat.completions.create(model="demo", temperature=0, messages=[{"role": "user", "content": [
        {"type": "text", "text": "What is in the picture?"}, {"type": "image_url", "image_url": {"url": url}}]}])
    check(r.choices[0].message.content, "an answer about an image", r)
    check(r.usage.prompt_tokens_details.image_tokens >= 4, "tokens of an image", r.usage)


class Images:
    """An https server on this machine; its certificate is signed by itself."""

    def __init__(self, folder, name):
        self.certificate, key = os.path.join(folder, name + ".pem"), os.path.join(folder, name + ".key")
        subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out",
                        self.certificate, "-days", "1", "-subj", "/CN=127.0.0.1", "-addext",
                        "subjectAltName=IP:127.0.0.1"], check=True, stderr=subprocess.DEVNULL)

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                data = base64.b64decode(png((220, 30, 30)))
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, key)
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.host = f"127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def images_by_url(quench, model, openai, anthropic):
    """The clients' examples with a URL, from a host that is listed and whose certificate is trusted, or not."""
    with tempfile.TemporaryDirectory() as folder:
        trusted, other = Images(folder, "trusted"), Images(folder, "other")
        with Server(quench, model, "--allowed-media-domains", trusted.host, other.host,
                    environment={"SSL_CERT_FILE": trusted.certificate}) as server:
            client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=60)

            def ask(url):
                return client.chat.completions.create(model="demo", temperature=0, messages=[{
                    "role": "user", "content": [{"type": "text", "text": "What is in the picture?"},
                                                {"type": "image_url", "image_url": {"url": url}}]}])

            by_url = ask(f"https://{trusted.host}/a.png?b=c")
            inline = ask("data:image/png;base64," + png((220, 30, 30)))
            check(by_url.choices[0].message.content == inline.choices[0].message.content, "an image by URL", by_url)
            for url, says in ((f"https://{other.host}/a.png", "certificate"), ("https://localhost/a.png", "not one of"),
                              (f"http://{trusted.host}/a.png", "cannot be fetched")):
                try:
                    ask(url)
                    check(False, "an image was fetched", url)
                except openai.BadRequestError as e:
                    check(says in e.body["message"] and "image_url" in e.param, "an error", e)
            claude = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=60)
            r = claude.messages.create(model="demo", max_tokens=100, messages=[{"role": "user", "content": [
                {"type": "image", "source": {"type": "url", "url": f"https://{trusted.host}/a.png"}},
                {"type": "text", "text": "What is in the picture?"}]}])
            check(r.content[0].text, "an answer about an image by URL", r)


def openai_completions(client):
    ask = {"model": "demo", "temperature": 0, "max_tokens": 6}
    whole = client.completions.create(prompt="The first", **ask)
    text = "".join(c.choices[0].text for c in client.completions.create(prompt="The first", stream=True, **ask))
    check(whole.choices[0].text == text and text, "a completion's stream", text)
    ids = [100, 101, 102, 103]
    r = client.completions.create(prompt=[ids, ids[:2]], echo=True, logprobs=2, model="demo", max_tokens=1)
    check([len(c.logprobs.token_logprobs) for c in r.choices] == [5, 3], "lengths of arrays", r)
    r = client.completions.create(prompt=ids, echo=True, logprobs=0, model="demo", max_tokens=0)
    check(len(r.choices[0].logprobs.tokens) == 4 and r.usage.completion_tokens == 0, "scores alone", r)


def openai_responses(client, openai):
    ask = {"model": "demo", "temperature": 0}
    r = client.responses.create(input=CAPITAL, instructions="You are a helpful assistant.", **ask)
    check("Helsinki" in r.output_text and r.output[0].type == "reasoning", "a response", r)
    kinds, text, final = [], "", None
    for event in client.responses.create(input=CAPITAL, stream=True, **ask):
        kinds.append(event.type)
        text += event.delta if event.type == "response.output_text.delta" else ""
        final = event.response if event.type == "response.completed" else final
    check(final.output_text == text and "Helsinki" in text, "a response's stream", kinds)
    with client.responses.stream(input=CAPITAL, **ask) as stream:
        for event in stream:
            pass
        check(stream.get_final_response().output_text == text, "the stream helper of responses")
    tools = [{"type": "function", **WEATHER}]
    r = client.responses.create(input=ASK_WEATHER, tools=tools, **ask)
    call = next(item for item in r.output if item.type == "function_call")
    check(json.loads(call.arguments)["city"] == "Oslo", "a response's call", call)
    deltas = []
    with client.responses.stream(input=ASK_WEATHER, tools=tools, **ask) as stream:
        for event in stream:
            if event.type == "response.function_call_arguments.delta":
                deltas.append(event.delta)
        again = next(item for item in stream.get_final_response().output if item.type == "function_call")
    check("".join(deltas) == call.arguments == again.arguments, "a response's streamed call", deltas)
    items = [{"role": "user", "content": ASK_WEATHER}, *r.output,
             {"type": "function_call_output", "call_id": call.call_id, "output": "21 degrees"}]
    check(client.responses.create(input=items, tools=tools, **ask).output_text, "a response after a call")
    first = client.responses.create(input="My name is Ada.", **ask)
    after = client.responses.create(input=CAPITAL, previous_response_id=first.id, **ask)
    check(after.previous_response_id == first.id and after.usage.input_tokens > first.usage.input_tokens,
          "a response that goes on", after)
    whole = client.responses.create(input=[{"role": "user", "content": "My name is Ada."}, *first.output,
                                           {"role": "user", "content": CAPITAL}], **ask)
    check(after.output_text == whole.output_text and after.usage.input_tokens == whole.usage.input_tokens,
          "the same as with all items", (after, whole))
    check(client.responses.retrieve(after.id) == after, "a response by its id", after)
    client.responses.delete(after.id)
    for ask_gone in (lambda: client.responses.retrieve(after.id), lambda: client.responses.delete("resp_none")):
        try:
            ask_gone()
            check(False, "a response that is gone")
        except openai.NotFoundError:
            pass
    try:
        client.responses.create(input=CAPITAL, previous_response_id=after.id, **ask)
        check(False, "an answer to what is gone")
    except openai.BadRequestError as e:
        check(e.code == "previous_response_not_found", "its code", e)
    r = client.responses.create(input=CAPITAL, reasoning={"effort": "none"}, max_output_tokens=100, text={"format": {
        "type": "json_schema", "name": "a", "schema": {"type": "object", "properties": {"a": {"type": "boolean"}},
                                                       "required": ["a"], "additionalProperties": False}}}, **ask)
    check(isinstance(json.loads(r.output_text)["a"], bool), "a response's schema", r)


def anthropic_messages(client, anthropic):
    ask = {"model": "demo", "max_tokens": 200, "extra_body": {"temperature": 0},
           "messages": [{"role": "user", "content": CAPITAL}]}
    r = client.messages.create(**ask)
    check("Helsinki" in r.content[0].text and r.stop_reason == "end_turn", "a message", r)
    with client.messages.stream(**ask) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    check(text == r.content[0].text and final.usage.output_tokens == r.usage.output_tokens, "a message's stream", final)
    n = client.messages.count_tokens(model="demo", messages=ask["messages"]).input_tokens
    check(n == r.usage.input_tokens + r.usage.cache_read_input_tokens, "count_tokens", n)
    r = client.messages.create(**{**ask, "max_tokens": 1500}, thinking={"type": "enabled", "budget_tokens": 1024})
    check([b.type for b in r.content] == ["thinking", "text"], "thinking", r)
    tools = [{"name": WEATHER["name"], "description": WEATHER["description"], "input_schema": WEATHER["parameters"]}]
    messages = [{"role": "user", "content": ASK_WEATHER}]
    with client.messages.stream(**{**ask, "messages": messages}, tools=tools) as stream:
        deltas = [e.partial_json for e in stream if e.type == "input_json"]
        final = stream.get_final_message()
    use = final.content[-1]
    check(json.loads("".join(deltas)) == use.input, "a streamed tool's use", deltas)
    check(use.type == "tool_use" and use.input == {"city": "Oslo", "unit": "fahrenheit"}, "a tool's use", final)
    check(final.stop_reason == "tool_use", "its stop reason", final)
    messages += [{"role": "assistant", "content": final.content},
                 {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": "21 degrees"}]}]
    check(client.messages.create(**{**ask, "messages": messages}, tools=tools).content[0].text, "an answer after it")
    picture = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": png((30, 30, 220))}}
    messages = [{"role": "user", "content": [picture, {"type": "text", "text": "What is in the picture?"}]}]
    r = client.messages.create(**{**ask, "messages": messages})
    n = client.messages.count_tokens(model="demo", messages=messages).input_tokens
    check(n == r.usage.input_tokens + r.usage.cache_read_input_tokens, "count_tokens with an image", (n, r.usage))
    r = client.messages.create(**ask, stop_sequences=["Hels"])
    check(r.stop_reason == "stop_sequence" and r.stop_sequence == "Hels", "a stop sequence", r)
    for kind, make in ((anthropic.NotFoundError, {**ask, "model": "claude"}),
                       (anthropic.BadRequestError, {**ask, "messages": [{"role": "user", "content": [{"type": "x"}]}]})):
        try:
            client.messages.create(**make)
            check(False, "no error", make)
        except kind as e:
            check(e.body["error"]["message"], "an error", e)


# Answers to choose from; lm-eval scores each after its question.
CAPITALS = {"Finland": "Helsinki", "Norway": "Oslo", "India": "Delhi", "France": "Paris", "Italy": "Rome",
            "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo"}


def lm_eval_scores(url):
    """Multiple choice through lm-eval's own client: requests, remote tokenizer, parsing and all."""
    os.environ.update(OPENAI_API_KEY=KEY, TQDM_DISABLE="1")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    client = LocalCompletionsAPI(base_url=url + "/v1/completions", model="demo", tokenizer_backend="remote",
                                 auth_token=KEY, batch_size=4, max_length=2048)
    names = list(CAPITALS)
    requests, right = [], 0
    for country in names:
        question = (f"<|im_start|>user\nWhat is the capital of {country}?<|im_end|>\n<|im_start|>assistant\n<think>\n\n"
                    f"</think>\n\nThe capital of {country} is")
        for other in names:
            requests.append(Instance("loglikelihood", {}, (question, f" {CAPITALS[other]}.<|im_end|>"), 0))
    scores = client.loglikelihood(requests, disable_tqdm=True)
    for i, country in enumerate(names):
        row = scores[i * len(names):(i + 1) * len(names)]
        right += max(range(len(names)), key=lambda k: row[k][0]) == i
        if row[i][1]:
            check(row[i][0] == max(s for s, _ in row), "greedy, but not the best", row)
    check(right >= 7, f"lm-eval: {right} of {len(names)} right, chance is one", scores)
    # Its parsing adds what the server says of each token: the same as tokens scored alone.
    import requests as web

    context, answer = client.tok_encode("The first"), client.tok_encode(" time")
    score, _ = client.loglikelihood([Instance("loglikelihood", {}, ("The first", " time"), 0)], disable_tqdm=True)[0]
    body = {"model": "demo", "prompt": context + answer, "echo": True, "logprobs": 1, "max_tokens": 0}
    r = web.post(url + "/v1/completions", json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=60).json()
    check(abs(sum(r["choices"][0]["logprobs"]["token_logprobs"][len(context):]) - score) < 1e-6, "a sum", score)
    text = client.generate_until([Instance("generate_until", {}, (
        f"<|im_start|>user\n{CAPITAL}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        {"until": ["."], "max_gen_toks": 30}), 0)], disable_tqdm=True)
    check(text == ["The capital of Finland is Helsinki"], "lm-eval's generation", text)
    return right


def main():
    import anthropic
    import openai

    quench, model = sys.argv[1:3]
    begin = time.time()
    with Server(quench, model, "--api-key", KEY, "--response-store", "4M") as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0, timeout=60)
        openai_chat(client, openai)
        openai_tools(client)
        openai_schema(client)
        openai_image(client)
        openai_completions(client)
        openai_responses(client, openai)
        images_by_url(quench, model, openai, anthropic)
        anthropic_messages(anthropic.Anthropic(base_url=server.url, api_key=KEY, max_retries=0, timeout=60), anthropic)
        try:
            import lm_eval  # noqa: F401
        except ImportError:
            print("SKIP: lm-eval's own client: the package lm-eval is not installed")
        else:
            print(f"lm-eval's local-completions: {lm_eval_scores(server.url)} of {len(CAPITALS)} right")
    print(f"openai {openai.__version__}, anthropic {anthropic.__version__}: their examples pass, "
          f"{time.time() - begin:.0f} s")


main()
