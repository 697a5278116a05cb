"""A model that is served on loopback, in this process, for tests to ask."""

import json
import threading
import time

import httpx
import jax
import uvicorn

from stagecraft.models.language import Language
from stagecraft.models.transformer import Transformer
from stagecraft.serve import listening, model_app
from stagecraft.serve.engine import Engine
from stagecraft.text import tokenizer as tokenizers
from tests import tiny

CONTEXT = 160


def language():
    """A tiny model whose tokens are bytes."""
    tokenizer = tokenizers.load("bytes")
    config = tiny.config(vocab_size=tokenizer.vocab_size, max_length=CONTEXT, layers=2)
    return Language(Transformer(config, jax.random.key(1)), tokenizer, batch_size=4)


class Live:
    """A server of a model in a thread, and a client of it.

    Attributes:
        language, engine: what it serves, and what completes texts.
        url: http://127.0.0.1:PORT/v1.
        client: asks under it.
    """

    def __init__(self, language, *, rows=4, **settings):
        self.language = language
        self.engine = Engine(language, tiny.single(), rows=rows)
        self.bound = listening.bind("127.0.0.1", 0)
        port = self.bound.getsockname()[1]
        settings = dict(name="tiny", in_turns=True, port=port) | settings
        app = model_app.app(language, self.engine, **settings)
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        run = dict(sockets=[self.bound])
        self.thread = threading.Thread(target=self.server.run, kwargs=run)
        self.thread.start()
        self.url = f"http://127.0.0.1:{port}/v1"
        self.client = httpx.Client(base_url=self.url, timeout=120)

    def ask(self, path="completions", **body):
        """The answer to a request that is not refused."""
        answer = self.client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def stream(self, path="completions", **body):
        """The chunks of a streamed answer."""
        chunks = []
        with self.client.stream("POST", path, json=body | {"stream": True}) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            for line in answer.iter_lines():
                if line:
                    assert line.startswith("data: ")
                    chunks.append(line.removeprefix("data: "))
        assert chunks.pop() == "[DONE]"
        return [json.loads(chunk) for chunk in chunks]

    def idle(self, seconds=10.0):
        """Whether nothing is left to complete, after some time at most."""
        end = time.monotonic() + seconds
        while self.engine.busy() and time.monotonic() < end:
            time.sleep(0.01)
        return not self.engine.busy()

    def close(self):
        self.client.close()
        self.server.should_exit = True
        self.thread.join()
        self.engine.close()
        self.bound.close()
