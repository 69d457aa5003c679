#!/usr/bin/env python3
"""docs/deploy: every file is read by what it is for, where that is installed, and agrees with the program.

python3 tools/test_deploy.py [PROGRAM]      build/quench. Says SKIP for what is not here: systemd-analyze, nginx, PyYAML"""
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
PROGRAM = os.path.abspath(sys.argv[1] if len(sys.argv) > 1 else os.path.join(ROOT, "build/quench"))
FOLDER = tempfile.mkdtemp(prefix="quench-deploy-")
try:
    import yaml
except ImportError:
    yaml = None


class Skip(Exception):
    pass


def text_of(name):
    with open(os.path.join(ROOT, "docs/deploy", name), encoding="utf-8") as f:
        return f.read()


def documents(name):
    if not yaml:
        raise Skip("no PyYAML (python3-yaml)")
    return list(yaml.safe_load_all(text_of(name)))


def serve_flags():
    r = subprocess.run([PROGRAM, "serve", "--help"], capture_output=True, text=True)
    if r.returncode:
        raise Skip("this program has no serve")
    return set(re.findall(r"(--[a-z][a-z0-9-]*)", r.stdout))


def routes():
    with open(os.path.join(ROOT, "src/server/routes.c"), encoding="utf-8") as f:
        return set(re.findall(r'\{ "(/[^"]*)"', f.read()))


def unit():
    if not shutil.which("systemd-analyze"):
        raise Skip("no systemd-analyze")
    path = os.path.join(FOLDER, "quench.service")
    with open(path, "w", encoding="utf-8") as f:
        f.write(text_of("quench.service").replace("/usr/local/bin/quench", PROGRAM))
    r = subprocess.run(["systemd-analyze", "verify", "--man=no", path], capture_output=True, text=True)
    ours = [l for l in (r.stdout + r.stderr).splitlines() if "quench" in l]
    assert r.returncode == 0 and not ours, r.stdout + r.stderr
    r = subprocess.run(["systemd-analyze", "security", "--offline=true", "--threshold=25", "--no-pager", path], capture_output=True, text=True)
    assert r.returncode == 0, r.stdout[-2000:] + r.stderr
    stop = int(re.search(r"^TimeoutStopSec=(\d+)", text_of("quench.service"), re.M).group(1))
    assert stop > 30, "systemd kills before the drain ends"
    return re.search(r"Overall exposure level for .*: (.*)", r.stdout).group(1).split(" ")[0] + " of 10 exposed"


def flags_exist():
    known = serve_flags()
    used = set(re.findall(r"(--[a-z][a-z-]+)", re.search(r"^ExecStart=.*", text_of("quench.service"), re.M).group()))
    if yaml:
        used |= {"--" + k for k in documents("quench.yaml")[0] if k != "model"}
        pod = documents("kubernetes.yaml")[0]["spec"]["template"]["spec"]
        used |= {a.split("=")[0] for a in pod["containers"][0]["args"] if a.startswith("--")}
    assert used and used <= known, used - known
    r = subprocess.run([PROGRAM, "serve", "--config", os.path.join(ROOT, "docs/deploy/quench.yaml"), "--print-config"], capture_output=True, text=True)
    assert r.returncode == 0 and "quench.yaml" in r.stdout and "Qwen3.6-35B-A3B" in r.stdout, r.stdout + r.stderr
    return f"{len(used)} flags"


