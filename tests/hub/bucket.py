"""An object store on localhost: the S3 of moto, with injected faults."""

import os
import re
import threading
from contextlib import contextmanager

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

NAMES = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_MAX_ATTEMPTS": "1",
}


class Bucket:
    """An S3 application that records its requests and injects faults: (pattern of method and path, fault).

    A fault is a status such as 503, or `"cut"`: half of the body.
    """

    def __init__(self):
        self.asked, self.faults = [], []
        self._app = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()

    def __call__(self, environ, start_response):
        said = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}"
        with self._lock:
            self.asked.append(said)
            at = next((n for n, (pattern, _) in enumerate(self.faults) if re.search(pattern, said)), None)
            what = None if at is None else self.faults.pop(at)[1]
        if isinstance(what, int):
            start_response(f"{what} Injected", [("Content-Length", "0"), ("Retry-After", "0")])
            return [b""]
        body = self._app(environ, start_response)
        if what != "cut":
            return body
        whole = b"".join(body)
        return [whole[: len(whole) // 2]]


@contextmanager
def serving():
    """Yield a store with one bucket, `data`; environment variables point s3fs to it."""
    import boto3
    import fsspec
    import moto.backends

    bucket = Bucket()
    server = make_server("127.0.0.1", 0, bucket, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.port}"
    before = {name: os.environ.get(name) for name in (*NAMES, "AWS_ENDPOINT_URL")}
    os.environ.update({**NAMES, "AWS_ENDPOINT_URL": address})
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    try:
        # What moto holds is the process's.
        moto.backends.get_backend("s3").reset()
        boto3.client("s3", endpoint_url=address).create_bucket(Bucket="data")
        yield bucket
    finally:
        server.shutdown()
        server.server_close()
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
