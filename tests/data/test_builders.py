"""Every builder on the real files in data/sample, against the arrays in those files read by numpy alone."""

import dataclasses
import datetime
import json
import pathlib

import numpy as np
import pyarrow.parquet
import pytest
import rasterio
import rasterio.transform
from numpy.testing import assert_allclose, assert_array_equal

from skyjax.input.build import load_builder
from skyjax.input.captions import captions
from skyjax.sensors import get_sensor

DATA = pathlib.Path(__file__).parents[2] / "data"
COUNTS = {
    "triples": 4,
    "worldcereal": 2,
    "worldcereal_pixels": 150,
    "worldcereal_monthly": 1,
    "cropharvest": 1,
    "benv2": 15,
    "pastis": 5,
    "treesatai": 2,
    "flair2": 1,
}
NAMES = tuple(COUNTS)
PLACELESS = ("worldcereal_monthly",)  # no position is given


@pytest.fixture(scope="module")
def built():
    return {name: list(load_builder(DATA / f"{name}.py").samples(DATA / "sample" / name)) for name in NAMES}


def arrays(name, stem):
    return np.load(DATA / "sample" / name / f"{stem}.npz", allow_pickle=False)


def band(sequence, name):
    return sequence.values[..., sequence.bands.index(name)]


@pytest.mark.parametrize("name", NAMES)
def test_every_file_becomes_a_sample_of_the_contract(built, name):
    assert len(built[name]) == COUNTS[name]
    assert len({sample.id for sample in built[name]}) == COUNTS[name]
    module = load_builder(DATA / f"{name}.py")
    assert module.LICENCE
    assert module.ATTRIBUTION
    for sample in built[name]:
        if name in PLACELESS:
            assert np.isnan(sample.lonlat).all()
        else:
            assert -180 <= sample.lonlat[0] <= 180
            assert -90 <= sample.lonlat[1] <= 90
        for sequence in sample.sequences.values():
            assert sequence.valid.any()
            assert sequence.clear.mean() > 0.2
            assert sequence.values.dtype.name in ("uint8", "uint16", "int16", "float32")
            assert np.isfinite(sequence.values[sequence.clear]).all()
            # Every value of an 8-bit band would pass any range; the others lie near their sensor's statistics.
            table = get_sensor(sequence.sensor)
            for c, key in enumerate(sequence.bands):
                known = table.bands[table.index(key)]
                mean = sequence.values[..., c][sequence.clear].mean()
                far = 3 if sequence.clear[0].size > 1 else 4  # a single pixel may be a roof, which shines in the radar
                assert abs(mean - known.mean) < far * known.std, (sample.id, key, mean)