def kubernetes():
    deployment, service, budget = documents("kubernetes.yaml")
    pod = deployment["spec"]["template"]["spec"]
    box = pod["containers"][0]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    args = dict(a[2:].split("=", 1) if "=" in a else (a[2:], True) for a in box["args"] if a.startswith("--"))
    for probe, path in (("startupProbe", "/ready"), ("readinessProbe", "/ready"), ("livenessProbe", "/health")):
        assert box[probe]["httpGet"] == {"path": path, "port": "http"} and path in routes()
    assert box["ports"] == [{"name": "http", "containerPort": int(args["port"])}] and service["spec"]["ports"][0]["targetPort"] == "http"
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items() and service["spec"]["selector"].items() <= labels.items()
    assert budget["spec"]["selector"]["matchLabels"].items() <= labels.items()
    wait = int(box["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > wait + int(args["shutdown-timeout"]), "SIGKILL comes before the drain ends"
    assert pod["enableServiceLinks"] is False, "QUENCH_PORT=tcp://... would be taken for --port"
    mounts = {m["name"]: m["mountPath"] for m in box["volumeMounts"]}
    assert {v["name"] for v in pod["volumes"]} == set(mounts) and box["args"][1].startswith(mounts["models"] + "/")
    assert args["api-key-file"].startswith(mounts["keys"] + "/") and args["host"] == "0.0.0.0"
    assert box["securityContext"]["readOnlyRootFilesystem"] and pod["securityContext"]["runAsNonRoot"]


def envoy():
    (d,) = documents("envoy.yaml")
    cluster = d["static_resources"]["clusters"][0]
    manager = d["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    by_path = manager["route_config"]["virtual_hosts"][0]["routes"]
    route = by_path[-1]["route"]
    assert route["cluster"] == cluster["name"] == cluster["load_assignment"]["cluster_name"] and route["timeout"] == "0s"
    assert cluster["lb_policy"] == "RING_HASH" and [h.get("header", {}).get("header_name") for h in route["hash_policy"]] == ["x-session-id", "authorization", None]
    assert cluster["health_checks"][0]["http_health_check"]["path"] in routes()


def metrics_exist():
    with open(os.path.join(ROOT, "src/server/metrics.c"), encoding="utf-8") as f:
        source = f.read()
    for name in re.findall(r"`vllm:([a-z_]+)`", text_of("README.md")):
        assert name in source, name


class Replica:
    def __init__(self, *words):
        self.record = os.path.join(FOLDER, f"record-{time.monotonic_ns()}.json")
        self.process = subprocess.Popen([sys.executable, os.path.join(ROOT, "tests/server/mock_openai.py"), "--ttft", "50", "--itl", "100",
                                         "--keep", "--record", self.record, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.port = int(self.process.stdout.readline().strip().rsplit(":", 1)[1])

    def stop(self):
        self.process.stdin.close()
        self.process.wait(10)
        with open(self.record, encoding="utf-8") as f:
            return [e["body"]["messages"][0]["content"] for e in json.load(f)]


def ask(port, text, **headers):
    """The times at which pieces of the answer came; HTTP status."""
    body = json.dumps({"model": "mock", "stream": True, "messages": [{"role": "user", "content": text}]}).encode()
    r = urllib.request.Request(f"http://127.0.0.1:{port}/v1/chat/completions", body,
                               {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}})
    times = []
    try:
        with urllib.request.urlopen(r, timeout=30) as f:
            for line in f:
                if line.startswith(b"data: {"):
                    times.append(time.monotonic())
            return f.status, times
    except urllib.error.HTTPError as e:
        return e.code, times


def free_port():
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_nginx(replicas):
    port, config = free_port(), text_of("nginx.conf")
    config = config.replace("127.0.0.1:8080", f"127.0.0.1:{port}")
    for old, r in zip(("8001", "8002"), replicas):
        config = config.replace("127.0.0.1:" + old, f"127.0.0.1:{r.port}")
    temps = "".join(f"    {k}_temp_path {FOLDER}/{k};\n" for k in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    path = os.path.join(FOLDER, "nginx.conf")
    with open(path, "w", encoding="utf-8") as f:
        f.write(f"daemon off;\nmaster_process off;\npid {FOLDER}/pid;\nerror_log {FOLDER}/error.log;\n" + config.replace("http {\n", "http {\n" + temps, 1))
    words = ["nginx", "-c", path, "-p", FOLDER, "-e", os.path.join(FOLDER, "error.log")]
    r = subprocess.run([*words, "-t"], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    for _ in range(100):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
            return process, port
        except OSError:
            time.sleep(0.05)
    process.kill()
    raise AssertionError("nginx does not answer")


def nginx():
    if not shutil.which("nginx") and not os.path.exists("/usr/sbin/nginx"):
        raise Skip("no nginx")
    os.environ["PATH"] += ":/usr/sbin"
    a, b = Replica(), Replica()
    process, port = start_nginx([a, b])
    try:
        status, times = ask(port, "stream")
        assert status == 200 and times[-1] - times[0] > 0.5, "the stream was held back"
        for i in range(8):
            for kind in ({"X_Session_Id": f"s{i}"}, {"Authorization": f"Bearer k{i}"}):
                for _ in range(2):
                    assert ask(port, json.dumps([i, *kind]), **kind)[0] == 200
        assert ask(port, "other key, same session", X_Session_Id="s0", Authorization="Bearer k9")[0] == 200
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5)
            raise AssertionError("/metrics goes through the proxy")
        except urllib.error.HTTPError as e:
            assert e.code == 404
        seen = [a.stop(), None]
        for i in range(4):  # one is gone: all conversations go on
            assert ask(port, "after", X_Session_Id=f"s{i}")[0] == 200
        seen[1] = b.stop()
    finally:
        process.terminate()
        process.wait(10)
    shares = [{t for t in s if t.startswith("[")} for s in seen]
    assert shares[0] and shares[1] and not shares[0] & shares[1], "conversations are split, or all on one replica"
    assert len(shares[0] | shares[1]) == 16 and seen[1].count("after") == 4
    home = 0 if json.dumps([0, "X_Session_Id"]) in shares[0] else 1
    assert "other key, same session" in seen[home], "the key decides where a session was named"
    return f"{len(shares[0])} and {len(shares[1])} of 16 conversations"


def nginx_passes_a_drain_over():
    if not shutil.which("nginx"):
        raise Skip("no nginx")
    draining, well = Replica("--fail-every", "1"), Replica()
    process, port = start_nginx([draining, well])
    try:
        for i in range(8):
            assert ask(port, "drain", X_Session_Id=f"s{i}")[0] == 200, "a replica's 503 reached the client"
    finally:
        process.terminate()
        process.wait(10)
    tried, done = draining.stop(), well.stop()
    assert tried and len(done) == 8, (tried, done)


class Server:
    """quench itself, with the demo model."""

    def __init__(self):
        self.port = free_port()
        self.process = subprocess.Popen([PROGRAM, "serve", os.path.join(ROOT, "models/demo"), "--served-model-name", "demo", "--port", str(self.port),
                                         "--max-num-seqs", "8", "--max-model-len", "1024", "--device", "cpu", "--quiet"],
                                        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/ready", timeout=1).close()
                return
            except OSError:
                time.sleep(0.05)
        self.process.kill()
        raise AssertionError("quench serve is not ready: " + self.process.stderr.read())

    def running(self):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=5) as f:
            return float(re.search(r"^vllm:num_requests_running\S* (\S+)", f.read().decode(), re.M).group(1))

    def end(self):
        """SIGTERM; the exit status once what runs has ended."""
        self.process.terminate()
        return self.process.wait(40)


def a_replica_leaves_under_load():
    if not shutil.which("nginx"):
        raise Skip("no nginx")
    serve_flags()
    servers = [Server(), Server()]
    process, port = start_nginx(servers)
    load = [subprocess.Popen([PROGRAM, "bench", "serve", "--base-url", f"http://127.0.0.1:{port}", "--model", "demo", "--num-prompts", "60", "--request-rate",
                              "15", "--random-input-len", "20", "--random-output-len", "128", "--seed", str(i), "--header", f"X-Session-Id=s{i}", "--json",
                              "--save-detailed", "--quiet"], stdout=subprocess.PIPE, text=True) for i in range(4)]
    try:
        time.sleep(1)
        for _ in range(500):  # whoever is at work leaves
            cut, leaving = max(((s.running(), s) for s in servers), key=lambda x: x[0])
            if cut > 0:
                break
        status = leaving.end()
        results = [json.loads(p.communicate(timeout=120)[0]) for p in load]
    finally:
        process.terminate()
        process.wait(10)
        for s in servers:
            s.end()
    errors = [e for d in results for e in d["errors"] if e]
    assert cut > 0, "it had nothing to do when it left"
    assert not errors, errors[:3]
    assert status == 0, f"the replica that left has status {status}"
    assert all(d["completed"] == 60 and d["total_output_tokens"] == 60 * 128 for d in results)
    return "240 streams, none broken"


def main():
    failed = 0
    for test in (unit, flags_exist, kubernetes, envoy, metrics_exist, nginx, nginx_passes_a_drain_over, a_replica_leaves_under_load):
        try:
            note = test()
            print(f"deploy: {test.__name__:26} ok{'  ' + note if note else ''}", flush=True)
        except Skip as e:
            print(f"deploy: SKIP: {test.__name__}: {e}", flush=True)
        except (AssertionError, KeyError, OSError, ValueError) as e:
            failed += 1
            print(f"deploy: {test.__name__:26} FAILED: {e!r}", flush=True)
    shutil.rmtree(FOLDER, ignore_errors=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
