"""Records in a bucket: ArrayRecord's own reader asks a server on this computer, as it asks Cloud Storage.

dataset.json goes by etils.epath, whose library for buckets (gcsfs) is not needed here: a folder stands in its place.
"""

import http.server
import json
import pathlib
import pickle
import shutil
import sys
import threading
import urllib.parse

import numpy as np
import pytest
from etils.epath import backend, gpath

from skyjax.cli import main
from skyjax.errors import UserError
from skyjax.input.loader import open_source
from skyjax.input.records import RecordSource


class Server(http.server.ThreadingHTTPServer):
    """Objects of one bucket by the JSON interface of Cloud Storage: whole, or a range of bytes."""

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.asked = folder, []

    def handle_error(self, request, client_address):
        pass  # the reader hangs up when it has what it wants


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        place = urllib.parse.urlsplit(self.path)
        name = urllib.parse.unquote(place.path.removeprefix("/storage/v1/b/my-bucket/o/"))
        self.server.asked.append(name)
        path = self.server.folder / name
        if not path.is_file():
            return self.answer(404, b'{"error": {"code": 404, "message": "not found"}}')
        data = path.read_bytes()
        if "alt=media" not in place.query:
            return self.answer(200, json.dumps({"name": name, "size": str(len(data)), "generation": "1"}).encode())
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        start = int(first) if first else max(len(data) - int(last), 0)
        stop = min(int(last) + 1, len(data)) if first and last else len(data)
        return self.answer(206, data[start:stop], {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})

    def answer(self, code, data, more=()):
        self.send_response(code)
        for name, value in {"Content-Length": str(len(data)), "x-goog-generation": "1", **dict(more)}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


class Folder(backend._OsPathBackend):
    """epath's local files, for paths that begin with the bucket's name."""

    def __init__(self, folder):
        self.folder = str(folder)

    def open(self, path, mode):
        return super().open(self.local(path), mode)

    def exists(self, path):
        return super().exists(self.local(path))

    def isdir(self, path):
        return super().isdir(self.local(path))

    def stat(self, path):
        return super().stat(self.local(path))

    def local(self, path):
        assert str(path).startswith("gs://my-bucket/"), path  # both slashes are there
        return str(path).replace("gs://my-bucket", self.folder)


@pytest.fixture
def bucket(sample_records, tmp_path, monkeypatch):
    shutil.copytree(sample_records, tmp_path / "sets" / "random")
    server = Server(tmp_path)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", Folder(tmp_path))
    yield server
    server.shutdown()
    server.server_close()


def test_records_of_a_bucket_are_those_of_a_folder(bucket, sample_records):
    here, there = RecordSource(sample_records), open_source("gs://my-bucket/sets/random")
    assert len(there) == len(here) == 24
    for source in (there, pickle.loads(pickle.dumps(there))):
        for index in (0, 17, 5):
            got, want = source[index], here[index]
            assert got.id == want.id
            for modality, sequence in want.sequences.items():
                np.testing.assert_array_equal(got.sequences[modality].values, sequence.values)
    assert set(bucket.asked) == {"sets/random/samples-00000.array_record"}


def test_verbs_take_them(bucket, capsys):
    assert main(["data", "stats", "--dataset=gs://my-bucket/sets/random"]) == 0
    assert "sentinel2-l2a" in capsys.readouterr().out


def test_a_data_set_that_is_not_there(bucket):
    with pytest.raises(UserError, match=r"gs://my-bucket/sets/none.*not a skyjax dataset"):
        open_source("gs://my-bucket/sets/none")
    (bucket.folder / "sets" / "random" / "samples-00000.array_record").unlink()
    with pytest.raises(UserError, match=r'gs://my-bucket/sets/random/samples-00000.array_record" is missing'):
        open_source("gs://my-bucket/sets/random")


def test_without_its_library_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"gs://my-bucket/set.*pip install gcsfs"):
        open_source("gs://my-bucket/set")


@pytest.mark.parametrize(
    "words",
    [
        ["report", "--workdir=gs://my-bucket/run"],
        ["train", "--config=x.py", "--workdir=gs://my-bucket/run"],
        ["data", "build", "--source=x.py", "--input=.", "--out=gs://my-bucket/run"],
    ],
)
def test_a_bucket_is_not_taken_for_a_folder_called_gs(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert "=gs://my-bucket/run is in a bucket" in capsys.readouterr().err
    assert not list(pathlib.Path().iterdir())
