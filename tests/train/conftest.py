"""One small model, compiled once, for all tests of training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skyjax.input.loader import Loader
from skyjax.parallel.mesh import make_mesh
from skyjax.parallel.sharding import batch_sharding
from skyjax.train import loop, state

STEPS = 30
# A table of 4 MiB: sharding.SMALL, so that it is spread over the devices of a mesh with an axis for that.
PROTOTYPES = {"regions": 16, "count": 16, "width": 256, "momentum": 0.9, "epsilon": 0.05, "iterations": 3}


@pytest.fixture(scope="package", autouse=True)
def _quick_compilation(compiled_quickly):
    with compiled_quickly():
        yield


@pytest.fixture(scope="session")
def config(tiny_config, sample_records, more_records):
    """Two modalities and geo-prototypes, 30 steps of 8 samples; what a resumed run may change needs no compiling.

    What could make a run differ from another is on: a mixture of sources with different modalities, threads that read
    ahead, gradient accumulation, dropping of dates and modalities, drop path.
    """
    config = tiny_config(
        modalities=("multispectral", "sar"),
        steps=STEPS,
        batch_size=8,
        micro_batches=2,
        checkpoint__every=10,
        data__threads=2,
        data__prefetch=2,
        data__local_views__count=0,
        model__prototypes=PROTOTYPES | {"frozen": False},
    )
    with config.unlocked():
        config.data.sources = ((str(sample_records), 0.7), (str(more_records), 0.3))
    assert min(config.data.augment.drop_modality, config.data.augment.drop_date, config.model.drop_path) > 0
    return config


@pytest.fixture(scope="package")
def first(config, _quick_compilation):
    """The state of step 0; copy it before it is donated."""
    return state.create(config, make_mesh(config.mesh))


@pytest.fixture(scope="package")
def jitted(config, first):
    """The step of that config; compiles at its first call, and not again if it is called as the loop calls it."""
    return loop.jit_step(config, loop.statistics_table(config.model), first, make_mesh(config.mesh))


@pytest.fixture(scope="package")
def step(config, jitted):
    """`jitted`, called as the loop calls it: under the mesh."""
    mesh = make_mesh(config.mesh)

    def call(state, batch):
        with jax.set_mesh(mesh):
            return jitted(state, batch)

    return call


@pytest.fixture(scope="package")
def batch(config):
    """The first batch, on the device."""
    loader = Loader(config)
    host = next(loader)
    loader.close()
    return jax.device_put(host, batch_sharding(make_mesh(config.mesh)))


def _use(patch, first, jitted):
    patch.setattr(loop, "jit_step", lambda *_: jitted)
    patch.setattr(loop.states, "create", lambda *_: jax.tree.map(jnp.copy, first))


@pytest.fixture
def quick(monkeypatch, first, jitted):
    """Lets loop.train use `first` and `jitted` instead of compiling for itself."""
    _use(monkeypatch, first, jitted)


@pytest.fixture(scope="package")
def undisturbed_run(first, jitted, tmp_path_factory):
    """A function (config, evaluators) that gives the folder of a run which nobody touched."""

    def train(config, evaluators=()):
        workdir = tmp_path_factory.mktemp("undisturbed") / "run"
        with pytest.MonkeyPatch.context() as patch:
            _use(patch, first, jitted)
            assert loop.train(config, workdir, evaluators=evaluators) == 0
        return workdir

    return train


@pytest.fixture(scope="package")
def straight(config, undisturbed_run):
    """The run of `config`, never stopped; copy its folder before it is changed."""
    return undisturbed_run(config)


def leaves(tree):
    """Path -> numpy array."""
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.fixture(scope="session")
def assert_same_bits():
    """A function that holds two trees to be equal bit for bit."""

    def check(got, want):
        got, want = leaves(got), leaves(want)
        assert got.keys() == want.keys()
        different = [path for path in got if got[path].tobytes() != want[path].tobytes()]
        assert not different

    return check
