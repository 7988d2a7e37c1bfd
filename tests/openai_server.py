"""An OpenAI-compatible endpoint on loopback that misbehaves as told: /chat/completions."""

import json
import re
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

ANIMALS = ("elephant", "penguin", "kangaroo", "octopus")
KEY = "sk-test-0123456789abcdef"


def rewrite(caption, position=0):
    """The caption with another last word: what a model that works would answer."""
    words = caption.split()
    return " ".join([*words[:-1], ANIMALS[position % len(ANIMALS)]])


def completion(content, finish="stop", **message):
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": content, **message}}
    usage = {"prompt_tokens": 300, "completion_tokens": 40, "total_tokens": 340}
    return {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}


class OpenAIServer:
    """``with OpenAIServer(plan) as server: server.base_url``.

    ``plan``: {caption: behaviours}; a list is used up call by call and then the answers are good, a string is for every
    call. Behaviours: "ok"; "slow" (good, half a second late); "<status>" or "<status>:<Retry-After>"; "hang"; "reset";
    "drip" (a byte now and then); "body" (JSON of the body cut off), "html"; "cut", "length" (its message too),
    "empty" (no choices), "schema" (another form), "null", "refusal", "sorry", "filter", "chatter", "fence", "unicode",
    "thinks" (reasons first, with drafts), "thoughts" (reasons, and is cut off),
    "same" (the caption itself), "few" (one too few), "no-usage"; "quota", "policy", "bad" (a 400), "echo-key" (a 500
    that holds the key), "tokens" (a 400 unless max_completion_tokens is used).
    ``latency``: seconds before each answer. ``formats``: the response formats taken. ``models``: those known.

    ``responses``: in place of all that, a function of the body to a completion, or to (status, JSON or bytes).

    ``log``: a dict for each request: caption, time, path, body, sent (whether a good answer was sent in full).
    ``most``: the most completions in flight at once.
    """

    def __init__(self, plan=None, latency=0.0, key=KEY, formats=("json_schema", "json_object", "text"), models=("m",),
                 hang=30.0, responses=None):  # fmt: skip
        self.plan = {k: v if isinstance(v, str) else list(v) for k, v in (plan or {}).items()}
        self.latency, self.key, self.formats, self.models = latency, key, formats, models
        self.hang, self.log, self.responses = hang, [], responses
        self.flying = self.most = 0
        self.lock, self.over = threading.Lock(), threading.Event()

    def __enter__(self):
        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request, address):
                pass  # clients that hang up

        self.http = Server(("127.0.0.1", 0), type("Bound", (Handler,), {"owner": self}))
        self.base_url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.http.shutdown()
        self.http.server_close()

    def calls(self, caption):
        """The logged completions for a caption."""
        return [entry for entry in self.log if entry.get("caption") == caption]

    def behaviour(self, caption):
        with self.lock:
            plan = self.plan.get(caption, "ok")
            return plan if isinstance(plan, str) else plan.pop(0) if plan else "ok"

    def respond(self, body):
        """The log's entry of a completion, and (status, headers, JSON or bytes, whether good), "hang" or "reset"."""
        if self.responses:
            got = self.responses(body)
            status, data = got if isinstance(got, tuple) else (200, got)
            return {"time": time.monotonic(), "behaviour": None}, (status, {}, data, False)
        text = body["messages"][-1]["content"]
        caption = json.JSONDecoder(strict=False).raw_decode(text.partition("Caption: ")[2])[0]
        kinds = re.findall(r"^\d+\. (\w+):", text, re.M)
        behaviour = self.behaviour(caption)
        entry = {"caption": caption, "time": time.monotonic(), "body": body, "sent": False, "behaviour": behaviour}
        with self.lock:
            self.log.append(entry)
        return entry, self._response(behaviour, body, caption, kinds)

    def _response(self, behaviour, body, caption, kinds):
        def error(status, message, code=None, headers=None):
            return status, headers or {}, {"error": {"message": message, "type": "t", "code": code}}, False

        taken = body.get("response_format", {"type": "text"})["type"]
        if body["model"] not in self.models:
            return error(404, f"The model {body['model']} does not exist", "model_not_found")
        if taken not in self.formats:
            return error(400, f"Invalid parameter: 'response_format' of type {taken} is not supported with this model.")
        if behaviour in ("hang", "reset", "drip"):
            return behaviour
        if match := re.fullmatch(r"(\d{3})(?::(.+))?", behaviour):
            headers = {"Retry-After": match[2]} if match[2] else {}
            return error(int(match[1]), "not now", headers=headers)
        # A model that is told not to repeat itself gives something else.
        avoid = body["messages"][-1]["content"].partition("again: ")[2]
        seen = json.JSONDecoder().raw_decode(avoid)[0] if avoid else []
        fresh = [r for r in (rewrite(caption, n) for n in range(len(ANIMALS))) if r not in seen]
        captions = [{"kind": kind, "caption": text} for kind, text in zip(kinds, fresh * 4)]
        good = json.dumps({"captions": captions})
        match behaviour:
            case "body":
                return 200, {}, json.dumps(completion(good)).encode()[:-40], False
            case "html":
                return 200, {"Content-Type": "text/html"}, b"<html>welcome</html>", False
            case "quota":
                return error(429, "You exceeded your current quota", "insufficient_quota")
            case "bad":
                return error(400, "Invalid value for 'temperature'.")
            case "policy":
                return error(400, "The response was filtered", "content_filter")
            case "echo-key":
                return error(500, f"upstream refused Bearer {self.key} " + "x" * 400)
            case "tokens":
                if "max_tokens" in body:
                    return error(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
            case "empty":
                return 200, {}, {**completion(good), "choices": []}, False
            case "no-usage":
                return 200, {}, {**completion(good), "usage": None}, True
        content, finish, message = good, "stop", {}
        match behaviour:
            case "cut":
                content = good[: len(good) // 2]
            case "length":
                content, finish = good[: len(good) // 2], "length"
            case "schema":
                content = json.dumps({"captions": [{"type": "existence", "text": rewrite(caption)}]})
            case "null":
                content = None
            case "refusal":
                content, message = None, {"refusal": "I cannot help with that."}
            case "sorry":
                content = "I'm sorry, but I can't assist with that request."
            case "filter":
                content, finish = "", "content_filter"
            case "chatter":
                content = f"Sure! [Here] is what {{you}} asked for:\n{good}\nLet me know (if {{more}} is needed)!"
            case "thinks":
                content = f"<think>{good.replace('caption', 'draft')} {{}} hm</think>\n{good}"
            case "thoughts":
                content, finish = f"<think>Perhaps {good}? But", "length"
            case "fence":
                content = f"```json\n{good}\n```"
            case "unicode":
                captions = [{**c, "caption": unicode(c["caption"])} for c in captions]
                content = json.dumps({"captions": captions}, ensure_ascii=False)
            case "same":
                content = json.dumps({"captions": [{"kind": kind, "caption": caption} for kind in kinds]})
            case "few":
                content = json.dumps({"captions": captions[:-1]})
        return 200, {}, completion(content, finish, **message), content == good

    def results(self, requests):
        """The result lines of a file of requests, as OpenAI's Batch API and ``vllm run-batch`` write them."""
        lines = []
        for request in map(json.loads, requests.splitlines()):
            assert (request["method"], request["url"]) == ("POST", "/v1/chat/completions")
            entry, response = self.respond(request["body"])
            entry["custom_id"] = request["custom_id"]
            if isinstance(response, str):
                response = 500, {}, {"error": {"message": "server error", "code": None}}, False
            status, _, body, entry["sent"] = response
            reply = {"status_code": status, "request_id": "r", "body": body}
            reply = {"id": "b", "custom_id": request["custom_id"], "response": reply, "error": None}
            lines.append(json.dumps(reply, ensure_ascii=False) + "\n")
        return lines


def unicode(caption):
    """With an emoji of several code points, right-to-left letters, a combining accent, and a line separator."""
    return caption + " 👩‍🚀 פיל e\u0301\u2028x"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer takes 40 ms
    owner: OpenAIServer

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.handle_one(b"")

    def do_POST(self):
        self.handle_one(self.rfile.read(int(self.headers["Content-Length"])))

    def handle_one(self, data):
        owner, path = self.owner, urlsplit(self.path).path.removeprefix("/v1")
        if self.headers["Authorization"] != f"Bearer {owner.key}":
            got = self.headers["Authorization"]
            return self.send(
                401, {"error": {"message": f"Incorrect API key provided: {got}", "code": "invalid_api_key"}}
            )
        if path == "/chat/completions":
            return self.complete(json.loads(data))
        owner.log.append({"path": path, "time": time.monotonic(), "method": self.command})
        return self.send(404, {"error": {"message": "Not found"}})

    def complete(self, body):
        owner = self.owner
        with owner.lock:
            owner.flying += 1
            owner.most = max(owner.most, owner.flying)
        try:
            entry, response = owner.respond(body)
            owner.over.wait(owner.latency + (entry["behaviour"] == "slow") / 2)
        finally:
            with owner.lock:
                owner.flying -= 1
        self.reply(response)
        entry["sent"] = not isinstance(response, str) and response[3]

    def reply(self, response):
        if response == "hang":
            self.owner.over.wait(self.owner.hang)
            self.close_connection = True
        elif response == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
        elif response == "drip":
            self.send(200, b" " * 1000, drip=True)
        elif isinstance(response, tuple):
            status, headers, body, _ = response
            self.send(status, body, headers)
        else:
            self.send(200, response)

    def send(self, status, body, headers=None, drip=False):
        data = body if isinstance(body, bytes) else json.dumps(body, ensure_ascii=False).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {}), "Content-Length": len(data)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        for part in [data[i : i + 1] for i in range(len(data))] if drip else [data]:
            self.wfile.write(part)
            self.wfile.flush()
            self.owner.over.wait(0.05 if drip else 0)
