import numpy as np
import pytest

from skyjax.input.captions import captions, class_words, prompts, statement
from skyjax.sample import Sample, make_sequence

NOWHERE = np.full(2, np.nan, np.float32)
NAMES = {"classes": ["Forest", "SeaLake", "Background", "River"]}


def day(text):
    return np.datetime64(text, "D").astype(int)


def made(labels, names=NAMES, number=40, **about):
    """Captions of nothing but labels."""
    sample = Sample({}, NOWHERE, labels={name: np.asarray(value) for name, value in labels.items()}, **about)
    return captions(sample, names, seed=0, number=number)


def radar_site(days, lonlat, site="1"):
    values = np.full((len(days), 2, 2, 2), -10, np.float32)
    sequence = make_sequence(values, "sentinel1-grd", ("VV", "VH"), days=np.array([day(d) for d in days]))
    return Sample({"sar": sequence}, np.array(lonlat, np.float32), id=site)


def test_a_class_number_is_named_and_an_unlabelled_one_is_not():
    found = made({"classes": np.int16(1)})
    assert len(found) >= 5
    assert all("a sea or lake" in text for text in found)
    for silent in (-1, 2, 9):  # unlabelled, "Background", without a name
        assert made({"classes": np.int16(silent)}) == ()


def test_several_classes_stand_in_any_order_and_unlabelled_ones_nowhere():
    found = made({"classes": np.array([1, 0, 1, 1], np.uint8)})
    assert all("forest" in text and "a river" in text for text in found)
    assert not any("sea" in text or "background" in text for text in found)
    assert any(text.index("forest") < text.index("river") for text in found)
    assert any(text.index("forest") > text.index("river") for text in found)
    assert made({"classes": np.array([1, -1, 0, 0])}) == ()


def test_a_map_gives_shares_of_its_labelled_pixels():
    classes = np.full((10, 10), -1)
    classes[:5], classes[5:7] = 3, 0
    found = made({"classes": classes})
    assert any("71 % a river and 29 % forest" in text for text in found)
    assert any("mostly a river, with forest" in text for text in found)
    assert all(text.index("river") < text.index("forest") for text in found)
    classes[:] = 2
    classes[:5] = 3
    # Half of it is background: that is no place of nothing but a river.
    assert not any("nothing but" in text or "throughout" in text for text in made({"classes": classes}))
    assert any("50 % a river" in text for text in made({"classes": classes}))


def test_fractions_are_shares():
    found = made({"classes": np.array([0.2, 0.01, 0.0, 0.79])})
    assert any("79 % a river and 20 % forest" in text for text in found)
    assert not any("sea" in text for text in found)


def test_codes_have_names_by_source():
    labels = {"crop_type": np.array([[1110, 1200], [1110, -1]])}
    found = made(labels, names={}, source="worldcereal")
    assert all("winter wheat" in text and "maize" in text for text in found)
    assert made(labels, names={}, source="elsewhere") == ()


def test_labels_and_questions_take_turns():
    sample = Sample({}, NOWHERE, labels={"classes": np.array(0)}, id="7")
    pairs = [
        ("Is there a road?", "no"),
        ("How many roads are there?", "0"),
        ("Is it a rural or an urban area", "urban"),
    ]
    found = captions(sample, NAMES, seed=0, number=20, questions=pairs)
    of_labels = ["forest" in text for text in found]
    assert of_labels[:4] in ([True, False, True, False], [False, True, False, True])
    for text, of_label in zip(found, of_labels, strict=True):
        assert of_label != ("road" in text or "an urban area" in text)


