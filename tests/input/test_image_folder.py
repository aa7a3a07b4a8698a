import numpy as np
import PIL.Image
import pytest

from skyjax.errors import BadRecord, UserError
from skyjax.input.image_folder import ImageFolder
from skyjax.input.loader import Loader, open_source
from skyjax.input.records import RecordSource


@pytest.fixture
def pictures(tmp_path):
    """Six PNGs in two folders, each of one grey of its own."""
    for number in range(6):
        file = tmp_path / "pictures" / f"class {number % 2}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(np.full((40, 40, 3), 10 + number, np.uint8)).save(file)
    return tmp_path / "pictures"


def test_every_image_is_a_sample_in_the_order_of_the_paths(pictures):
    source = ImageFolder(pictures)
    assert [int(source[i].sequences["optical"].values[0, 0, 0, 0]) - 10 for i in range(len(source))] == [
        0,
        2,
        4,
        1,
        3,
        5,
    ]
    assert source.name(0) == "class 0/0.png"


def test_a_loader_reads_pictures_and_keeps_the_place_of_a_bad_one(pictures, tiny_config):
    (pictures / "class 0" / "2.png").write_bytes(b"no picture")
    config = tiny_config(("optical",), batch_size=6)
    with config.unlocked():
        config.data.sources = ((str(pictures), 1.0),)
    loader = Loader(config)
    batch = next(loader)
    loader.close()
    assert batch["bad"].sum() == 1
    assert list(loader.bad) == ["pictures/class 0/2.png"]
    greys = batch["global"]["optical"]["values"][~batch["bad"], 0, 0, 0, 0, 0]
    assert sorted(greys.tolist()) == [10, 11, 13, 14, 15]


def test_records_are_told_from_pictures(pictures, sample_records):
    assert isinstance(open_source(str(sample_records)), RecordSource)
    assert isinstance(open_source(str(pictures)), ImageFolder)


def test_a_folder_without_images_is_told(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(UserError, match="neither images"):
        open_source(str(tmp_path))
    with pytest.raises(UserError, match="data build"):
        open_source(str(tmp_path / "missing"))


def test_images_of_another_kind_are_told(tmp_path):
    PIL.Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "grey.png")
    with pytest.raises(UserError, match="1 bands"):
        ImageFolder(tmp_path)


def test_an_image_that_cannot_be_read_is_a_bad_record(pictures):
    source = ImageFolder(pictures)
    (pictures / "class 0" / "0.png").write_bytes(b"no picture")
    with pytest.raises(BadRecord, match="truncated or corrupt"):
        source[0]
