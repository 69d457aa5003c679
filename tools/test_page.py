#!/usr/bin/env python3
"""The chat page in headless Chromium: what a user sees and can do. Needs the Debian package chromium and nothing else.

python3 tools/test_page.py                 against tests/server/mock_openai.py (about 20 s)
python3 tools/test_page.py --shots FOLDER  keeps screenshots there
python3 tools/test_page.py --url URL       against a running server: loads, asks, stops; what it answers is not judged

Prints a line a test; exit status 1 when one failed, 0 with SKIP where there is no Chromium."""
import argparse
import base64
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zlib

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")


class Browser:
    """Chromium over --remote-debugging-pipe: JSON objects that end in NUL, on descriptors 3 and 4."""

    def __init__(self, program):
        self.profile = tempfile.mkdtemp(prefix="quench-page-")
        (ours_in, theirs_out), (theirs_in, ours_out) = os.pipe(), os.pipe()
        high = [os.dup2(theirs_in, 103), os.dup2(theirs_out, 104)]  # so that neither is 3 or 4 yet
        words = [program, "--headless=new", "--remote-debugging-pipe", "--user-data-dir=" + self.profile, "--no-first-run",
                 "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update",
                 "--no-proxy-server", "--ignore-certificate-errors"]
        if os.geteuid() == 0:
            words.append("--no-sandbox")
        self.process = subprocess.Popen(words, pass_fds=(3, 4), preexec_fn=lambda: (os.dup2(high[0], 3), os.dup2(high[1], 4)),
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for fd in [theirs_in, theirs_out, *high]:
            os.close(fd)
        self.reader, self.writer = ours_in, ours_out
        self.rest, self.number, self.session, self.events = b"", 0, None, []

    def receive(self):
        while b"\0" not in self.rest:
            data = os.read(self.reader, 1 << 20)
            if not data:
                raise RuntimeError("Chromium has ended")
            self.rest += data
        one, self.rest = self.rest.split(b"\0", 1)
        return json.loads(one)

    def call(self, method, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.writer, json.dumps(message).encode() + b"\0")
        while True:
            m = self.receive()
            if m.get("id") == self.number:
                if "error" in m:
                    raise RuntimeError(f"{method}: {m['error']['message']}")
                return m["result"]
            if "method" in m:
                self.events.append(m)

    def open(self):
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(domain + ".enable")

    def goto(self, url):
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def js(self, expression):
        r = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in r:
            raise RuntimeError(f"{expression}: {r['exceptionDetails'].get('exception', {}).get('description')}")
        return r["result"].get("value")

    def wait(self, expression, seconds=10):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.js(expression):
                return
            time.sleep(0.03)
        raise AssertionError(f"after {seconds} s not true: {expression}; the page shows: {self.js('document.body.innerText')[-600:]}")

    def key(self, key, code, modifiers=0, text=None):
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, windowsVirtualKeyCode=code, modifiers=modifiers,
                  **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=code, modifiers=modifiers)

    def type(self, text):
        self.js("document.getElementById('text').focus()")
        self.call("Input.insertText", text=text)

    def say(self, text, seconds=15):
        """Types a message, sends it with Enter, waits for the answer's end."""
        self.type(text)
        self.key("Enter", 13, text="\r")
        self.wait("document.getElementById('stop').hidden && document.querySelector('.message.assistant') !== null", seconds)

    def shot(self, path):
        with open(path, "wb") as f:
            f.write(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def complaints(self):
        return [e["params"]["entry"]["text"] for e in self.events if e["method"] == "Log.entryAdded" and
                e["params"]["entry"]["level"] == "error" and "status of" not in e["params"]["entry"]["text"] and
                "ERR_" not in e["params"]["entry"]["text"]] + \
               [str(e["params"]["exceptionDetails"].get("exception")) for e in self.events if e["method"] == "Runtime.exceptionThrown"]

    def requests(self):
        return [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]

    def close(self):
        try:
            self.session = None
            self.call("Browser.close")
        except (RuntimeError, OSError):
            pass
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
        shutil.rmtree(self.profile, ignore_errors=True)


def png():
    def part(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))
    rows = b"".join(b"\0" + bytes([200, 30, 30]) * 8 for _ in range(8))
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)) + part(b"IDAT", zlib.compress(rows)) + part(b"IEND", b"")


LAST = "[...document.querySelectorAll('.message.assistant')].pop()"


def attach(b, kind):
    """The picture, by paste or drop."""
    event, field = {"paste": ("ClipboardEvent", "clipboardData"), "drop": ("DragEvent", "dataTransfer")}[kind]
    before = b.js("document.querySelectorAll('#pending img').length")
    b.js(f"""(() => {{
        const t = new DataTransfer(), bytes = Uint8Array.from(atob('{base64.b64encode(png()).decode()}'), c => c.charCodeAt(0));
        t.items.add(new File([bytes], 'x.png', {{ type: 'image/png' }}));
        document.body.dispatchEvent(new {event}('{kind}', {{ {field}: t, bubbles: true, cancelable: true }}));
    }})()""")
    b.wait(f"document.querySelectorAll('#pending img').length === {before + 1}")


