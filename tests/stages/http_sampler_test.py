"""Another sampler at the seam of `Rollouts`: weights go over HTTP, completions come."""

import concurrent.futures
import http.server
import io
import threading
import urllib.request

import jax
import numpy as np
import pytest

from stagecraft import metrics, sharding, train
from stagecraft.data.dataset import Dataset
from stagecraft.models import sampling
from stagecraft.models.transformer import Transformer
from stagecraft.stages import rollout
from tests.stages import cases

STEPS = 3
PROMPTS = ("prompt_ids", "prompt_mask")


def packed(arrays):
    data = io.BytesIO()
    np.savez(data, **arrays)
    return data.getvalue()


def unpacked(data):
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        return dict(file)


class Server(http.server.HTTPServer):
    """Samples with the weights that were sent to it last; it knows the model's shape.

    Attributes:
        sent: how often weights were sent.
    """

    def __init__(self, settings):
        super().__init__(("127.0.0.1", 0), Handler)
        own = Transformer(cases.CONFIG, jax.random.key(99))
        self.leaves, self.form = jax.tree.flatten(own)
        self.settings, self.sent = settings, 0

    def weights(self, arrays):
        self.leaves, self.sent = list(arrays.values()), self.sent + 1
        return {}

    def sample(self, arrays):
        model = jax.tree.unflatten(self.form, self.leaves)
        prompts, key = (arrays[k] for k in PROMPTS), arrays["key"]
        with jax.set_mesh(cases.single()):
            key = jax.random.wrap_key_data(key)
            answers = sampling.generate(model, *prompts, key, **self.settings)
        return jax.device_get(answers._asdict())


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        arrays = unpacked(self.rfile.read(int(self.headers["Content-Length"])))
        method = getattr(self.server, self.path.strip("/"))
        data = packed(method(arrays))
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words):
        pass


class Client:
    """`Rollouts` that a server samples; one thread, so that requests go in turn."""

    def __init__(self, port, rollouts, mesh):
        self.url, self.mesh = f"http://127.0.0.1:{port}", mesh
        self.thread = concurrent.futures.ThreadPoolExecutor(1)
        self.rollouts = rollouts._replace(
            sample=self.sample, begin=self.begin, finish=self.finish
        )

    def post(self, path, arrays):
        request = urllib.request.Request(f"{self.url}/{path}", packed(arrays))
        with urllib.request.urlopen(request, timeout=60) as answer:
            return unpacked(answer.read())

    def begin(self, policy, raw, key):
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(policy)]
        arrays = {k: np.asarray(raw[k]) for k in PROMPTS}
        arrays["key"] = np.asarray(jax.random.key_data(key))

        def ask():
            self.post("weights", {str(i): leaf for i, leaf in enumerate(leaves)})
            return self.post("sample", arrays)

        return raw, self.thread.submit(ask)

    def finish(self, begun):
        raw, answer = begun
        samples = rollout.continued(raw, **answer.result())
        return sharding.shard_batch(jax.device_get(samples), self.mesh)

    def sample(self, policy, raw, key):
        return self.finish(self.begin(policy, raw, key))


@pytest.mark.parametrize(("kind", "staleness"), [("policy", 1), ("group_policy", 0)])
def test_a_sampler_over_http_changes_no_number(tmp_path, kind, staleness):
    changes = dict(steps=STEPS, staleness=staleness, every=dict(log=1))
    # Few enough tokens that no rollout is cut.
    changes["sampling"] = dict(max_new_tokens=rollout.LEAST, temperature=0.7)
    settings = changes["sampling"] | dict(stop_ids=(cases.STOP,))
    settings["samples"] = 2 if kind == "group_policy" else 1
    servers = []

    def elsewhere(config, context, **samples):
        server = Server(settings)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        rollouts = real(config, context, **samples)
        return Client(server.server_port, rollouts, context.mesh).rollouts

    real, rows = rollout.make, []
    for where in (real, elsewhere):
        folder = tmp_path / where.__name__
        with pytest.MonkeyPatch.context() as patch, jax.set_mesh(cases.single()):
            patch.setattr(rollout, "make", where)
            stage, raw, config = cases.stage(kind, cases.single(), **changes)
            data = Dataset([(raw, config.batch_size)], seed=0)
            key = jax.random.key(3)
            train.train(stage, config, data, folder, name="x", key=key)
        rows.append(metrics.read(folder / "metrics.jsonl"))
        for row in rows[-1]:
            row.pop("seconds")
    (server,) = servers
    server.shutdown()
    server.server_close()
    assert server.sent == STEPS
    assert rows[0] == rows[1] and len(rows[0]) == STEPS
