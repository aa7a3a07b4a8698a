"""Pictures, rasters and arrays of strangers: pixels, or a sentence; whatever the bytes are, and whatever they claim."""

import contextlib
import io
import pathlib
import struct
import tempfile
import zipfile
import zlib

import numpy as np
import PIL.Image
import pytest
import rasterio
import rasterio.io
from fuzzing import deadline, ends_well, fuzz
from hypothesis import given
from hypothesis import strategies as st

from skyjax.errors import BadRecord
from skyjax.input.build import load_arrays
from skyjax.input.images import MAX_BYTES, image_sample, read_image

ROOT = pathlib.Path(__file__).parents[2]
PIXELS = np.random.default_rng(0).integers(0, 255, (12, 10, 3), np.uint8)


def picture(kind, **options):
    file = io.BytesIO()
    PIL.Image.fromarray(PIXELS).save(file, kind, **options)
    return file.getvalue()


def raster(**options):
    shape = {"height": 12, "width": 10, "count": 3, "dtype": "uint8"}
    place = {"crs": "EPSG:32632", "transform": rasterio.Affine(10, 0, 500_000, 0, -10, 5_800_000)}
    with rasterio.io.MemoryFile() as memory:
        with memory.open(driver="GTiff", **shape, **place, **options) as file:
            file.write(np.moveaxis(PIXELS, -1, 0))
        return memory.read()


def arrays():
    file = io.BytesIO()
    np.savez_compressed(file, values=PIXELS, days=np.arange(3))
    return file.getvalue()


WHOLE = {
    "a.jpg": picture("JPEG"),
    "a.png": picture("PNG"),
    "a.tif": raster(),
    "tiled.tif": raster(compress="deflate", tiled=True, blockxsize=16, blockysize=16),
}


def read_or_refuse(name, data, read=image_sample):
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(BadRecord), deadline():
        path = pathlib.Path(folder) / name
        path.write_bytes(data)
        read(path)


@fuzz
@given(st.sampled_from(sorted(WHOLE)), st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), max_size=5), st.data())
def test_flipped_bytes_and_lost_ends(name, changed, data):
    whole = bytearray(WHOLE[name])
    head = data.draw(st.sampled_from([len(whole), 300]))  # half of them in what comes before the pixels
    for place, change in changed:
        whole[int(place * (min(head, len(whole)) - 1))] ^= change
    read_or_refuse(name, bytes(whole))
    read_or_refuse(name, bytes(whole[: data.draw(st.integers(0, len(whole)))]))


MAGIC = [b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08", b"II+\0\x08\0\0\0"]


@fuzz
@given(st.sampled_from(["a.jpg", "a.png", "a.tif"]), st.sampled_from(MAGIC), st.binary(max_size=120))
def test_bytes_of_any_kind(name, magic, data):
    read_or_refuse(name, magic + data)


@fuzz
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=5), st.floats(0.5, 1))
def test_arrays_that_are_damaged(changed, kept):
    whole = bytearray(arrays())
    for place, change in changed:
        whole[int(place * (len(whole) - 1))] ^= change
    read_or_refuse("a.npz", bytes(whole), load_arrays)
    read_or_refuse("a.npz", bytes(whole[: int(kept * len(whole))]), load_arrays)


# Bombs: small files that claim to be large


def png_that_claims(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def tif_that_claims(width, height):
    """Sparse: GDAL writes none of its blocks, and would read all of them as zeros."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "a.tif"
        shape = {"width": width, "height": height, "count": 3, "dtype": "uint16"}
        options = {"tiled": True, "blockxsize": 4096, "blockysize": 4096, "SPARSE_OK": True, "BIGTIFF": "YES"}
        with rasterio.open(path, "w", driver="GTiff", **shape, **options):
            pass
        return path.read_bytes()


BOMBS = {
    "large.png": png_that_claims(13_000, 13_000),
    "huge.png": png_that_claims(2**31 - 1, 2**31 - 1),
    "large.tif": tif_that_claims(60_000, 60_000),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_by_what_it_claims(tmp_path, monkeypatch, name):
    monkeypatch.setattr("skyjax.input.images.MAX_BYTES", min(MAX_BYTES, 2**28))
    assert len(BOMBS[name]) < 100_000
    (tmp_path / name).write_bytes(BOMBS[name])
    with pytest.raises(BadRecord, match=r"pixels"), deadline(5):
        read_image(tmp_path / name)


def test_an_array_file_that_unfolds_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("skyjax.input.build.MAX_BYTES", 10**6)
    np.savez_compressed(tmp_path / "a.npz", zeros=np.zeros(10**7, np.uint8))
    with pytest.raises(BadRecord, match=r"would unfold to 10,000,\d+ bytes"):
        load_arrays(tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as file:
        head = b"{'descr': '|u1', 'fortran_order': False, 'shape': (100000000000000,), }".ljust(117) + b"\n"
        file.writestr("zeros.npy", b"\x93NUMPY\x01\0" + struct.pack("<H", len(head)) + head)
    with pytest.raises(BadRecord, match="truncated or corrupt"), deadline():
        load_arrays(tmp_path / "b.npz")


def test_an_array_file_with_a_pickle_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", values=np.array([{"a": 1}], dtype=object))
    with pytest.raises(BadRecord, match="allow_pickle=False"):
        load_arrays(tmp_path / "a.npz")


# Disguises: the library would choose another reader by the content


def test_a_list_of_other_files_is_no_raster(tmp_path):
    (tmp_path / "mine.tif").write_bytes(WHOLE["a.tif"])
    band = f"<SimpleSource><SourceFilename>{tmp_path / 'mine.tif'}</SourceFilename></SimpleSource>"
    bands = "".join(f'<VRTRasterBand dataType="Byte" band="{n}">{band}</VRTRasterBand>' for n in (1, 2, 3))
    (tmp_path / "a.tif").write_text(f'<VRTDataset rasterXSize="10" rasterYSize="12">{bands}</VRTDataset>')
    with rasterio.open(tmp_path / "a.tif") as file:
        assert file.driver == "VRT"  # GDAL by itself would open it
    with pytest.raises(BadRecord, match=r"a\.tif"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("kind", ["EPS", "GIF", "TIFF", "BMP", "PDF"])
def test_a_picture_is_a_jpeg_or_a_png(tmp_path, kind):
    (tmp_path / "a.png").write_bytes(picture(kind))
    with pytest.raises(BadRecord, match="cannot identify"):
        read_image(tmp_path / "a.png")


@fuzz
@given(st.lists(st.tuples(st.sampled_from(sorted(WHOLE)), st.integers(0, 400)), min_size=1, max_size=4))
def test_verbs_on_folders_of_damaged_images(kept):
    with tempfile.TemporaryDirectory() as folder:
        data = pathlib.Path(folder)
        for number, (name, length) in enumerate(kept):
            part = data / "in" / f"class {number % 2}"
            part.mkdir(parents=True, exist_ok=True)
            (part / f"{number}-{name}").write_bytes(WHOLE[name][:length])
        ends_well(["data", "stats", f"--dataset={data / 'in'}"])
        builder = ROOT / "data" / "class_folder.py"
        ends_well(["data", "build", f"--source={builder}", f"--input={data / 'in'}", f"--out={data / 'out'}"])
