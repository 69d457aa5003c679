#!/usr/bin/env python3
"""quench as a client: bench serve and doctor against a server that knows what it did: tests/server/mock_openai.py keeps the moments at which it got
requests and sent tokens, on the same clock; every sum is computed again here from the requests' own figures.

python3 tools/test_clients.py [PROGRAM]     build/quench; standard library only, about 20 s"""
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
PROGRAM = os.path.abspath(sys.argv[1] if len(sys.argv) > 1 else os.path.join(ROOT, "build/quench"))
FOLDER = tempfile.mkdtemp(prefix="quench-load-")


class Mock:
    def __init__(self, *words):
        self.record = os.path.join(FOLDER, "record.json")
        self.process = subprocess.Popen([sys.executable, os.path.join(ROOT, "tests/server/mock_openai.py"), "--keep", "--fill",
                                         "--record", self.record, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.url = self.process.stdout.readline().strip()

    def stop(self):
        self.process.stdin.close()
        self.process.wait(10)
        with open(self.record, encoding="utf-8") as f:
            return json.load(f)


def bench(*words, key=None):
    env = {k: v for k, v in os.environ.items() if k != "OPENAI_API_KEY"}
    if key:
        env["OPENAI_API_KEY"] = key
    return subprocess.run([PROGRAM, "bench", "serve", *words], env=env, capture_output=True, text=True, timeout=120)


def result(*words, **more):
    r = bench("--json", "--quiet", "--save-detailed", *words, **more)
    assert r.returncode == 0, f"{r.returncode}: {r.stderr}"
    return json.loads(r.stdout)


def near(found, want, relative=1e-9):
    assert math.isclose(found, want, rel_tol=relative, abs_tol=1e-12), f"expected {want}, found {found}"


def quantile(x, p):
    x = sorted(x)
    place = p / 100 * (len(x) - 1)
    low = int(place)
    return x[low] + (x[min(low + 1, len(x) - 1)] - x[low]) * (place - low)


def check_sums(d, goals=None):
    """From the requests' figures to every sum, by the definitions of vLLM's client."""
    ok = [i for i, e in enumerate(d["errors"]) if not e]
    assert d["completed"] == len(ok) and d["failed"] == d["num_prompts"] - len(ok)
    near(d["total_input_tokens"], sum(d["input_lens"][i] for i in ok))
    near(d["total_output_tokens"], sum(d["output_lens"]))
    near(d["request_throughput"], len(ok) / d["duration"])
    near(d["output_throughput"], sum(d["output_lens"]) / d["duration"])
    near(d["total_token_throughput"], (d["total_input_tokens"] + d["total_output_tokens"]) / d["duration"])
    tpot = {i: (d["latencies"][i] - d["ttfts"][i]) / (d["output_lens"][i] - 1) if d["output_lens"][i] > 1 else 0 for i in ok}
    for name, values in (("ttft", [d["ttfts"][i] for i in ok]), ("tpot", [tpot[i] for i in ok if d["output_lens"][i] > 1]),
                         ("itl", [x for i in ok for x in d["itls"][i]]), ("e2el", [d["latencies"][i] for i in ok])):
        near(d[f"mean_{name}_ms"], 1e3 * statistics.fmean(values))
        near(d[f"median_{name}_ms"], 1e3 * statistics.median(values))
        near(d[f"std_{name}_ms"], 1e3 * statistics.pstdev(values), 1e-6)
        for p in (50, 90, 99, 99.9):
            if f"p{p}_{name}_ms" in d:
                near(d[f"p{p}_{name}_ms"], 1e3 * quantile(values, p))
        assert f"p99_{name}_ms" in d
    for i in ok:
        near(d["latencies"][i], d["ttfts"][i] + sum(d["itls"][i]), 1e-6)
    if goals:
        good = sum(d["ttfts"][i] <= goals.get("ttft", 1e9) and tpot[i] <= goals.get("tpot", 1e9) and
                   d["latencies"][i] <= goals.get("e2el", 1e9) for i in ok)
        near(d["request_goodput"], good / d["duration"])
        return good
    assert d["request_goodput"] is None
    first = min(d["start_times"][i] for i in ok)
    seconds = {}
    for i in ok:
        at = d["start_times"][i] + d["ttfts"][i] - first
        for gap in [0] + d["itls"][i]:
            at += gap
            seconds[int(at)] = seconds.get(int(at), 0) + 1
    assert d["max_output_tokens_per_s"] == max(seconds.values())
    events = sorted([(d["start_times"][i], 1) for i in ok] + [(d["start_times"][i] + d["latencies"][i], -1) for i in ok])
    now = most = 0
    for _, step in events:
        now += step
        most = max(most, now)
    assert d["max_concurrent_requests"] == most
    return None


def check_times(d, record):
    """Every token of every request was seen when it was sent: never before, and soon after."""
    late, by_number = [], {e["number"]: e for e in record}
    for i, start in enumerate(d["start_times"]):
        if d["errors"][i]:
            continue
        e = by_number[int(re.match(r"n(\d+) ", d["generated_texts"][i]).group(1))]
        at, seen = start + d["ttfts"][i], []
        seen.append(at)
        for gap in d["itls"][i]:
            at += gap
            seen.append(at)
        assert len(seen) == len(e["sent"]), (len(seen), len(e["sent"]))
        assert start <= e["arrived"] + 1e-4, "the server had it before it was sent"
        late += [s - t for s, t in zip(seen, e["sent"])]
    assert min(late) > -1e-3, f"a token was seen {-min(late):.4f} s before it was sent"
    assert statistics.median(late) < 5e-3 and quantile(late, 95) < 0.1, (statistics.median(late), quantile(late, 95))
    return statistics.median(late)


def poisson_completions():
    m = Mock("--ttft", "40", "--itl", "8")
    d = result("--base-url", m.url, "--num-prompts", "60", "--request-rate", "40", "--random-input-len", "50", "--random-output-len", "20",
               "--seed", "7", "--metric-percentiles", "50,90,99,99.9")
    record = m.stop()
    check_sums(d)
    late = check_times(d, record)
    assert 40 <= d["median_ttft_ms"] < 70 and 7.5 < d["median_itl_ms"] < 9 and 7.9 < d["mean_tpot_ms"] < 10, d["median_ttft_ms"]
    starts = [s - d["start_times"][0] for s in d["start_times"]]
    assert starts == sorted(starts) and 1.2 < starts[-1] < 1.7, starts[-1]  # 60 at 40 a second: the last at 1.5 s after the begin
    gaps = [b - a for a, b in zip(starts, starts[1:])]
    assert 0.6 < statistics.pstdev(gaps) / statistics.fmean(gaps) < 1.5, "arrivals are not Poisson"
    body = record[-1]["body"]
    assert body["ignore_eos"] is True and body["max_tokens"] == 20 and len(body["prompt"].split()) == 50 and body["stream_options"] == {"include_usage": True}
    assert len({e["body"]["prompt"] for e in record}) == 61, "prompts repeat"
    assert d["total_input_tokens"] == 60 * 50 and d["total_output_tokens"] == 60 * 20
    assert d["spec_decode_acceptance_rate"] == 50 and d["spec_decode_draft_tokens"] == 1200 and d["spec_decode_per_position_acceptance_rates"] == [0.5]
    return f"a token is noted {1e3 * late:.2f} ms after it was sent (median)"


def same_seed_same_load():
    m = Mock("--ttft", "1", "--itl", "1")
    words = ("--base-url", m.url, "--num-prompts", "10", "--random-input-len", "12", "--random-output-len", "3", "--random-range-ratio", "0.5",
             "--random-prefix-len", "5", "--request-rate", "100", "--burstiness", "0.5")
    a, b, c = result(*words), result(*words), result(*words, "--seed", "1")
    record = m.stop()
    prompts = [sorted(e["body"]["prompt"] for e in record[i:i + 11]) for i in (0, 11, 22)]
    assert prompts[0] == prompts[1] != prompts[2]
    assert len({" ".join(p.split()[:5]) for p in prompts[0]}) == 1, "the prefix is not shared"
    assert {len(p.split()) for p in prompts[0]} <= set(range(11, 24)) and len({len(p.split()) for p in prompts[0]}) > 2
    assert a["output_lens"] == b["output_lens"] and set(a["output_lens"]) <= {1, 2, 3, 4} and c["num_prompts"] == 10
    return None


def goodput_splits():
    m = Mock("--ttft", "10", "--itl", "2")
    d = result("--base-url", m.url, "--num-prompts", "30", "--max-concurrency", "5", "--random-input-len", "4", "--random-output-len", "10",
               "--random-range-ratio", "0.9", "--goodput", "ttft:1000", "e2el:28", "tpot:50")
    m.stop()
    good = check_sums(d, {"ttft": 1, "e2el": 0.028, "tpot": 0.05})
    assert 0 < good < 30, good
    return None


def chat_waits_its_turn():
    m = Mock("--ttft", "20", "--itl", "5")
    d = result("--base-url", m.url, "--backend", "openai-chat", "--model", "mock", "--num-prompts", "24", "--max-concurrency", "6",
               "--random-input-len", "10", "--random-output-len", "12", "--temperature", "0.5", "--top-k", "5", "--extra-body", '{"min_p": 0.1}')
    record = m.stop()
    check_sums(d)
    spans = sorted([(e["arrived"], 1) for e in record] + [(e["sent"][-1], -1) for e in record])
    now = most = 0
    for _, step in spans:
        now += step
        most = max(most, now)
    assert most <= 6 and d["max_concurrent_requests"] <= 6
    assert d["queue_times"][0] < 0.05 < max(d["queue_times"]), d["queue_times"]
    body = record[-1]["body"]
    assert body["temperature"] == 0.5 and body["top_k"] == 5 and body["min_p"] == 0.1 and body["max_completion_tokens"] == 12
    assert body["messages"][0]["role"] == "user" and len(body["messages"]) == 1
    assert d["output_lens"] == [12] * 24 and all(len(i) == 11 for i in d["itls"]), "the role's event was taken for a token"
    return None


def failures_are_counted():
    m = Mock("--ttft", "1", "--itl", "1", "--fail-every", "4")
    d = result("--base-url", m.url, "--num-prompts", "20", "--random-input-len", "4", "--random-output-len", "4")
    m.stop()
    check_sums(d)
    assert d["failed"] == 5 and sum("HTTP status 503" in e and "the queue is full" in e for e in d["errors"]) == 5, d["errors"]
    m = Mock("--ttft", "1", "--itl", "30")
    path = os.path.join(FOLDER, "lines.jsonl")
    with open(path, "w", encoding="utf-8") as f:
        f.writelines(json.dumps({"messages": [{"role": "user", "content": "cut" if i < 2 else "whole"}], "output_tokens": 3}) + "\n" for i in range(6))
    d = result("--base-url", m.url, "--backend", "openai-chat", "--dataset-name", path, "--num-prompts", "5")
    m.stop()
    assert d["failed"] == 2 and all(("closed" in e or "ended" in e) == (i < 2) for i, e in enumerate(d["errors"])), d["errors"]
    return None


def server_dies():
    m = Mock("--ttft", "50", "--itl", "400")
    p = subprocess.Popen([PROGRAM, "bench", "serve", "--base-url", m.url, "--num-prompts", "8", "--random-input-len", "2", "--random-output-len", "5"],
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        p.wait(3.2)  # the first request takes 1.65 s
    except subprocess.TimeoutExpired:
        pass
    m.process.kill()
    out, err = p.communicate(timeout=10)
    assert p.returncode == 1 and "no request was answered" in err and "Failed requests:                         8" in out, (p.returncode, out, err)
    m.process.wait()
    return None


def ways_of_ending_a_body():
    for words in ((), ("--close",)):
        m = Mock("--ttft", "2", "--itl", "1", *words)
        d = result("--base-url", m.url + "/", "--backend", "vllm", "--num-prompts", "10", "--random-input-len", "3", "--random-output-len", "9")
        m.stop()
        check_sums(d)
        assert d["completed"] == 10 and d["total_output_tokens"] == 90
    return None


def keys_and_headers():
    m = Mock("--ttft", "2", "--itl", "1", "--key", "sesame")
    words = ("--base-url", m.url, "--num-prompts", "3", "--random-input-len", "3", "--random-output-len", "2")
    r = bench(*words)
    assert r.returncode == 1 and "401" in r.stderr and "Invalid API key" in r.stderr, r.stderr
    r = bench(*words, key="wrong")
    assert r.returncode == 1 and "wrong" not in r.stderr + r.stdout, "the key was printed"
    assert result(*words, key="sesame")["completed"] == 3
    assert result(*words, "--header", "Authorization=Bearer sesame", "X-Other=1")["completed"] == 3
    m.stop()
    return None


def tls():
    if not shutil.which("openssl"):
        return "SKIP: no openssl program to make a certificate"
    pem = os.path.join(FOLDER, "both.pem")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", pem + ".key", "-out", pem + ".crt", "-days", "2",
                    "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"], check=True, capture_output=True)
    with open(pem, "w", encoding="utf-8") as f:
        for part in (".key", ".crt"):
            with open(pem + part, encoding="utf-8") as g:
                f.write(g.read())
    m = Mock("--ttft", "5", "--itl", "2", "--cert", pem)
    words = ("--base-url", m.url, "--num-prompts", "20", "--random-input-len", "3", "--random-output-len", "5", "--model", "mock")
    r = bench(*words)
    assert r.returncode == 1 and "certificate" in r.stderr, r.stderr
    assert result(*words, "--insecure")["completed"] == 20
    os.environ["SSL_CERT_FILE"] = pem + ".crt"
    try:
        assert result(*words)["completed"] == 20
        assert result("--base-url", m.url.replace("127.0.0.1", "localhost"), *words[2:])["completed"] == 20
    finally:
        del os.environ["SSL_CERT_FILE"]
    m.stop()
    return None


def hundreds_of_streams():
    m = Mock("--ttft", "300", "--itl", "40")
    d = result("--base-url", m.url, "--num-prompts", "400", "--random-input-len", "5", "--random-output-len", "10")
    m.stop()
    check_sums(d)
    assert d["completed"] == 400 and d["max_concurrent_requests"] > 300, (d["completed"], d["max_concurrent_requests"])
    return f"{d['max_concurrent_requests']} at a time"


def datasets():
    path = os.path.join(FOLDER, "sharegpt.json")
    with open(path, "w", encoding="utf-8") as f:
        json.dump([{"conversations": [{"from": "human", "value": f"Question {i} about the river and its banks?"},
                                      {"from": "gpt", "value": "An answer that is long enough. " * (i % 3 + 1)}]} for i in range(20)] +
                  [{"conversations": [{"value": "short"}, {"value": "x"}]}, {"conversations": []}, {"id": 1}], f)
    m = Mock("--ttft", "1", "--itl", "1")
    d = result("--base-url", m.url, "--dataset-name", "sharegpt", "--dataset-path", path, "--num-prompts", "50", "--tokenizer",
               os.path.join(ROOT, "models/demo"))
    assert d["num_prompts"] == 20 and len(set(d["output_lens"])) == 3, d["output_lens"]
    d = result("--base-url", m.url, "--dataset-name", "sharegpt", "--dataset-path", path, "--num-prompts", "4", "--sharegpt-output-len", "6")
    assert d["output_lens"] == [6] * 4
    lines = os.path.join(FOLDER, "prompts.jsonl")
    with open(lines, "w", encoding="utf-8") as f:
        f.write('{"prompt": "one two three"}\n\n{"prompt": "four", "output_tokens": 9}\n')
    d = result("--base-url", m.url, "--dataset-name", "custom", "--dataset-path", lines, "--num-prompts", "2", "--custom-output-len", "4")
    assert d["output_lens"] == [4, 4] and d["input_lens"] == [3, 1] and d["generated_texts"][0] .endswith(" w1 w2 w3 ")
    assert result("--base-url", m.url, "--dataset-name", lines, "--num-prompts", "2")["output_lens"] == [256, 9]
    m.stop()
    return None


def saved_and_printed():
    m = Mock("--ttft", "5", "--itl", "2")
    r = bench("--base-url", m.url, "--num-prompts", "5", "--random-input-len", "3", "--random-output-len", "5", "--save-result", "--result-dir",
              os.path.join(FOLDER, "out"), "--label", "here", "--metadata", "tp=1", "note=two words", "--request-rate", "50", "--goodput",
              "ttft:500", "tpot:50", "--disable-tqdm", "--trust-remote-code")
    m.stop()
    assert r.returncode == 0, r.stderr
    names = os.listdir(os.path.join(FOLDER, "out"))
    assert len(names) == 1 and names[0].startswith("here-50qps-mock-") and names[0].endswith(".json"), names
    with open(os.path.join(FOLDER, "out", names[0]), encoding="utf-8") as f:
        d = json.load(f)
    assert d["tp"] == "1" and d["note"] == "two words" and d["label"] == "here" and "ttfts" not in d and d["backend"] == "openai"
    lines = r.stdout.splitlines()
    assert lines[0] == " Serving Benchmark Result ".center(50, "=") and lines[-1] == "=" * 50
    for label, value in (("Successful requests:", "5"), ("Request rate configured (RPS):", "50.00"),
                         ("Output token throughput (tok/s):", f"{d['output_throughput']:.2f}"), ("Mean TTFT (ms):", f"{d['mean_ttft_ms']:.2f}"),
                         ("P99 ITL (ms):", f"{d['p99_itl_ms']:.2f}"), ("Request goodput (req/s):", f"{d['request_goodput']:.2f}")):
        assert f"{label:<40} {value:<10}" in lines, (label, value, r.stdout)
    for header in ("Time to First Token", "Time per Output Token (excl. 1st token)", "Inter-token Latency", "End-to-end Latency", "Speculative Decoding"):
        assert header.center(50, "-") in lines or any(l.strip("-") == header and len(l) == 50 for l in lines), header
    return None


def sentences():
    m = Mock()
    for words, status, text in (
            (("--base-url", "http://127.0.0.1:1"), 1, "http://127.0.0.1:1: connect: Connection refused"),
            (("--base-url", "ftp://x"), 2, "'ftp://x': expected http://HOST[:PORT] or https://HOST[:PORT]"),
            (("--base-url", m.url, "--goodput", "speed:1"), 2, "--goodput: expected ttft:MS, tpot:MS or e2el:MS, found 'speed:1'"),
            (("--base-url", m.url, "--metric-percentiles", "50,101"), 2, "found '50,101'"),
            (("--base-url", m.url, "--request-rate", "0"), 2, "--request-rate: expected more than 0, or inf"),
            (("--base-url", m.url, "--dataset-name", "sharegpt"), 2, "--dataset-path: expected the file of --dataset-name"),
            (("--base-url", m.url, "--dataset-name", "custom", "--dataset-path", "/nowhere"), 1, "/nowhere: No such file"),
            (("--base-url", m.url, "--extra-body", "["), 1, "--extra-body"),
            (("--base-url", m.url, "--header", "novalue"), 2, "'novalue': expected NAME=VALUE of a header"),
            (("--base-url", m.url, "--endpoint", "/v2/none/completions/", "--extra-body", '{"stream": false}'), 1, "this mock only streams"),
            (("--base-url", m.url, "--percentile-metrics", "ttft,speed"), 2, "found 'ttft,speed'"),
            (("positional",), 2, "one argument too many")):
        r = bench(*words)
        assert r.returncode == status and text in r.stderr and not r.stdout, (words, r.returncode, r.stderr)
    m.stop()
    return None


def doctor_asks_a_server():
    def lines(url, key=None):
        env = {k: v for k, v in os.environ.items() if k != "OPENAI_API_KEY"}
        r = subprocess.run([PROGRAM, "doctor", "--json", "--url", url], env={**env, **({"OPENAI_API_KEY": key} if key else {})},
                           capture_output=True, text=True, timeout=60)
        found = {l["check"]: l for l in json.loads(r.stdout)["lines"]}
        assert r.returncode == (1 if any(l["state"] == "fail" for l in found.values()) else 0), r.returncode
        return found
    m = Mock("--loading")
    d = lines(m.url)
    m.stop()
    assert d["server"]["state"] == "ok" and "alive" in d["server"]["text"] and d["ready"]["state"] == "warn" and "models" not in d
    m = Mock("--key", "sesame")
    d = lines(m.url)
    assert d["ready"]["state"] == "ok"
    assert d["models"]["state"] == "warn" and "OPENAI_API_KEY" in d["models"]["advice"]
    assert lines(m.url, "wrong")["models"]["state"] == "fail"
    d = lines(m.url, "sesame")
    assert d["models"] == {"check": "models", "state": "ok", "text": "mock, up to 4096 tokens", "advice": None}
    m.stop()
    assert lines("http://127.0.0.1:1")["server"]["state"] == "fail"
    return None


def main():
    failed = 0
    for test in (poisson_completions, same_seed_same_load, goodput_splits, chat_waits_its_turn, failures_are_counted, server_dies,
                 ways_of_ending_a_body, keys_and_headers, tls, hundreds_of_streams, datasets, saved_and_printed, sentences, doctor_asks_a_server):
        try:
            note = test()
            print(f"client: {test.__name__:24} ok{'  ' + note if note else ''}", flush=True)
        except (AssertionError, KeyError, subprocess.TimeoutExpired) as e:
            failed += 1
            print(f"client: {test.__name__:24} FAILED at line {e.__traceback__.tb_next.tb_lineno}: {e!r}", flush=True)
    shutil.rmtree(FOLDER, ignore_errors=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
