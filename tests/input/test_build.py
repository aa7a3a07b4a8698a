"""Running builders: class folders of one's own, TFDS without TensorFlow, and everything a user may get wrong."""

import pathlib
import shutil
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from skyjax.errors import UserError
from skyjax.input import build, records

ROOT = pathlib.Path(__file__).parents[2]
CLASS_FOLDER = ROOT / "data" / "class_folder.py"
EUROSAT = ROOT / "data" / "sample" / "eurosat_rgb"


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    for number, name in enumerate(("water", "forest")):
        (folder / name).mkdir(parents=True)
        for image in range(3):
            values = np.random.default_rng(number * 10 + image).integers(0, 255, (16, 16, 3), np.uint8)
            PIL.Image.fromarray(values).save(folder / name / f"{image}.png")
    return folder


def test_class_folder(pictures, tmp_path, capfd):
    (pictures / "forest" / "notes.txt").write_text("not an image")
    (pictures / "empty").mkdir()
    summary = build.build(CLASS_FOLDER, pictures, tmp_path / "set")
    assert (summary.count, summary.bad) == (6, {})
    source = records.RecordSource(tmp_path / "set")
    assert source.description["label_names"] == {"class": ["forest", "water"]}
    assert source.description["licence"]
    assert [int(source[i].labels["class"]) for i in range(6)] == [0, 0, 0, 1, 1, 1]
    assert_array_equal(
        source[3].sequences["optical"].values[0], np.asarray(PIL.Image.open(pictures / "water" / "0.png"))
    )
    out, err = capfd.readouterr()
    assert "6/6" in err  # the bar
    assert not out


def test_one_class_and_no_class(pictures, tmp_path):
    shutil.rmtree(pictures / "water")
    assert build.build(CLASS_FOLDER, pictures, tmp_path / "one").description["label_names"] == {"class": ["forest"]}
    build.build(CLASS_FOLDER, pictures / "forest", tmp_path / "none")
    assert not records.RecordSource(tmp_path / "none")[0].labels


def test_a_bad_file_is_named_counted_and_passed_over(pictures, tmp_path, caplog):
    path = pictures / "forest" / "1.png"
    path.write_bytes(path.read_bytes()[:300])
    PIL.Image.fromarray(np.zeros((4, 4), np.uint8)).save(pictures / "water" / "2.png")
    summary = build.build(CLASS_FOLDER, pictures, tmp_path / "set")
    assert summary.count == 4
    assert str(summary).endswith("4 samples, 0.1 MB; 2 bad files passed over")
    assert list(summary.bad) == [str(path), str(pictures / "water" / "2.png")]
    assert 'forest/1.png" is truncated or corrupt' in caplog.text
    assert 'water/2.png" has 1 bands, rgb 3: red green blue' in caplog.text


