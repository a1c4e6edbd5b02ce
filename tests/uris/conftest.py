"""moto's S3 server in this process, with a bucket."""

import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import fsspec
import pytest
from moto.server import ThreadedMotoServer
from safetensors.torch import load
from torch import Tensor

from tests.uris.served import MODEL, SECRET, saved


@dataclass(frozen=True)
class Bucket:
    """The bucket `bucket`, as its owner sees it."""

    endpoint: str
    s3: Any

    def put(self, key: str, path: Path) -> None:
        self.s3.upload_file(str(path), "bucket", key)

    def get(self, key: str) -> dict[str, Tensor]:
        return load(self.s3.get_object(Bucket="bucket", Key=key)["Body"].read())

    def keys(self) -> list[str]:
        return [found["Key"] for found in self.s3.list_objects_v2(Bucket="bucket")["Contents"]]

    def uploads(self) -> list[str]:
        found = self.s3.list_multipart_uploads(Bucket="bucket")
        return [upload["UploadId"] for upload in found.get("Uploads", [])]

    def need_credentials(self, after: str) -> None:
        """Lets so many calls through before credentials are looked at."""
        url = f"{self.endpoint}/moto-api/reset-auth"
        kind = {"Content-Type": "text/plain"}
        request = urllib.request.Request(url, after.encode(), kind)
        urllib.request.urlopen(request, timeout=300).close()


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    # What moto keeps is this process's, and so of all modules.
    urllib.request.urlopen(f"{endpoint}/moto-api/reset", b"", timeout=300).close()
    with pytest.MonkeyPatch.context() as environment:
        for name, value in environment_of(endpoint).items():
            environment.setenv(name, value)
        # fsspec caches a file system for each thread, with the endpoint of an earlier module.
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        s3 = boto3.client("s3")
        s3.create_bucket(Bucket="bucket")
        made = Bucket(endpoint, s3)
        model = saved(tmp_path_factory.mktemp("s3") / "model.safetensors", MODEL)
        for folder in ("models", "models-private"):
            made.put(f"{folder}/model.safetensors", model)
        yield made
        s3.close()
    moto.stop()


def environment_of(endpoint: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
