"""Configs: overrides keep types, typos name the nearest key, and what is saved is what is read."""

import pathlib

import pytest

from skyjax.config import keys, load_config, read_config, to_json
from skyjax.errors import UserError

CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "pretrain_sample.py"


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("steps=7", "steps", 7),
        ("optimizer.learning_rate=1", "optimizer.learning_rate", 1.0),
        ("model.scan=false", "model.scan", False),
        ("model.dtype=bfloat16", "model.dtype", "bfloat16"),
        ("model.modalities.optical.depths=(1,1)", "model.modalities.optical.depths", (1, 1)),
        ("data.sources=(('a', 1.0), ('b', 0.5))", "data.sources", (("a", 1.0), ("b", 0.5))),
    ],
)
def test_override_keeps_the_type(override, key, value):
    config = load_config(CONFIG, [override])
    for part in key.split("."):
        config = config[part]
    assert config == value
    assert type(config) is type(value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "optimizer.learning_rte=1",
            'config: "optimizer.learning_rte" does not exist; nearest: "optimizer.learning_rate"',
        ),
        ("stepps=1", 'config: "stepps" does not exist; nearest: "steps"'),
        ("steps=many", 'config: "steps" is a int'),
        ("steps=1.5", 'config: "steps" is a int'),
        ("model.scan=1", 'config: "model.scan" is a bool'),
        ("optimizer=3", 'config: "optimizer" is a group'),
        ("steps", 'config: "--config.steps" needs a value'),
        ("steps.x=1", 'config: "steps.x" does not exist'),
    ],
)
def test_mistakes_are_named(override, message):
    with pytest.raises(UserError) as error:
        load_config(CONFIG, [override])
    assert str(error.value).startswith(message)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        load_config(tmp_path / "none.py")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(UserError, match=r"no function get_config\(\)"):
        load_config(tmp_path / "empty.py")
    (tmp_path / "broken.py").write_text("def get_config(:\n")
    with pytest.raises(UserError, match="line 1 is not Python"):
        load_config(tmp_path / "broken.py")


@pytest.fixture
def with_parameters(tmp_path):
    """A config file that is called with what the command line says."""
    path = tmp_path / "family.py"
    path.write_text("""
import ml_collections
from skyjax.errors import UserError
def get_config(size="huge", layers=4):
    if size not in ("tiny", "huge"):
        raise UserError(f'config: size "{size}" is not known; it is tiny or huge')
    return ml_collections.ConfigDict({"width": {"tiny": 8, "huge": 64}[size], "depth": layers})
""")
    return path


def test_parameters_of_get_config_are_keys(with_parameters):
    assert load_config(with_parameters).to_dict() == {"size": "huge", "layers": 4, "width": 64, "depth": 4}
    # The order of the words does not matter: what get_config makes of its parameters can be overridden.
    config = load_config(with_parameters, ["depth=5", "size=tiny", "layers=3"])
    assert config.to_dict() == {"size": "tiny", "layers": 3, "width": 8, "depth": 5}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("size=medium", 'config: size "medium" is not known; it is tiny or huge'),
        ("layers=many", 'config: "layers" is a int'),
        ("sise=tiny", 'config: "sise" does not exist; nearest: "size"'),
        ("size", 'config: "--config.size" needs a value'),
    ],
)
def test_mistakes_in_parameters_are_named(with_parameters, override, message):
    with pytest.raises(UserError) as error:
        load_config(with_parameters, [override])
    assert str(error.value).startswith(message)


def test_a_parameter_without_a_default_is_refused(tmp_path):
    (tmp_path / "bare.py").write_text("def get_config(size):\n    return None\n")
    with pytest.raises(UserError, match=r'parameter "size" .* has no default'):
        load_config(tmp_path / "bare.py")


def test_saved_config_reads_back(tmp_path):
    config = load_config(CONFIG)
    path = tmp_path / "config.json"
    path.write_text(to_json(config))
    assert list(keys(read_config(path))) == sorted_keys(config)
    assert to_json(read_config(path)) == to_json(config)
    path.write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        read_config(path)


def sorted_keys(config):
    """Keys in the order of the saved file, which sorts each group."""
    import json

    import ml_collections

    return list(keys(ml_collections.ConfigDict(json.loads(to_json(config)))))


def test_config_is_locked():
    config = load_config(CONFIG)
    with pytest.raises(AttributeError):
        config.batchsize = 1


RULES = """
import ml_collections

def get_config():
    return ml_collections.ConfigDict({
        "batch_size": 8,
        "model": {"remat": "full"},
        "mesh_rules": (
            (r"v5e:4x4", {"batch_size": 16}),
            (r"v5e:.*", {"batch_size": 32, "model.remat": "none"}),
            (r"bad", {"model.rematt": "none"}),
        ),
    })
"""


def test_the_first_rule_that_fits_the_topology_is_applied_before_the_overrides(tmp_path):
    path = tmp_path / "ruled.py"
    path.write_text(RULES)

    def values(topology, *overrides):
        config = load_config(path, overrides, topology)
        return config.batch_size, config.model.remat

    assert values(None) == values("cpu:8") == (8, "full")
    assert values("v5e:4x4") == (16, "full")
    assert values("v5e:8x8") == values("v5e:4x4*2") == (32, "none")
    assert values("v5e:8x8", "batch_size=64") == (64, "none")
    with pytest.raises(UserError, match=r'"model.rematt" does not exist; nearest: "model.remat"'):
        values("bad")
