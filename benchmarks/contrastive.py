"""What the image-text loss alone keeps in a chip's HBM at large batches: all scores at once, and around a ring.

PYTHONPATH=. python benchmarks/contrastive.py [--topology=v5e:16x16] [--sites=32768,131072] [--captions=2] [--width=768]
    [--json=FILE]

The softmax loss of unit vectors of images and captions with its gradient for both, planned for TPUs that are not there
as `skyjax compile` does it (needs pip install "jax[tpu]"). "dense" gathers the captions and scores all of them at once,
as a plain implementation does; "ring" is what training chooses at these sizes (skyjax/objectives/contrastive.py).
"""

import argparse
import json
import os
import pathlib
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import ml_collections

from skyjax.objectives import contrastive
from skyjax.parallel import hlo, topology
from skyjax.parallel.ahead import compile_ahead
from skyjax.parallel.mesh import make_mesh
from skyjax.parallel.sharding import batch_sharding

FORMS: tuple[contrastive.Form, ...] = ("ring", "dense")
MESH = {"data": -1, "fsdp": 1, "tensor": 1}


def lower(name: str, form: contrastive.Form, sites: int, captions: int, width: int) -> Any:
    """The lowered loss and its gradient."""
    mesh = make_mesh(ml_collections.ConfigDict(MESH), topology.describe(name, 1))
    rows = batch_sharding(mesh)

    def loss(vectors: tuple[Any, Any], valid: Any, words: Any) -> jax.Array:
        return contrastive.softmax(vectors[0], vectors[1], valid, 0.05, words, form).mean()

    def struct(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((sites, *shape), dtype, sharding=rows)

    vectors = struct(width), struct(captions, width)
    with jax.set_mesh(mesh):
        valid, words = struct(captions, dtype=bool), struct(captions, dtype=jnp.int32)
        return jax.jit(jax.value_and_grad(loss)).trace(vectors, valid, words).lower(lowering_platforms=("tpu",))


def main() -> None:
    """Prints a line for each form and size as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:16x16")
    parser.add_argument("--sites", default="32768,131072", help="global batches (32768,131072)")
    parser.add_argument("--captions", type=int, default=2, help="of a site (2)")
    parser.add_argument("--width", type=int, default=768, help="of the vectors (768)")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    args = parser.parse_args()

    rows = []
    print(f"{args.topology}, {args.captions} captions a site, width {args.width}: of a chip")
    print(f"{'sites':>8}  {'form':6}{'temporaries, MiB':>18}{'sent, MB':>10}{'TFLOP':>8}")
    for sites in map(int, args.sites.split(",")):
        for form in FORMS:
            arguments = (args.topology, form, sites, args.captions, args.width)
            found = compile_ahead(lower, arguments, say=lambda _: None)
            program = hlo.analyse(found.text, [0] * len(topology.describe(args.topology, 1)))
            sent = sum(traffic.ici_bytes for traffic in program.collectives.values())
            row = {
                "sites": sites,
                "form": form,
                "temporary_bytes": found.temporary_bytes,
                "ici_bytes": sent,
                "flops": program.flops,
            }
            rows.append(row)
            mebibytes = found.temporary_bytes / 2**20
            print(f"{sites:8}  {form:6}{mebibytes:18,.1f}{sent / 1e6:10,.1f}{program.flops / 1e12:8.2f}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"topology": args.topology, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
