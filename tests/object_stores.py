"""Object stores on a port of this machine: Amazon's (s3://) and Google's (gs://).

Each yields the environment in which clients of that store speak with it; a bucket
called "bucket" is there. None checks credentials.
"""

import contextlib
import logging
import urllib.request
from http import HTTPStatus
from urllib.parse import parse_qs, urlsplit

import pytest


@contextlib.contextmanager
def s3():
    """Moto's store."""
    moto = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        address = f"http://{host}:{port}"
        urllib.request.urlopen(
            urllib.request.Request(f"{address}/bucket", method="PUT")
        ).close()
        yield {
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        server.stop()


@contextlib.contextmanager
def gs():
    """The store of gcp-storage-emulator, with what TensorStore needs beside it."""
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    objects = pytest.importorskip("gcp_storage_emulator.handlers.objects")
    pytest.importorskip("gcsfs")
    logging.getLogger("gcp_storage_emulator").setLevel(logging.ERROR)
    plain = objects.download

    def download(request, response, storage, *args, **kwargs):
        plain(request, response, storage, *args, **kwargs)
        generation = generation_of(storage, *request.params.values())
        response["x-goog-generation"] = generation

    class Handler(emulator.RequestHandler):
        def do_POST(self):
            url = urlsplit(self.path)
            query = {key: values[0] for key, values in parse_qs(url.query).items()}
            wanted = query.get("ifGenerationMatch")
            if wanted is not None and "name" in query:
                bucket = url.path.rpartition("/b/")[2].partition("/")[0]
                if generation_of(self.storage, bucket, query["name"]) != wanted:
                    self.rfile.read(int(self.headers.get("Content-Length", 0)))
                    self.send_response(HTTPStatus.PRECONDITION_FAILED)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
            super().do_POST()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objects, "download", download)
        patch.setattr(emulator, "RequestHandler", Handler)
        server = emulator.create_server(
            "127.0.0.1", 0, in_memory=True, default_bucket="bucket"
        )
        server.start()
        try:
            http = server._api._httpd
            http.handle_error = lambda *_: None  # a client that hangs up early
            address = f"http://127.0.0.1:{http.server_port}"
            yield {
                "STORAGE_EMULATOR_HOST": address,
                "TENSORSTORE_GCS_HTTP_URL": address,
                "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
                "GOOGLE_CLOUD_PROJECT": "project",
            }
        finally:
            server.stop()


def generation_of(storage, bucket, name):
    """The generation of an object; "0" where there is none."""
    try:
        return storage.get_file_obj(bucket, name)["generation"]
    except Exception:  # of the emulator's own
        return "0"
