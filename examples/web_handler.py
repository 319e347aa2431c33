"""Answer over HTTP, piece by piece as server-sent events, with the standard library only.

    python examples/web_handler.py [MODEL] [PORT]
    curl -N localhost:8000/chat -d '{"messages": [{"role": "user", "content": "What is 17 + 25?"}]}'

The body holds those arguments of `Model.chat` that a client may set. Requests run concurrently: their forward passes
take turns, token by token. MODEL is a hub id or a directory; the default is the small model beside this file.
"""

import json
import sys
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import npqwen

MODEL = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("tiny-qwen3")
PORT = int(sys.argv[2]) if len(sys.argv) > 2 else 8000
ALLOWED = {"messages", "tools", "thinking", "thinking_budget", "max_tokens", "temperature", "seed"}
LARGEST_BODY = 1 << 20


class Server(ThreadingHTTPServer):
    daemon_threads = True
    model: npqwen.Model


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        if self.path != "/chat":
            self.send_error(404)
            return
        try:
            stream = self.server.model.stream_chat(**self.arguments())
        except (npqwen.NpqwenError, ValueError, RecursionError) as error:  # all checks are made before it runs
            self.send_error(400, explain=str(error))
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Cache-Control", "no-cache")
        self.end_headers()
        with closing(stream):  # a client that hangs up ends the answer at the next piece
            try:
                for event in stream:
                    self.send(event)
            except ConnectionError:
                pass

    def arguments(self) -> dict[str, Any]:
        size = int(self.headers.get("Content-Length", 0))
        if not 0 < size <= LARGEST_BODY:
            raise ValueError(f"the body has {size} bytes; the limit is {LARGEST_BODY}")
        body = json.loads(self.rfile.read(size))
        if not isinstance(body, dict) or "messages" not in body or body.keys() - ALLOWED:
            raise ValueError(f"the body must be an object with messages and any of {', '.join(sorted(ALLOWED))}")
        return body

    def send(self, event: npqwen.Event) -> None:
        match event:
            case npqwen.Reasoning(text):
                data: dict[str, Any] = {"reasoning": text}
            case npqwen.Text(text):
                data = {"text": text}
            case npqwen.ToolCall(name, arguments, id):
                data = {"tool_call": {"id": id, "name": name, "arguments": arguments}}
            case npqwen.Finish(reply):
                data = {"finish_reason": reply.finish_reason, "messages": reply.messages}
            case _:
                return
        self.wfile.write(f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode())


def main() -> None:
    with npqwen.load(MODEL, bits=4) as model, Server(("127.0.0.1", PORT), Handler) as server:
        server.model = model
        print(f"listening on http://127.0.0.1:{server.server_port}/chat", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