def test_sample_folder_fits_the_repository():
    files = [file for file in (DATA / "sample").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 25_000_000
    assert max(file.stat().st_size for file in files) <= 3_000 * 1024
    told = (DATA / "sample" / "README.md").read_text()
    assert "Contains modified Copernicus Sentinel data" in told
    assert all(f"`{folder.name}/`" in told for folder in (DATA / "sample").iterdir() if folder.is_dir())


def test_eurosat_has_its_classes_and_no_image_twice():
    folder = DATA / "sample" / "eurosat_rgb"
    names = {
        split: {f"{f.parent.name}/{f.name}" for f in (folder / split).glob("*/*.jpg")} for split in ("train", "test")
    }
    assert (len(names["train"]), len(names["test"])) == (2000, 500)
    assert not names["train"] & names["test"]


# --- traps -----------------------------------------------------------------------------------------------------------


def test_triples_name_the_aerial_bands(built):
    for sample in built["triples"]:
        optical, source = sample.sequences["optical"], arrays("triples", sample.id)["hr"]
        assert_array_equal(band(optical, "red")[0], source[3])
        assert_array_equal(band(optical, "nir")[0], source[0])
        red, nir = band(optical, "red").mean(dtype=float), band(optical, "nir").mean(dtype=float)
        assert (nir - red) / (nir + red) > 0.2  # a forest: the vegetation index is high only if the names are right
        assert optical.extent.tolist() == pytest.approx([30.4, -30.4, -30.4, 30.4], abs=1e-4)


def test_triples_have_radar_in_decibels_by_date(built):
    sample = next(s for s in built["triples"] if s.id.startswith("Betula_spec._1"))
    sar, source = sample.sequences["sar"], arrays("triples", sample.id)
    assert len(sar.days) == 115 + 235
    assert (np.diff(sar.days) == 0).any()  # a day with two passes keeps both
    first = datetime.date(2019, 1, 1)  # the first ascending pass; descending ones begin on the third
    assert sar.days[0] == (first - datetime.date(1970, 1, 1)).days
    assert_allclose(band(sar, "VH")[0], 10 * np.log10(source["s1_asc"][0, 1].astype(np.float64)), rtol=1e-5)
    dark = np.isnan(sar.values).any(-1)
    assert dark.sum() > 0  # zeros and NaN of the source
    assert not (dark & sar.clear).any()


def test_triples_leave_scrambled_radar_out(built):
    radar = {sample.id.split("_WEFL")[0]: "sar" in sample.sequences for sample in built["triples"]}
    assert radar == {
        "Abies_alba_1_1005": True,
        "Betula_spec._1_15679": True,
        "Betula_spec._5_17172": False,
        "Quercus_robur_7_86717": False,
    }
    for sample in built["triples"]:
        if "sar" in sample.sequences:  # volume scattering of a forest: VV is some 3 to 8 dB above VH
            sar = sample.sequences["sar"]
            assert 3 < np.nanmean(band(sar, "VV") - band(sar, "VH")) < 8


def test_triples_mask_and_labels(built):
    sample = next(s for s in built["triples"] if s.id.startswith("Betula_spec._1"))
    sequence, source = sample.sequences["multispectral"], arrays("triples", sample.id)
    assert_array_equal(np.moveaxis(sequence.values, -1, 1), source["s2"])  # in order already
    assert_array_equal(sequence.clear, (source["s2_mask"][:, 0] < 50) & (source["s2_mask"][:, 1] < 50))
    module = load_builder(DATA / "triples.py")
    names = module.label_names(DATA)["genera"]
    assert [names[i] for i in np.flatnonzero(sample.labels["genera"])] == ["Betula", "Picea"]  # Quercus has 4 %
    told = dict(json.loads((DATA / "sample" / "triples" / f"{sample.id}.json").read_text())["labels"])
    shares = {names[i]: sample.labels["shares"][i] for i in np.flatnonzero(sample.labels["shares"])}
    assert shares == {genus: np.float32(share) for genus, share in told.items()}
    of_shares = captions(
        dataclasses.replace(sample, labels={"shares": sample.labels["shares"]}),
        {"shares": names},
        seed=0,
        number=16,
        metadata=False,
    )
    assert any("73 % birch" in text and "10 % spruce" in text for text in of_shares)


def test_worldcereal(built):
    belgium, tanzania = built["worldcereal"]
    source = arrays("worldcereal", "0000280849BAC91C")
    sequence = belgium.sequences["multispectral"]
    assert sequence.values.shape == (72, 64, 64, 10)
    assert_array_equal(band(sequence, "B08"), source["s2_10m"][:, 3])
    assert_array_equal(band(sequence, "B05")[:, ::2, ::2], source["s2_20m"][:, 0])
    assert_array_equal(band(sequence, "B05")[:, 1::2, 1::2], source["s2_20m"][:, 0])
    scene = source["scl_20m"].repeat(2, 1).repeat(2, 2)
    assert_array_equal(sequence.clear, np.isin(scene, [4, 5, 6, 7]) & (sequence.values > 0).all(-1))

    assert tanzania.lonlat.tolist() == pytest.approx([36.850299, -3.657184], abs=1e-5)  # the npz has it swapped
    sequence = tanzania.sequences["multispectral"]
    assert sequence.values.shape == (136, 32, 32, 6)
    assert sequence.bands == ("B05", "B06", "B07", "B8A", "B11", "B12")
    for sample in built["worldcereal"]:
        for sequence in sample.sequences.values():
            assert sequence.extent.tolist() == [320, -320, -320, 320]  # 64 x 10 m = 32 x 20 m
        assert sample.labels["land_cover"].shape == (64, 64)
    assert set(np.unique(tanzania.labels["land_cover"])) == {-1, 11}


def test_field_pixels_in_both_forms(built):
    folder = DATA / "sample" / "worldcereal_pixels"
    by_month = pyarrow.parquet.read_table(folder / "flanders_100px_16mo.parquet").to_pylist()
    by_field = pyarrow.parquet.read_table(folder / "prometheo_50.parquet").to_pylist()
    found = {sample.id: sample for sample in built["worldcereal_pixels"]}
    months = [np.datetime64("2020-08") + month for month in range(16)]
    middle = [int((month.astype("datetime64[D]") + 14).astype(int)) for month in months]
    row = by_month[37]
    month = months.index(np.datetime64(row["timestamp"], "M"))
    one, other = found[row["sample_id"]], found[by_field[4]["sample_id"]]
    for sample in (one, other):
        assert sample.sequences["multispectral"].values.shape == (16, 1, 1, 9)  # B8A is nowhere
        assert sample.sequences["multispectral"].days.tolist() == middle
    assert band(one.sequences["multispectral"], "B11")[month].item() == row["S2-L2A-B11"]
    assert_allclose(band(one.sequences["sar"], "VH")[month].item(), 20 * np.log10(row["S1-SIGMA0-VH"]) - 83, rtol=1e-5)
    assert_allclose(one.lonlat, [row["lon"], row["lat"]], atol=1e-5)
    assert band(other.sequences["multispectral"], "B06")[9].item() == by_field[4]["OPTICAL-B06-ts9-20m"]
    assert_allclose(
        band(other.sequences["sar"], "VV")[3].item(), 20 * np.log10(by_field[4]["SAR-VV-ts3-20m"]) - 83, rtol=1e-5
    )


def test_field_pixels_have_gaps_and_no_mixture_with_nodata(built):
    values = np.concatenate([s.sequences["multispectral"].values[:, 0, 0] for s in built["worldcereal_pixels"]])
    clear = np.concatenate([s.sequences["multispectral"].clear[:, 0, 0] for s in built["worldcereal_pixels"]])
    assert 0.8 < clear.mean() < 0.9
    assert values[clear].max() <= 10_000
    mixed = (values.max(1) > 10_000) & (values < 65_535).all(1)
    assert mixed.sum() > 20  # interpolated across nodata by the source
    assert not clear[mixed].any()


def test_field_pixels_are_labelled_by_one_legend(built):
    known = [int(sample.labels["land_cover"]) for sample in built["worldcereal_pixels"]]
    codes = dict(zip(*np.unique(known, return_counts=True), strict=True))
    assert codes == {-1: 14, 11: 44, 12: 10, 13: 43, 16: 30, 30: 3, 40: 3, 70: 3}


def test_biomassters(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {"f00d_AGBM": np.ones((1, 32, 32), np.float32)}
    for month in ("October", "February"):
        radar = rng.normal(-12, 2, (4, 32, 32)).astype(np.float32)
        radar[:, 0, 0] = -9999
        arrays[f"f00d_S1_{month}"] = radar
    optical = rng.integers(500, 3000, (11, 32, 32)).astype(np.uint16)
    optical[10] = 0
    optical[10, :8] = 90  # probability of cloud
    arrays["f00d_S2_January"] = optical
    np.savez(tmp_path / "f00d.npz", **arrays)
    (sample,) = load_builder(DATA / "biomassters.py").samples(tmp_path)
    image, radar = sample.sequences["multispectral"], sample.sequences["sar"]
    dates = [str(np.datetime64(day, "D")) for day in (*image.days.tolist(), *radar.days.tolist())]
    assert dates == ["2020-01-15", "2019-10-15", "2019-10-15", "2020-02-15", "2020-02-15"]
    assert_array_equal(band(image, "B12")[0], optical[9])
    assert_array_equal(image.clear[0], np.arange(32)[:, None] >= 8 + np.zeros((1, 32)))
    assert_array_equal(band(radar, "VH")[3, 1:], arrays["f00d_S1_February"][3, 1:])
    assert not radar.clear[:, 0, 0].any()
    assert np.isnan(sample.lonlat).all()


def test_monthly_composites(built):
    (sample,) = built["worldcereal_monthly"]
    image, radar = sample.sequences["multispectral"], sample.sequences["sar"]
    source = arrays("worldcereal_monthly", "monthly_100x100")
    assert image.values.shape == (12, 100, 100, 9)
    assert "B8A" not in image.bands
    assert np.flatnonzero(~image.valid).tolist() == [1, 2]  # December and January, all clouded
    assert str(np.datetime64(int(image.days[0]), "D")) == "2020-11-15"
    assert_array_equal(band(image, "B11")[7], source["s2"][7, 7])
    assert_array_equal(image.clear, ((source["s2"] != 65_535) & (source["s2"] > 0)).all(1))
    assert_allclose(band(radar, "VH")[3], 20 * np.log10(source["s1_raw"][3, 1].astype(np.float64)) - 83, rtol=1e-5)
    # Bands of 20 m stand twice, those of 10 m don't: which is which shows in the order of bands.
    repeated = {b for b in image.bands if (band(image, b)[6, ::2] == band(image, b)[6, 1::2]).mean() > 0.9}
    assert repeated == {"B05", "B06", "B07", "B11", "B12"}
    summer = {b: band(image, b)[8].mean(dtype=float) for b in image.bands}  # July: fields in leaf
    assert summer["B08"] > 2 * summer["B04"]
    assert summer["B07"] > summer["B06"] > summer["B05"]


def test_cropharvest(built):
    (sample,) = built["cropharvest"]
    image, radar = sample.sequences["multispectral"], sample.sequences["sar"]
    (path,) = (DATA / "sample" / "cropharvest").glob("*.tif")
    with rasterio.open(path) as file:
        layers = file.read()
    assert image.sensor == "sentinel2-l1c"
    # 17 layers a month: VV, VH, thirteen bands of Sentinel-2, two of weather.
    assert_allclose(band(image, "B01")[0], layers[2])
    assert_allclose(band(image, "B12")[11], layers[11 * 17 + 14], rtol=1e-6)
    assert_allclose(band(image, "B8A")[5], layers[5 * 17 + 10], rtol=1e-6)
    assert_allclose(band(radar, "VH")[1], layers[17 + 1], rtol=1e-6)
    days = [str(np.datetime64(int(day), "D")) for day in (image.days[0], image.days[-1])]
    assert days == ["2019-02-21", "2020-01-17"]  # the middles of the first and the last 30 days of 2019-02-06 + 360
    assert sample.lonlat.tolist() == pytest.approx([1.4228, 7.7195], abs=1e-3)  # Togo


def geotiff(path, values, *, epsg=32633, left=404_400, top=5_342_400, gsd=10, **tags):
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = values.shape
    transform = rasterio.transform.from_origin(left, top, gsd, gsd)
    form = {"count": count, "height": height, "width": width, "dtype": values.dtype, "transform": transform}
    with rasterio.open(path, "w", driver="GTiff", crs=f"EPSG:{epsg}", **form) as file:
        file.write(values)
        file.update_tags(**tags)


def test_bigearthnet_v1(tmp_path):
    rng = np.random.default_rng(0)
    one, two = "S2A_MSIL2A_20170613T101031_87_48", "S1A_IW_GRDH_1SDV_20170614T165043_33UUP_87_48"
    folders = tmp_path / "BigEarthNet-S2-Example" / one, tmp_path / "BigEarthNet-S1-Example" / two
    optical = {}
    for name in get_sensor("sentinel2-l2a").names:
        gsd = {"B01": 60, "B09": 60, **dict.fromkeys(("B05", "B06", "B07", "B8A", "B11", "B12"), 20)}.get(name, 10)
        optical[name] = rng.integers(500, 3000, (1, 1200 // gsd, 1200 // gsd)).astype(np.uint16)
        geotiff(folders[0] / f"{one}_{name}.tif", optical[name], gsd=gsd)
    radar = rng.normal(-15, 2, (2, 1, 120, 120)).astype(np.float32)
    for name, values in zip(("VV", "VH"), radar, strict=True):
        geotiff(folders[1] / f"{two}_{name}.tif", values)
    (folders[0] / f"{one}_labels_metadata.json").write_text(json.dumps({"acquisition_date": "2017-06-13 10:10:31"}))
    about = {"corresponding_s2_patch": one, "acquisition_time": "2017-06-14T16:50:43"}
    (folders[1] / f"{two}_labels_metadata.json").write_text(json.dumps(about))
    (sample,) = load_builder(DATA / "bigearthnet.py").samples(tmp_path)
    image, sar = sample.sequences["multispectral"], sample.sequences["sar"]
    assert [str(np.datetime64(int(s.days[0]), "D")) for s in (image, sar)] == ["2017-06-13", "2017-06-14"]
    assert_array_equal(band(image, "B08")[0], optical["B08"][0])
    assert_array_equal(band(image, "B11")[0, 1::2, ::2], optical["B11"][0])
    assert_array_equal(band(image, "B01")[0, ::6, 5::6], optical["B01"][0])
    assert_array_equal(band(sar, "VH")[0], radar[1, 0])
    assert sample.lonlat.tolist() == pytest.approx([13.72, 48.22], abs=0.01)  # UTM 33 north, worked out by hand


def test_terramesh(tmp_path):
    rng = np.random.default_rng(0)
    optical = rng.integers(500, 3000, (12, 224, 224)).astype(np.int16)
    radar = rng.normal(-15, 2, (2, 224, 224)).astype(np.float32)
    geotiff(tmp_path / "S2L2A" / "a.tif", optical)
    geotiff(tmp_path / "S1RTC" / "a.tif", radar, datetime="2020-04-11T23:43:09.000000000")
    geotiff(tmp_path / "LULC" / "a.tif", optical[:1], datetime="2020-04-08T14:37:29.000000000")
    (sample,) = load_builder(DATA / "terramesh.py").samples(tmp_path)
    image, sar = sample.sequences["multispectral"], sample.sequences["sar"]
    assert [str(np.datetime64(int(s.days[0]), "D")) for s in (image, sar)] == ["2020-04-08", "2020-04-11"]
    assert_array_equal(band(image, "B11")[0], optical[10])  # Level-2A has no B10
    assert_array_equal(band(sar, "VH")[0], radar[1])


def test_bigearthnet_in_both_forms(built):
    forms = set()
    for sample in built["benv2"]:
        source = arrays("benv2", sample.id)
        optical, sar = sample.sequences["multispectral"], sample.sequences["sar"]
        assert optical.values.shape == (1, 120, 120, 12)
        merged = "s2" in source.files
        forms.add(merged)
        if merged:
            assert_array_equal(band(sar, "VH")[0], source["s1"][0])
        else:
            assert_array_equal(band(sar, "VH")[0], source["VH"][0])
            assert_array_equal(band(optical, "B01")[0, ::6, 5::6], source["B01"][0])
            assert_array_equal(band(optical, "B11")[0, 1::2, ::2], source["B11"][0])
        assert np.mean(band(sar, "VV") > band(sar, "VH")) > 0.85
        date = datetime.datetime.strptime(sample.id.split("_")[2][:8], "%Y%m%d").date()
        assert optical.days[0] == (date - datetime.date(1970, 1, 1)).days
        about = json.loads((DATA / "sample" / "benv2" / f"{sample.id}.json").read_text())
        assert sample.labels["classes"].sum() == len(about["labels"])  # every name is one of the nineteen
    assert forms == {True, False}


def test_pastis(built):
    for sample in built["pastis"]:
        source = arrays("pastis", sample.id)
        sequence, sar = sample.sequences["multispectral"], sample.sequences["sar"]
        assert sequence.values.dtype == np.int16
        assert_array_equal(np.moveaxis(sequence.values, -1, 1), source["s2"])
        assert sequence.extent.tolist() == [640, -640, -640, 640]
        assert len(sar.days) == 6
        assert (np.diff(sar.days) >= 0).all()
        # The first pass of each orbit, without loss from float16.
        both = np.concatenate([source["s1a"][:, 0], source["s1d"][:, 0]]).astype(np.float32)
        assert_array_equal(np.sort(band(sar, "VV").ravel()), np.sort(both.ravel()))
        crops = sample.labels["crops"]
        assert_array_equal(crops == -1, source["semantic"][0] == 19)
        assert crops.max() <= 18


def test_treesatai(built):
    sample = next(s for s in built["treesatai"] if s.id.startswith("Fraxinus"))
    source = arrays("treesatai", "Fraxinus_excelsior_9_30784_WEFL_NLF.tif")
    sequence = sample.sequences["multispectral"]
    assert_array_equal(band(sequence, "B08")[0], source["s2"][3])
    assert_array_equal(band(sequence, "B09")[0], source["s2"][11])
    # Order of the collection's paper; 10 m bands, then 20 m, then 60 m.
    order = ["B02", "B03", "B04", "B08", "B05", "B06", "B07", "B8A", "B11", "B12", "B01", "B09"]
    assert list(sequence.bands) == order
    assert sample.sequences["sar"].bands == ("VV", "VH")
    # The radar's grid begins at 429515, 5903715, the aerial image at 429510.6, 5903711.4: 3.6 m north of its edge.
    assert sample.sequences["sar"].extent.tolist() == pytest.approx([34, -26, -26, 34], abs=0.1)
    for sample in built["treesatai"]:
        # A forest in leaf reflects more in the near infrared than in the red: the band order is right.
        values = sample.sequences["multispectral"]
        assert band(values, "B08").mean() > 3 * band(values, "B04").mean()
        assert band(values, "B8A").mean() > band(values, "B05").mean()


def test_flair2_is_optical_only(built):
    (sample,) = built["flair2"]
    assert set(sample.sequences) == {"optical"}
    assert sample.sequences["optical"].bands == ("red", "green", "blue", "nir")
    about, source = load_builder(DATA / "flair2.py"), arrays("flair2", "sample_3325_IMG_034217")
    names = about.label_names(DATA)["land_cover"]
    seen = {names[number] for number in np.unique(sample.labels["land_cover"])}
    assert seen == {"bare soil", "water", "brushwood"}  # a lake and its beach: 4, 5 and 8 of FLAIR's list
    assert (sample.labels["land_cover"] == names.index("water")).sum() == (source["mask"] == 5).sum() > 0
    assert datetime.date(1970, 1, 1) + datetime.timedelta(int(sample.sequences["optical"].days[0])) == datetime.date(
        2019, 8, 26
    )