class Mock:
    def __init__(self, *words):
        self.record = tempfile.NamedTemporaryFile(suffix=".json")
        self.process = subprocess.Popen([sys.executable, os.path.join(ROOT, "tests/server/mock_openai.py"), "--keep", "--record", self.record.name,
                                         "--page", os.path.join(ROOT, "src/server/page/page.html"), *words],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.url = self.process.stdout.readline().strip()

    def stop(self):
        self.process.stdin.close()
        self.process.wait(10)
        with open(self.record.name, encoding="utf-8") as f:
            return json.load(f)


def streams(b, url):
    b.goto(url)
    b.wait("document.getElementById('model').textContent === 'mock'")
    b.type("slow please")
    b.key("Enter", 13, text="\r")
    b.wait(f"{LAST} && {LAST}.querySelector('.body').textContent.includes('word3 ')")
    early = b.js(f"{LAST}.querySelector('.body').textContent")
    assert "word399" not in early and not b.js("document.getElementById('stop').hidden"), "nothing was shown before the end"
    b.js("document.getElementById('stop').click()")
    b.wait("document.getElementById('stop').hidden")
    assert "Stopped" in b.js(f"{LAST}.querySelector('.note').textContent")
    kept = b.js(f"{LAST}.querySelector('.body').textContent")
    time.sleep(0.3)
    assert kept == b.js(f"{LAST}.querySelector('.body').textContent") and "word3 " in kept, "text came after the stop"


def escape_stops(b, url):
    b.type("slow again")
    b.key("Enter", 13, text="\r")
    b.wait(f"{LAST}.querySelector('.body').textContent.includes('word2 ')")
    b.key("Escape", 27)
    b.wait("document.getElementById('stop').hidden")


def figures(b, url):
    b.js("document.getElementById('fresh').click()")
    b.say("hello")
    note = b.js(f"{LAST}.querySelector('.note').textContent")
    for part in ("tokens/s", "first after", "cached", "drafts accepted 75 %"):
        assert part in note, note
    assert "of 4096 tokens" in b.js("document.getElementById('context').textContent")


def thinking_folds(b, url):
    b.say("think first")
    assert b.js(f"{LAST}.querySelector('details').open") is False
    assert b.js(f"{LAST}.querySelector('.thought').textContent") == "step0 step1 step2 step3 step4 "
    assert b.js(f"{LAST}.querySelector('.body').textContent") == "Thought out."
    b.say("think only")
    assert b.js(f"{LAST}.querySelector('details').open") is True and "ended in its thinking" in b.js(f"{LAST}.querySelector('.note').textContent")


def tools_are_shown(b, url):
    b.say("use a tool")
    assert b.js(f"{LAST}.querySelector('details[open] summary').textContent") == "Calls get_weather"
    assert json.loads(b.js(f"{LAST}.querySelector('details[open] pre').textContent")) == {"city": "Oulu"}
    b.js(f"{LAST}.querySelector('form textarea').value = 'snow'; {LAST}.querySelector('form').requestSubmit()")
    b.wait("document.getElementById('stop').hidden && document.querySelector('.message.tool') !== null")
    b.wait(f"{LAST}.querySelector('.body').textContent.includes('snow')")


def markup_is_safe(b, url):
    b.say("markup")
    body = LAST + ".querySelector('.body')"
    assert b.js(f"{body}.querySelector('h2').textContent") == "Title"
    assert b.js(f"{body}.querySelector('strong').textContent + {body}.querySelector('em').textContent") == "boldslanted"
    assert b.js(f"[...{body}.querySelectorAll('a')].map(a => a.href + a.rel).join()") == "https://example.org/xnoopener noreferrer"
    assert b.js(f"{body}.querySelector('pre').textContent").startswith("print('<b>')\nx = 1")
    assert b.js(f"{body}.querySelectorAll('ul li').length") == 3 and b.js(f"{body}.querySelectorAll('table td').length") == 2
    assert b.js(f"{body}.querySelectorAll('img, script').length") == 0 and b.js("window.hacked") is None
    assert "<img src=x" in b.js(f"{body}.textContent")


def pictures(b, url):
    b.js("document.getElementById('fresh').click()")
    with tempfile.NamedTemporaryFile(suffix=".png") as f:
        f.write(png())
        f.flush()
        root = b.call("DOM.getDocument")["root"]["nodeId"]
        node = b.call("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
        b.call("DOM.setFileInputFiles", files=[f.name], nodeId=node)
        b.wait("document.querySelectorAll('#pending img').length === 1")
    attach(b, "paste")
    attach(b, "drop")
    b.wait("document.querySelectorAll('#pending img').length === 3")
    assert b.js("[...document.querySelectorAll('#pending img')].every(i => i.complete && i.naturalWidth === 8)"), "pictures do not load"
    b.js("document.querySelector('#pending button').click()")
    b.wait("document.querySelectorAll('#pending img').length === 2")
    b.say("what is it")
    assert "(2 pictures" in b.js(f"{LAST}.querySelector('.body').textContent")
    assert b.js("document.querySelectorAll('.message.user img').length") == 2 and b.js("document.querySelectorAll('#pending img').length") == 0


def edit_and_again(b, url):
    b.js("document.getElementById('fresh').click()")
    b.say("first")
    b.say("second")
    assert "3 messages" in b.js(f"{LAST}.querySelector('.body').textContent")
    b.js(f"[...{LAST}.querySelectorAll('.tools button')].find(x => x.textContent === 'Again').click()")
    b.wait("document.getElementById('stop').hidden")
    assert b.js("document.querySelectorAll('.message').length") == 4
    b.js("document.querySelector('.message.user .tools button[aria-label=\"Edit this message\"]').click()")
    assert b.js("document.getElementById('text').value") == "first"
    b.js("document.getElementById('text').value = ''")
    b.say("changed")
    assert b.js("document.querySelectorAll('.message').length") == 2
    assert "changed" in b.js(f"{LAST}.querySelector('.body').textContent")


def settings_are_sent(b, url):
    b.js("document.getElementById('gear').click()")
    for field, value in (("system", "Be brief."), ("temperature", "0.25"), ("tokens", "3"), ("thinking", "off")):
        b.js(f"{{ const f = document.getElementById('{field}'); f.value = '{value}'; f.dispatchEvent(new Event('change')); }}")
    b.js("document.getElementById('fresh').click()")
    b.say("settings go along")
    assert "Cut at the most tokens" in b.js(f"{LAST}.querySelector('.note').textContent")
    b.goto(url + "/")
    assert b.js("document.getElementById('temperature').value") == "0.25", "settings were lost by a reload"
    assert b.js("document.querySelectorAll('.message').length") == 2, "the conversation was lost by a reload"
    assert b.js("localStorage.length") == 0 and b.js("document.cookie") == ""
    b.js("for (const f of ['system', 'temperature', 'tokens', 'thinking']) document.getElementById(f).value = ''; sessionStorage.clear()")


def errors_are_plain(b, url):
    b.say("error please")
    assert b.js(f"{LAST}.querySelector('.error').textContent") == "messages[0]: expected something else, found 'error'"
    b.say("cut off")
    assert "ended before" in b.js(f"{LAST}.querySelector('.error').textContent") or "does not answer" in b.js(f"{LAST}.querySelector('.error').textContent")


def progress(b, url):
    b.type("progress")
    b.key("Enter", 13, text="\r")
    b.wait(f"{LAST}.querySelector('.note').textContent === 'Reading the prompt, 200 of 300 tokens'")
    b.wait("document.getElementById('stop').hidden")


def key_is_asked_for(b, url):
    locked = Mock("--key", "secret")
    try:
        b.goto(locked.url)
        b.wait("document.activeElement.id === 'key'")
        assert "Invalid API key" in b.js("document.getElementById('log').textContent")
        b.js("{ const f = document.getElementById('key'); f.value = 'secret'; f.dispatchEvent(new Event('change')); }")
        b.wait("document.getElementById('model').textContent === 'mock'")
        b.say("hello")
        assert "You said" in b.js(f"{LAST}.querySelector('.body').textContent")
    finally:
        locked.stop()


def phone(b, url, shots=None):
    b.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True)
    b.goto(url)
    b.js("document.getElementById('fresh').click()")
    b.say("markup on a phone")
    for scheme in ("light", "dark"):
        b.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        if shots:
            b.shot(os.path.join(shots, f"phone-{scheme}.png"))
    ground = b.js("getComputedStyle(document.body).backgroundColor")
    assert ground == "rgb(22, 24, 27)", ground
    for opened in (False, True):
        if opened:
            b.js("document.getElementById('gear').click()")
        wide = b.js("[...document.querySelectorAll('body, body *')].filter(e => !e.closest('pre, .table, .unseen, select') && "
                    "e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.tagName + '.' + e.className).join(' ')")
        assert b.js("document.documentElement.scrollWidth <= innerWidth && document.getElementById('log').scrollWidth <= document.getElementById('log').clientWidth"), wide
        assert not wide, wide
        if shots and opened:
            b.shot(os.path.join(shots, "phone-settings.png"))
    assert b.js("document.getElementById('send').getBoundingClientRect().bottom <= innerHeight"), "Send is off the screen"
    b.js("document.getElementById('gear').click()")
    b.call("Emulation.clearDeviceMetricsOverride")


def accessible(b, url):
    """Every control has a name, for those who hear the page; all can be reached by the keyboard."""
    b.call("Accessibility.enable")
    nodes = b.call("Accessibility.getFullAXTree")["nodes"]
    control = {"button", "textbox", "combobox", "spinbutton", "link"}
    bare = [n["role"]["value"] for n in nodes if not n.get("ignored") and n.get("role", {}).get("value") in control and not n.get("name", {}).get("value")]
    assert not bare, bare
    b.js("document.getElementById('text').focus()")
    seen = []
    for _ in range(12):
        b.key("Tab", 9)
        seen.append(b.js("document.activeElement.id || document.activeElement.textContent"))
    for want in ("pick", "send", "fresh", "gear"):
        assert want in seen, seen


def quiet(b, url):
    assert not b.complaints(), b.complaints()
    elsewhere = [u for u in b.requests() if not u.startswith(("http://127.0.0.1", "data:", "blob:", "about:"))]
    assert not elsewhere, elsewhere


TESTS = [streams, escape_stops, figures, thinking_folds, tools_are_shown, markup_is_safe, pictures, edit_and_again, settings_are_sent,
         errors_are_plain, progress, phone, accessible, key_is_asked_for, quiet]


def sent(record):
    """What the mock was asked, by the same run: settings as fields, nothing of the unset ones."""
    bodies = {json.dumps(e["body"]["messages"][-1]["content"]): e["body"] for e in record}
    with_settings, without = bodies['"settings go along"'], bodies['"hello"']
    assert with_settings["temperature"] == 0.25 and with_settings["max_completion_tokens"] == 3
    assert with_settings["chat_template_kwargs"] == {"enable_thinking": False}
    assert with_settings["messages"][0] == {"role": "system", "content": "Be brief."}
    assert set(without) == {"model", "messages", "stream", "stream_options"}, set(without)
    tool = next(e["body"]["messages"] for e in record if e["body"]["messages"][-1]["role"] == "tool")
    assert tool[-1] == {"role": "tool", "tool_call_id": "call_1", "content": "snow"} and tool[-2]["tool_calls"][0]["id"] == "call_1"
    left = [e for e in record if json.dumps(e["body"]["messages"][-1]["content"]).startswith('"slow')]
    assert left and all(e["left"] for e in left), "a stopped answer was still being read"


def real(b, url):
    """A server whose answers are not known beforehand."""
    def said():
        error = b.js(f"{LAST}.querySelector('.error').textContent")
        assert not error, error
        note = b.js(f"{LAST}.querySelector('.note').textContent")
        print("   ", repr(b.js(f"{LAST}.querySelector('.body').textContent")[:100]), "|", note)
        return note
    b.goto(url)
    b.wait("document.getElementById('models').value !== ''")
    b.say("The sky is blue and the sea is deep. " * 20 + "What is the capital of Finland?", 120)
    assert " out" in said()
    b.say("And what is the capital of France?", 120)
    assert "cached" in said(), "the second turn found nothing in the prefix cache (is it off?)"
    attach(b, "paste")
    b.say("What color is the shape?", 120)
    said()
    b.js("{ const f = document.getElementById('system'); f.value = 'Count from one to ten thousand. '.repeat(40); }")
    b.type("Count.")
    b.key("Enter", 13, text="\r")
    b.wait("!document.getElementById('stop').hidden")
    b.js("document.getElementById('stop').click()")
    b.wait("document.getElementById('stop').hidden")
    b.wait("fetch('metrics').then(r => r.text()).then(t => /num_requests_running[^\\n]* 0(\\.0)?\\n/.test(t))", 5)
    quiet(b, url)


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--url")
    arguments.add_argument("--shots")
    options = arguments.parse_args()
    program = shutil.which("chromium") or shutil.which("chromium-headless-shell") or shutil.which("google-chrome")
    if not program:
        print("SKIP: the chat page in a browser: no Chromium here (apt-get install chromium)")
        return 0
    if options.shots:
        os.makedirs(options.shots, exist_ok=True)
    mock = None if options.url else Mock()
    browser, failed = Browser(program), 0
    try:
        browser.open()
        for test in [real] if options.url else TESTS:
            begin = time.monotonic()
            try:
                test(browser, options.url or mock.url, *([options.shots] if test is phone else []))
                word = "ok"
            except (AssertionError, RuntimeError) as e:
                failed += 1
                word = f"FAILED: {e}"
            print(f"{test.__name__:24} {time.monotonic() - begin:5.1f} s  {word}", flush=True)
        if mock:
            sent(mock.stop())
            print("what was sent            ok")
    finally:
        browser.close()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
