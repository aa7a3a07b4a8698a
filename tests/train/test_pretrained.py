"""A checkpoint as its users see it."""

import json

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose

import skyjax
from skyjax.convert import export
from skyjax.errors import UserError
from skyjax.evals import probe
from skyjax.input.records import RecordSource
from skyjax.models import skysense
from skyjax.sensors import statistics
from skyjax.train import checkpoint, loop


@pytest.fixture(scope="module")
def saved(config, first, tmp_path_factory):
    """A workdir with the checkpoint of step 4, whose teacher is not its student."""
    state = {**first, "step": first["step"] + 4, "teacher": jax.tree.map(lambda x: x * 1.5, first["teacher"])}
    workdir = tmp_path_factory.mktemp("saved")
    with checkpoint.CheckpointWriter(workdir, config.checkpoint) as writer:
        notes = {"step": 4, "position": 32, "config": config.to_dict(), "versions": loop.versions()}
        writer.save(state, {**notes, "statistics": loop.statistics_table(config.model)})
    return workdir, state["teacher"]["encoder"]


@pytest.fixture(scope="module")
def samples(sample_records):
    source = RecordSource(sample_records)
    return [source[i] for i in range(9)]


def test_it_is_the_teacher_with_its_config(saved, config):
    workdir, teacher = saved
    model = skyjax.load(workdir)
    jax.tree.map(np.testing.assert_array_equal, model.params, teacher)
    assert model.step == 4
    assert model.config.model.spatial_width == config.model.spatial_width


def test_what_is_evaluated_and_exported_is_the_teacher(saved, first, tmp_path, monkeypatch):
    workdir, teacher = saved
    probed = []
    monkeypatch.setattr(probe, "compare", lambda model, *_: probed.append(model) or {})
    probe.run(workdir, "knn", "a folder")
    export.run(workdir, "safetensors", tmp_path / "out")
    for model in (*probed, skyjax.load(tmp_path / "out")):
        jax.tree.map(np.testing.assert_array_equal, model.params, teacher)
    student = first["params"]["encoder"]["fusion"]["projection"]["kernel"]
    assert not np.array_equal(student, teacher["fusion"]["projection"]["kernel"])


def test_the_table_of_geo_prototypes_comes_along(saved, first):
    np.testing.assert_array_equal(skyjax.load(saved[0]).prototypes, first["prototypes"])


def test_a_weights_folder_is_the_same_model(saved, samples, tmp_path):
    model = skyjax.load(saved[0])
    model.save(tmp_path)
    again = skyjax.load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    assert again.config.to_dict() == model.config.to_dict()
    for name in ("statistics", "step", "source", "data", "licence"):
        assert getattr(again, name) == getattr(model, name), name
    jax.tree.map(np.testing.assert_array_equal, again.encode(samples[2]), model.encode(samples[2]))


WRONG = {
    "no weights": (lambda folder, _: (folder / "model.safetensors").unlink(), "model.safetensors.* cannot be read"),
    "truncated": (lambda folder, _: truncate(folder / "model.safetensors"), "model.safetensors.* cannot be read"),
    "no json": (lambda folder, _: (folder / "skyjax.json").write_text("{"), "skyjax.json.* cannot be read"),
    "not ours": (
        lambda folder, _: (folder / "skyjax.json").write_text("[]"),
        "not the description of a weights folder",
    ),
    "newer": (lambda folder, notes: write(folder, notes | {"format": 2}), "has format 2 and this skyjax reads 1"),
    "no model": (lambda folder, notes: write(folder, notes | {"config": {}}), 'config has no "model"'),
    "another model": (
        lambda folder, notes: write(folder, with_spatial_width(notes, 32)),
        "of another shape: .*fusion.projection.kernel",
    ),
    "another depth": (
        lambda folder, notes: write(folder, with_depth(notes, 2)),
        "missing: sar.layers.1.attention.key.bias",
    ),
    "a strange config": (lambda folder, notes: write(folder, without_fusion(notes)), "config: .*fusion"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_with_a_weights_folder_is_told(wrong, saved, tmp_path):
    change, sentence = WRONG[wrong]
    skyjax.load(saved[0]).save(tmp_path)
    change(tmp_path, json.loads((tmp_path / "skyjax.json").read_text()))
    with pytest.raises(UserError, match=sentence):
        skyjax.load(tmp_path)


def write(folder, notes):
    (folder / "skyjax.json").write_text(json.dumps(notes))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-4])


def with_spatial_width(notes, width):
    notes["config"]["model"]["spatial_width"] = width
    return notes


def with_depth(notes, depth):
    notes["config"]["model"]["modalities"]["sar"]["depth"] = depth
    return notes


def without_fusion(notes):
    del notes["config"]["model"]["fusion"]
    return notes


def test_encode_equals_the_model_on_images_normalised_by_hand(saved, samples, config, first):
    workdir, teacher = saved
    sample = samples[2]
    got = skyjax.load(str(workdir)).encode(sample)
    images = {}
    for modality, bands in (("multispectral", [0, 1, 2]), ("sar", [0, 1])):
        sequence, part = sample.sequences[modality], config.model.modalities[modality]
        mean, std = statistics(part.sensors, part.bands)
        images[modality] = {
            "values": (np.float32(sequence.values[..., bands]) - mean[0])[None] / std[0],
            "days": sequence.days[None],
            "valid": sequence.valid[None],
            "clear": sequence.clear[None],
            "bands": np.ones((1, len(bands)), bool),
        }
    want = skysense.apply(config.model, teacher, images, lonlat=sample.lonlat[None], prototypes=first["prototypes"])
    assert got["fused"].shape == (1, 8, 8, config.model.fusion.width)
    # float32 rounds by the size of the numbers, and a compiled program in another order than one run op by op.
    for found, wanted in (
        (got["fused"], want["fused"]),
        (got["context"], want["context"]),
        (got["spatial"]["sar"], want["spatial"]["sar"]),
    ):
        assert_allclose(found, wanted, atol=1e-5 * float(np.abs(wanted).max()))
    assert isinstance(got["pooled"], np.ndarray)


def test_samples_together_equal_samples_alone(saved, samples):
    """Of different numbers of dates, with and without radar."""
    model = skyjax.load(saved[0])
    together = model.encode([samples[0], samples[2], samples[6]])
    for row, number in enumerate((0, 2, 6)):
        assert_allclose(together["pooled"][row], model.encode(samples[number])["pooled"][0], atol=1e-5)


def test_size_resamples(saved, samples):
    output = skyjax.load(saved[0]).encode(samples[0], size={"multispectral": (4, 6)})
    assert output["fused"].shape[1:3] == (4, 6)


def test_what_cannot_be_seen_is_told(saved, samples):
    with pytest.raises(UserError, match='"site 7" has no valid date of multispectral, sar'):
        skyjax.load(saved[0]).encode(samples[7])  # optical only, which this model does not have


def test_no_checkpoint_is_told(tmp_path):
    with pytest.raises(UserError, match="holds none; train first"):
        skyjax.load(tmp_path)
