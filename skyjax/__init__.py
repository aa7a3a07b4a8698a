"""skyjax pre-trains remote-sensing foundation models in JAX.

model = skyjax.load("runs/pretrain_sample")
features = model.encode(sample)["pooled"]
"""

import glob
import importlib.metadata
import os
import sys
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from skyjax.train.pretrained import Pretrained

__version__ = importlib.metadata.version("skyjax")

# jaxlib 0.10.2 has a CPU fusion that can give wrong numbers silently (docs/findings.md); an empty value turns it off.
# It must stand in XLA_FLAGS before jax starts its backend, so it is set here, on the first import of skyjax.
_JAXLIB_WITH_WRONG_FUSION = ("0.10.2",)
_FUSION_OFF = "--xla_cpu_experimental_ynn_fusion_type="


def _turn_wrong_fusion_off() -> None:
    if importlib.metadata.version("jaxlib") not in _JAXLIB_WITH_WRONG_FUSION:
        return
    flags = os.environ.get("XLA_FLAGS", "")
    if _FUSION_OFF in flags:
        return
    os.environ["XLA_FLAGS"] = f"{flags} {_FUSION_OFF}".strip()
    bridge = sys.modules.get("jax._src.xla_bridge")
    if bridge is not None and bridge.backends_are_initialized():
        warnings.warn(
            f"jax computed before skyjax was imported, too late to turn off a wrong fusion of jaxlib on the CPU:"
            f" import skyjax first, or set XLA_FLAGS={_FUSION_OFF}",
            RuntimeWarning,
            stacklevel=3,
        )


_turn_wrong_fusion_off()

# libtpu reads these when it is loaded. Where it is installed and no TPU is there, it would look for one and complain.
_NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
if not (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/*")):
    for _name, _value in _NO_TPU_HERE.items():
        os.environ.setdefault(_name, _value)


def load(path: str | os.PathLike[str]) -> "Pretrained":
    """A model with its config and statistics: of a run's directory, one of its checkpoints, or a weights folder."""
    from skyjax.train.pretrained import Pretrained

    return Pretrained.load(path)
