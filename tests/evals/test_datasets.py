import hashlib
import logging
import zlib

import numpy as np
import PIL.Image
import pytest
import rasterio
import tensorflow_datasets as tfds
from numpy.testing import assert_array_equal

from skyjax.errors import UserError
from skyjax.evals.datasets import hold_out, open_dataset, split_by_hash
from skyjax.input import records
from skyjax.sample import Sample, make_sequence

COLOURS = {"Forest": (30, 90, 30), "Sea": (20, 40, 120), "Urban": (140, 130, 120)}


def picture(seed, colour=(90, 90, 90), size=(8, 8)):
    noise = np.random.default_rng(seed).integers(-20, 20, (*size, 3))
    return np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)


def fill_classes(folder, count=10, classes=COLOURS, suffix=".png", size=(8, 8)):
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            seed = zlib.crc32(f"{folder} {number} {i}".encode())
            image = PIL.Image.fromarray(picture(seed, COLOURS.get(name, (90, 90, 90)), size))
            image.save(folder / name / f"{name}_{i}{suffix}")
    return folder


def write_tiff(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    h, w, c = values.shape
    options = {"driver": "GTiff", "height": h, "width": w, "count": c, "transform": rasterio.Affine.scale(10, -10)}
    with rasterio.open(path, "w", dtype=values.dtype, **options) as raster:
        raster.write(np.moveaxis(values, -1, 0))


def fill_tiffs(folder, bands, count=4, dtype=np.uint16):
    for number, name in enumerate(("Crop", "Forest")):
        for i in range(count):
            values = np.random.default_rng(10 * number + i).integers(500, 3000, (8, 8, bands)).astype(dtype)
            write_tiff(folder / name / f"{name}_{i}.tif", values)
    return folder


def names_of(folder, data, part):
    return {data.read(i).id for i in data.parts[part]}


def test_classes_and_labels_are_the_folders(tmp_path):
    data = open_dataset(str(fill_classes(tmp_path)))
    assert data.classes == ("Forest", "Sea", "Urban")
    for i in (*data.parts["train"], *data.parts["test"]):
        sample = data.read(i)
        assert sample.id.startswith(data.classes[data.labels[i]])
        assert sample.sequences["optical"].sensor == "rgb"
        assert sample.sequences["optical"].values.shape == (1, 8, 8, 3)


def test_the_split_is_stratified_disjoint_and_complete(tmp_path):
    data = open_dataset(str(fill_classes(tmp_path, 10)), train_per_class=5)
    sizes = {part: np.bincount(data.labels[which]).tolist() for part, which in data.parts.items()}
    assert sizes == {"train": [4, 4, 4], "val": [1, 1, 1], "test": [5, 5, 5]}
    together = np.concatenate(list(data.parts.values()))
    assert_array_equal(np.sort(together), np.arange(30))


def test_the_order_is_the_hash_of_the_name_without_its_ending(tmp_path):
    data = open_dataset(str(fill_classes(tmp_path)), train_per_class=3)
    order = sorted((f"Sea_{i}" for i in range(10)), key=lambda name: hashlib.sha256(name.encode()).digest())
    assert {name for name in names_of(tmp_path, data, "test") if name.startswith("Sea")} == set(order[3:])
    assert {name for name in names_of(tmp_path, data, "val") if name.startswith("Sea")} == {order[2]}


def test_a_small_class_gives_half_of_itself():
    names = [f"{i}.jpg" for i in range(17)]
    groups = np.array([0] * 12 + [1] * 5)
    train, test = split_by_hash(names, groups, train_per_group=5)
    assert np.bincount(groups[train]).tolist() == [5, 2]
    assert np.bincount(groups[test]).tolist() == [7, 3]
    kept, validation = hold_out(names, groups, train)
    assert np.bincount(groups[validation]).tolist() == [1, 1]
    assert sorted([*kept, *validation]) == sorted(train)


def test_another_format_of_the_same_names_splits_alike(tmp_path):
    png = open_dataset(str(fill_classes(tmp_path / "png")))
    jpg = open_dataset(str(fill_classes(tmp_path / "jpg", suffix=".jpg")))
    assert names_of(tmp_path, png, "test") == names_of(tmp_path, jpg, "test")


def test_folders_train_val_test_are_respected(tmp_path):
    for part, count in (("train", 6), ("val", 2), ("test", 3)):
        fill_classes(tmp_path / part, count)
    data = open_dataset(str(tmp_path))
    assert {part: len(which) for part, which in data.parts.items()} == {"train": 18, "val": 6, "test": 9}
    capped = open_dataset(str(tmp_path), train_per_class=4)
    assert {part: len(which) for part, which in capped.parts.items()} == {"train": 12, "val": 6, "test": 9}


def test_train_and_test_folders_get_a_validation_part_from_train(tmp_path):
    fill_classes(tmp_path / "train", 10)
    fill_classes(tmp_path / "test", 3)
    data = open_dataset(str(tmp_path))
    assert {part: len(which) for part, which in data.parts.items()} == {"train": 24, "val": 6, "test": 9}


def test_a_test_dataset_is_all_test_and_its_class_order_is_ours(tmp_path):
    fill_classes(tmp_path / "a", 10)
    fill_classes(tmp_path / "b", 2)
    data = open_dataset(str(tmp_path / "a"), test_path=str(tmp_path / "b"), train_per_class=5)
    assert {part: len(which) for part, which in data.parts.items()} == {"train": 12, "val": 3, "test": 6}
    for i in data.parts["test"]:
        assert data.read(i).id.startswith(data.classes[data.labels[i]])


def test_copies_between_train_and_test_are_told(tmp_path):
    fill_classes(tmp_path / "a", 10)
    data = open_dataset(str(tmp_path / "a"), test_path=str(tmp_path / "a"))
    assert any("30 of 30 test images are copies of training images" in note for note in data.notes)


def test_mixed_sizes_become_the_most_common_one_and_it_is_said(tmp_path):
    fill_classes(tmp_path, 6)
    PIL.Image.fromarray(np.full((20, 12, 3), 77, np.uint8)).save(tmp_path / "Sea" / "Sea_odd.png")
    data = open_dataset(str(tmp_path))
    shapes = {data.read(i).sequences["optical"].values.shape for part in data.parts.values() for i in part}
    assert shapes == {(1, 8, 8, 3)}
    (odd,) = [data.read(i) for part in data.parts.values() for i in part if data.read(i).id == "Sea_odd"]
    assert (odd.sequences["optical"].values == 77).all()
    assert any("1 of 19 optical images of another size were resized to 8 x 8" in note for note in data.notes)


def test_large_images_shrink_to_the_limit_and_a_size_asked_for_wins(tmp_path):
    fill_classes(tmp_path, 4, size=(16, 24))
    assert open_dataset(str(tmp_path), largest={"optical": 12}).sizes == {"optical": (8, 12)}
    assert open_dataset(str(tmp_path), largest={"optical": 12}, image_size=20).sizes == {"optical": (20, 20)}
    assert open_dataset(str(tmp_path), largest={"optical": 100}).sizes == {"optical": (16, 24)}


def test_rasters_of_a_named_sensor(tmp_path):
    data = open_dataset(str(fill_tiffs(tmp_path, 12)), sensor="sentinel2-l2a")
    sequence = data.read(0).sequences["multispectral"]
    assert sequence.values.dtype == np.uint16
    assert len(sequence.bands) == 12
    named = open_dataset(str(fill_tiffs(tmp_path / "b", 3)), sensor="sentinel2-l2a", bands=("B04", "B03", "B02"))
    assert named.read(0).sequences["multispectral"].bands == ("B04", "B03", "B02")


def test_nan_pixels_of_a_raster_are_not_clear(tmp_path):
    fill_tiffs(tmp_path, 3, dtype=np.float32)
    values = np.random.default_rng(0).integers(500, 3000, (8, 8, 3)).astype(np.float32)
    values[2:4, :, 1] = np.nan
    write_tiff(tmp_path / "Crop" / "holes.tif", values)
    data = open_dataset(str(tmp_path), sensor="sentinel2-l2a", bands=("B04", "B03", "B02"))
    (holes,) = [data.read(i) for part in data.parts.values() for i in part if data.read(i).id == "holes"]
    want = np.ones((1, 8, 8), bool)
    want[:, 2:4] = False
    assert_array_equal(holes.sequences["multispectral"].clear, want)


def one_class(folder):
    fill_classes(folder, 4, ["Forest"])


def single_image(folder):
    fill_classes(folder, 4)
    fill_classes(folder, 1, ["Lake"])


def thirteen_bands(folder):
    fill_tiffs(folder, 13)


def no_class_folders(folder):
    fill_classes(folder / "inner", 4)
    (folder / "inner").rename(folder / "Forest")
    for image in list((folder / "Forest" / "Sea").iterdir()):
        image.rename(folder / image.name)
    for image in (folder / "Forest").rglob("*.png"):
        image.unlink()


def only_train(folder):
    fill_classes(folder / "train", 4)


def too_small(folder):
    fill_classes(folder, 2)


def class_missing_in_test(folder):
    fill_classes(folder / "train", 4)
    fill_classes(folder / "test", 4, ["Forest", "Sea"])


def half_corrupt(folder):
    fill_classes(folder, 4, suffix=".jpg")
    file = folder / "Sea" / "Sea_1.jpg"
    file.write_bytes(file.read_bytes()[:200])


def truncated_raster(folder):
    fill_tiffs(folder, 3)
    file = folder / "Crop" / "Crop_1.tif"
    file.write_bytes(file.read_bytes()[:300])


S2_RGB = {"sensor": "sentinel2-l2a", "bands": ("B04", "B03", "B02")}


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (lambda folder: None, {}, ["holds no class folders"]),
        (no_class_folders, {}, ["images without a class"]),
        (one_class, {}, ['one class only ("Forest")', "two or more"]),
        (single_image, {}, ['"Lake"', "single image"]),
        (too_small, {}, ["too small", "4 images a class"]),
        (only_train, {}, ['"train"', "--test-dataset"]),
        (class_missing_in_test, {}, ['"Urban"', 'no image in the part "test"']),
        (thirteen_bands, {}, ["13 bands", '"rgb"', "sentinel2-l1c", "--sensor=KEY"]),
        (thirteen_bands, {"sensor": "sentinel2-l2a"}, ["13 bands", "sentinel2-l2a", "12"]),
        (fill_classes, {"sensor": "sentinel2"}, ['"sentinel2"', "did you mean"]),
        (fill_classes, {"sensor": "sentinel2-l2a", "bands": ("B4", "B03", "B02")}, ['"B4"', '"B04"']),
        (fill_classes, {"label": "class"}, ["--label=class"]),
        (fill_classes, {"train_per_class": 1}, ["--train-per-class=1"]),
        (half_corrupt, {}, ["Sea_1.jpg", "1 of 12 images", "more than 1 %"]),
        (truncated_raster, S2_RGB, ["Crop_1.tif", "1 of 8 images", "more than 1 %"]),
    ],
)
def test_a_mistake_is_one_sentence_with_its_mend(tmp_path, make, options, words):
    make(tmp_path)
    with pytest.raises(UserError) as caught:
        open_dataset(str(tmp_path), **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_missing_folder_is_named():
    with pytest.raises(UserError, match='no folder "nowhere/at/all"'):
        open_dataset("nowhere/at/all")


@pytest.mark.parametrize(
    ("classes", "word"), [(["Forest", "Sea"], 'lacks "Urban"'), ([*COLOURS, "Lake"], 'has "Lake"')]
)
def test_classes_of_train_and_test_must_agree(tmp_path, classes, word):
    fill_classes(tmp_path / "a", 4)
    fill_classes(tmp_path / "b", 4, classes)
    with pytest.raises(UserError, match=word):
        open_dataset(str(tmp_path / "a"), test_path=str(tmp_path / "b"))


def test_one_bad_image_of_many_is_named_counted_and_left_out(tmp_path, caplog):
    fill_classes(tmp_path, 40, suffix=".jpg", size=(4, 4))
    file = tmp_path / "Urban" / "Urban_7.jpg"
    file.write_bytes(file.read_bytes()[:150])
    with caplog.at_level(logging.WARNING, logger="skyjax"):
        data = open_dataset(str(tmp_path))
    assert [record.message.count("Urban_7.jpg") for record in caplog.records] == [1]
    assert sum(map(len, data.parts.values())) == 119
    assert any("1 of 120 images" in note for note in data.notes)


def record_sample(i, labels):
    values = np.random.default_rng(i).integers(0, 255, (1, 8, 8, 3), np.uint8)
    sequence = make_sequence(values, "rgb", ("red", "green", "blue"), days=np.zeros(1, int))
    return Sample({"optical": sequence}, np.full(2, np.nan, np.float32), labels=labels, id=f"s{i}", source="test")


def test_records_with_class_numbers(tmp_path):
    samples = [record_sample(i, {"crop": np.array(i % 3 - (i == 5) * 10), "soil": np.array(i % 2)}) for i in range(24)]
    records.write(samples, tmp_path / "set", about={"label_names": {"crop": ["wheat", "maize", "rye", "oats"]}})
    data = open_dataset(str(tmp_path / "set"), label="crop")
    assert data.classes == ("wheat", "maize", "rye")
    assert sum(map(len, data.parts.values())) == 23
    for i in data.parts["test"]:
        assert int(data.read(i).labels["crop"]) == data.labels[i]
    assert any('1 of 24 records have no label "crop"' in note for note in data.notes)
    with pytest.raises(UserError, match="crop, soil; choose one by --label"):
        open_dataset(str(tmp_path / "set"))
    with pytest.raises(UserError, match='no label "crops"; did you mean "crop"'):
        open_dataset(str(tmp_path / "set"), label="crops")
    with pytest.raises(UserError, match="leave out --sensor"):
        open_dataset(str(tmp_path / "set"), label="crop", sensor="rgb")


def test_records_with_flags(tmp_path):
    flags = [np.array([i % 2, i % 3 == 0, 1], np.int8) for i in range(20)]
    # Beside them shares, which are no classes.
    samples = [record_sample(i, {"cover": cover, "shares": cover / np.float32(3)}) for i, cover in enumerate(flags)]
    records.write(samples, tmp_path / "set")
    data = open_dataset(str(tmp_path / "set"))
    assert data.labels.shape == (20, 3)
    assert data.labels.dtype == bool
    assert {part: len(which) for part, which in data.parts.items()} == {"train": 8, "val": 2, "test": 10}
    for i in data.parts["test"]:
        assert_array_equal(data.labels[i], data.read(i).labels["cover"] > 0)


def test_label_maps_are_for_another_probe(tmp_path):
    records.write([record_sample(i, {"cover": np.zeros((8, 8), int)}) for i in range(4)], tmp_path / "set")
    with pytest.raises(UserError, match='"cover" is a map'):
        open_dataset(str(tmp_path / "set"))


class TinySet(tfds.core.GeneratorBasedBuilder):
    """Two classes of 8 x 8 pictures, of which one is unlabelled."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Tensor(shape=(8, 8, 3), dtype=np.uint8, encoding="zlib"),
                "label": tfds.features.ClassLabel(names=["dark", "light"]),
                "id": tfds.features.Text(),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0, 20), "test": self._generate_examples(20, 26)}

    def _generate_examples(self, first, last):
        for i in range(first, last):
            image = picture(i, (200,) * 3 if i % 2 else (40,) * 3)
            yield i, {"image": image, "label": -1 if i == 25 else i % 2, "id": f"picture {i}"}


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    builder = TinySet(data_dir=tmp_path_factory.mktemp("tfds"), file_format="array_record")
    builder.download_and_prepare()
    return builder.data_path


@pytest.mark.parametrize("form", ["tfds:{}", "{}", "tfds:{}/.."])
def test_tfds_without_tensorflow(tfds_folder, form):
    data = open_dataset(form.format(tfds_folder))
    assert data.classes == ("dark", "light")
    assert {part: len(which) for part, which in data.parts.items()} == {"train": 16, "val": 4, "test": 5}
    for i in data.parts["test"]:
        sample = data.read(i)
        number = int(sample.id.removeprefix("picture "))
        assert number >= 20
        assert_array_equal(
            sample.sequences["optical"].values[0], picture(number, (200,) * 3 if number % 2 else (40,) * 3)
        )
        assert data.labels[i] == number % 2


def test_a_tfds_name_that_cannot_be_opened(tfds_folder):
    with pytest.raises(UserError, match='TFDS cannot open "no_such_set"'):
        open_dataset("tfds:no_such_set")
    with pytest.raises(UserError, match=r"3 bands.*--sensor=KEY"):
        open_dataset(f"tfds:{tfds_folder}", sensor="sentinel1-grd")


def test_an_image_without_a_measured_pixel_cannot_be_used(tmp_path):
    fill_tiffs(tmp_path, 3, dtype=np.float32)
    write_tiff(tmp_path / "Crop" / "void.tif", np.full((8, 8, 3), np.nan, np.float32))
    with pytest.raises(UserError, match=r"void.*no measured pixel"):
        open_dataset(str(tmp_path), **S2_RGB)