def test_place_and_date_are_those_of_the_sample():
    found = captions(radar_site(["2018-07-02"], (9.7, 52.2)), seed=0, number=60)
    assert any("at 52° N, 10° E" in text for text in found)
    assert any("in the northern temperate zone" in text for text in found)
    assert any("in July 2018" in text for text in found)
    assert any("in summer 2018" in text for text in found)
    assert all("image" in text and "series" not in text for text in found)
    south = captions(radar_site(["2018-07-02"], (-60.2, -40)), seed=0, number=60)
    assert any("in winter 2018" in text for text in south)
    assert any("40° S, 60° W" in text for text in south)
    tropics = captions(radar_site(["2018-07-02"], (10, 5)), seed=0, number=60)
    assert any("in the tropics" in text for text in tropics)
    assert not any(season in text for text in tropics for season in ("summer", "winter"))


def test_a_series_tells_its_span():
    found = captions(radar_site(["2018-03-02", "2018-05-02", "2019-01-30"], (9.7, 52.2)), seed=0, number=60)
    assert any("from March 2018 to January 2019" in text for text in found)
    assert any("over 3 dates" in text for text in found)
    assert all("series" in text for text in found)


def test_an_unknown_place_and_day_are_not_told():
    found = captions(radar_site(["1970-01-01"], NOWHERE), seed=0, number=60)  # day 0 is unknown
    assert found
    assert not any("°" in text or "19" in text or " zone" in text for text in found)


def test_without_metadata_an_image_is_an_image():
    sample = Sample(
        radar_site(["2018-07-02"], (9.7, 52.2)).sequences,
        np.array([9.7, 52.2], np.float32),
        labels={"classes": np.array(0)},
    )
    found = captions(sample, NAMES, seed=0, number=40, metadata=False)
    assert all("forest" in text for text in found)
    assert not any("radar" in text or "Sentinel" in text or "°" in text or "2018" in text for text in found)
    assert captions(radar_site(["2018-07-02"], (9.7, 52.2)), seed=0, number=4, metadata=False) == ()


def test_captions_are_a_function_of_sample_seed_and_number():
    sample = radar_site(["2018-07-02"], (9.7, 52.2))
    first = captions(sample, seed=3, number=6)
    assert captions(sample, seed=3, number=6) == first
    assert captions(sample, seed=3, number=3) == first[:3]
    assert len(set(first)) == 6
    assert captions(sample, seed=4, number=6) != first
    assert captions(radar_site(["2018-07-02"], (9.7, 52.2), "2"), seed=3, number=6) != first
    # Written down: a change of the draws would change what a run that goes on is fed.
    assert first[0] == "a Sentinel-1 image of the Earth's surface in summer 2018"


@pytest.mark.parametrize(
    ("question", "answer", "want"),
    [
        ("Is it a rural or an urban area", "rural", "a rural area"),
        ("Is it a rural or an urban area", "urban", "an urban area"),
        ("Is there a circular nature reserve?", "no", "no circular nature reserve"),
        ("Is a road at the top of a  forest present in the image?", "yes", "a road at the top of a forest"),
        ("What is the amount of roads?", "30", "30 roads"),
        ("How many water areas are there in the image?", "0", "no water areas"),
        ("Are there more roads than forests?", "yes", "more roads than forests"),
        ("Are there less roads than forests?", "no", "not less roads than forests"),
        ("Is the number of roads equal to the number of forests?", "yes", "as many roads as forests"),
        ("What is the area covered by buildings?", "578m2", "578m2 of buildings"),
        ("What colour is the roof?", "red", "What colour is the roof: red"),
        ("Is there a road?", "perhaps", "Is there a road: perhaps"),
    ],
)
def test_questions_become_phrases(question, answer, want):
    assert statement(question, answer) == want


def test_names_of_classes_in_words():
    assert class_words("HerbaceousWetland") == "herbaceous wetland"
    assert class_words("Herbaceous_wetland") == "herbaceous wetland"
    assert class_words("SeaLake") == "a sea or lake"
    assert class_words("Beaches, dunes, sands") == "beaches, dunes, sands"


def test_prompts_hold_the_name_each_in_another_way():
    found = prompts("SeaLake")
    assert len(set(found)) == len(found) >= 16
    assert all(text.count("a sea or lake") == 1 and "{" not in text for text in found)