def test_nothing_but_bad_files(pictures, tmp_path):
    for path in pictures.glob("*/*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r'none of 6 files can be used; the first: .*forest/0.png"'):
        build.build(CLASS_FOLDER, pictures, tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_wrong_input(pictures, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no images \(.jpg .jpeg .png .tif .tiff\)"):
        build.build(CLASS_FOLDER, tmp_path / "empty", tmp_path / "set")
    with pytest.raises(UserError, match=r"empty\" holds no \*.npz"):
        build.build(ROOT / "data" / "triples.py", tmp_path / "empty", tmp_path / "set")
    with pytest.raises(UserError, match=r'nowhere" is not a folder; --input'):
        build.build(CLASS_FOLDER, tmp_path / "nowhere", tmp_path / "set")
    with pytest.raises(UserError, match=r'there is no file ".*class_foder.py"; did you mean ".*class_folder.py"'):
        build.build(CLASS_FOLDER.with_name("class_foder.py"), pictures, tmp_path / "set")
    (tmp_path / "set").write_text("a file")
    with pytest.raises(UserError, match="is a file"):
        build.build(CLASS_FOLDER, pictures, tmp_path / "set")


@pytest.mark.parametrize(
    ("text", "told"), [("x = (", "line 1 is not Python"), ("x = 1", r"has no samples\(folder\); data/class_folder.py")]
)
def test_a_builder_that_is_none(tmp_path, text, told):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=told):
        build.load_builder(tmp_path / "mine.py")


def test_a_builder_of_one_s_own_may_be_a_plain_generator(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n"
        "from skyjax.sample import Sample\n"
        "def samples(folder):\n"
        "    for number in range(3):\n"
        "        yield Sample({}, np.zeros(2, np.float32), id=str(number))\n"
    )
    assert build.build(tmp_path / "mine.py", tmp_path, tmp_path / "set").count == 3


TFDS = """
import sys
import numpy as np
from skyjax.input import build
for _ in range(2):  # the second replaces the first
    summary = build.build(sys.argv[1], sys.argv[2], sys.argv[3])
assert summary.count == 8, summary
assert summary.description["splits"] == {"train": 4, "test": 4}
import tensorflow_datasets as tfds
builder = tfds.builder_from_directory(summary.folder)
assert builder.info.features["label"].names[0] == "AnnualCrop"
source = builder.as_data_source(split="train")
items = [source[i] for i in range(len(source))]
columns = {key: [item[key] for item in items] for key in ("image", "label")}
np.savez(sys.argv[4], id=[item["id"].decode() for item in items], **columns)
assert "tensorflow" not in sys.modules
"""


def test_tfds_without_tensorflow(tmp_path):
    for split in ("train", "test"):
        for name in ("Forest", "River"):
            (tmp_path / "in" / split / name).mkdir(parents=True)
            for file in sorted((EUROSAT / split / name).iterdir())[:2]:
                shutil.copy(file, tmp_path / "in" / split / name)
    command = [sys.executable, "-c", TFDS, ROOT / "data" / "eurosat_tfds.py", tmp_path / "in", tmp_path / "out"]
    done = subprocess.run([*command, tmp_path / "got.npz"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not done.stdout  # results alone belong there
    got = np.load(tmp_path / "got.npz")
    assert sorted(got["label"].tolist()) == [1, 1, 8, 8]  # Forest and River among the ten, in alphabetical order
    for name, image in zip(got["id"], got["image"], strict=True):
        assert_array_equal(image, np.asarray(PIL.Image.open(EUROSAT / name)))


def test_tfds_needs_its_splits(tmp_path):
    (tmp_path / "in" / "train").mkdir(parents=True)
    with pytest.raises(UserError, match='has no folder "test"; it needs train and test'):
        build.build(ROOT / "data" / "eurosat_tfds.py", tmp_path / "in", tmp_path / "out")


def test_to_days_knows_leap_years():
    assert build.to_days([19700101, 20000229, 20200301]).tolist() == [0, 11_016, 18_322]
    assert build.to_days(np.array([20191231, 20200101])).dtype == np.int32


def test_decibels():
    got = build.to_decibels(np.array([1, 0.1, 0.02, 0, np.nan, -1], np.float32))
    assert_allclose(got[:3], [0, -10, -16.9897], rtol=1e-5)
    assert np.isnan(got[3:]).all()


def test_repeated_pixels_make_no_value_up():
    got = build.repeat_pixels(np.array([[[1, 2], [3, 4]]]), 2)
    assert_array_equal(got, [[[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]])


def test_truncated_arrays(tmp_path):
    shutil.copytree(ROOT / "data" / "sample" / "pastis", tmp_path / "in")
    path = tmp_path / "in" / "20213.npz"
    path.write_bytes(path.read_bytes()[:5000])
    summary = build.build(ROOT / "data" / "pastis.py", tmp_path / "in", tmp_path / "set")
    assert summary.count == 4
    assert "20213.npz" in str(summary.bad)
