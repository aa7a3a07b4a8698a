"""A plan (plan.py) in words, and as the object that `--json` writes."""

import collections
import re
from typing import Any

from skyjax.parallel import chips
from skyjax.parallel.hlo import Traffic
from skyjax.train.plan import GIB, Plan

LARGEST = 8  # buffers and collectives that are named
UNKNOWN = 5
GB = 1e9


def show(plan: Plan) -> str:
    """What a step takes, and what bounds it."""
    program, bounds = plan.program, plan.bounds
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    model = sum(plan.model_flops.values())
    of_parts = ", ".join(f"{part} {count / model:.0%}" for part, count in _by_part(plan.model_flops))
    each = "a chip" if plan.devices == plan.chips else "a device (half a chip)"
    slices = f" in {plan.slices} slices of {plan.topology}" if plan.slices > 1 else f", {plan.topology}"
    rows = [
        ("chips", f"{plan.chips}{slices}"),
        ("mesh", mesh),
        ("global batch", f"{plan.batch_size}: {plan.batch_size / plan.devices:g} {each}"),
        ("parameters", f"{plan.parameters / 1e6:,.0f} M"),
        (f"HBM {each}", _memory(plan)),
        ("model FLOPs", f"{model / 1e15:.3f} PFLOP a step: {of_parts}"),
        (
            "hardware FLOPs",
            f"{program.flops * plan.devices / 1e15:.3f} PFLOP a step, {program.flops / 1e12:.2f} T {each}",
        ),
        ("HBM traffic", f"{program.hbm_bytes / GB:.1f} GB {each}"),
    ]
    lines = [f"{name:16s} {text}" for name, text in rows]
    lines += ["", f"{'sent ' + each:28s} {'times':>7s} {'ICI, GB':>9s} {'DCN, GB':>9s}"]
    lines += [_traffic(kind, traffic) for kind, traffic in sorted(program.collectives.items())]
    lines += [
        "",
        f"A step takes at least {bounds.step_s * 1e3:.1f} ms, bound by {bounds.bound_by}: compute"
        f" {bounds.compute_s * 1e3:.1f} ms, memory {bounds.memory_s * 1e3:.1f}, ICI {bounds.ici_s * 1e3:.1f}, DCN"
        f" {bounds.dcn_s * 1e3:.1f}.",
        f"MFU is at most {plan.mfu_ceiling:.1%}: the model's FLOPs against {plan.chips} chips' peak for that long.",
    ]
    if program.unknown:
        # "name: what it is (where it comes from)"
        kinds = collections.Counter(re.sub(r"^\S+: | \([^()]*\)$", "", unknown) for unknown in program.unknown)
        lines.append("Not counted: " + "; ".join(f"{count} x {kind}" for kind, count in kinds.most_common(UNKNOWN)))
    lines.append(f"Compiled in {plan.compile_seconds:.0f} s with {plan.compile_bytes / GIB:.1f} GiB.")
    return "\n".join(lines)


def shortfall(plan: Plan) -> str:
    """Why a step does not fit, and what would help."""
    memory = plan.memory
    lines = [
        f"It does not fit: {memory.peak / GIB:.2f} GiB of {memory.limit / GIB:.2f} on every device,"
        f" {memory.shortfall / GIB:.2f} GiB too much. The largest arrays:",
    ]
    lines += [
        f"  {buffer.bytes / GIB:7.2f} GiB  {buffer.shape:28s} {buffer.name}  {buffer.op_name}"
        for buffer in plan.program.largest_buffers[:LARGEST]
    ]
    helps = []
    if memory.temporaries > memory.arguments:
        helps.append("model.remat=full, where it is not yet")
        if plan.batch_size > plan.devices:
            helps.append(f"a smaller batch_size (now {plan.batch_size / plan.devices:g} samples a device)")
            helps.append("more micro_batches")
    else:
        helps.append(f"a larger mesh.fsdp (now {plan.mesh['fsdp']}), which splits state and gradients")
    helps.append("more chips, or chips with more memory")
    return "\n".join([*lines, f"What would help: {'; '.join(helps)}."])


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain numbers; bytes and FLOPs of the program are of one device."""
    memory, program, bounds = plan.memory, plan.program, plan.bounds
    return {
        "topology": plan.topology,
        "slices": plan.slices,
        "chips": plan.chips,
        "devices": plan.devices,
        "mesh": plan.mesh,
        "batch_size": plan.batch_size,
        "parameters": plan.parameters,
        "fits": memory.shortfall == 0,
        "hbm_bytes": {
            "arguments": memory.arguments,
            "temporaries": memory.temporaries,
            "code": memory.code,
            "peak": memory.peak,
            "limit": memory.limit,
            "share": memory.share,
            "shortfall": memory.shortfall,
            "compilers_peak": memory.live,
        },
        "model_flops": {"total": sum(plan.model_flops.values()), **plan.model_flops},
        "hardware_flops": program.flops,
        "hbm_traffic_bytes": program.hbm_bytes,
        "collectives": {
            kind: {"count": traffic.count, "ici_bytes": traffic.ici_bytes, "dcn_bytes": traffic.dcn_bytes}
            for kind, traffic in program.collectives.items()
        },
        "largest_collectives": [
            {
                "name": collective.name,
                "kind": collective.kind,
                "op_name": collective.op_name,
                "count": collective.traffic.count,
                "ici_bytes": collective.traffic.ici_bytes,
                "dcn_bytes": collective.traffic.dcn_bytes,
            }
            for collective in program.largest_collectives
        ],
        "largest_buffers": [
            {"name": buffer.name, "shape": buffer.shape, "bytes": buffer.bytes, "op_name": buffer.op_name}
            for buffer in program.largest_buffers
        ],
        "not_counted": list(program.unknown),
        "least_seconds": {
            "compute": bounds.compute_s,
            "memory": bounds.memory_s,
            "network": bounds.network_s,
            "ici": bounds.ici_s,
            "dcn": bounds.dcn_s,
            "step": bounds.step_s,
        },
        "bound_by": bounds.bound_by,
        "mfu_ceiling": plan.mfu_ceiling,
        "peaks": chips.chip(plan.topology.split(":")[0]).source,
        "compile_seconds": plan.compile_seconds,
        "compile_bytes": plan.compile_bytes,
    }


def _memory(plan: Plan) -> str:
    memory = plan.memory
    code = f" + {memory.code / GIB:.2f} code" if memory.code is not None else ""
    live = f"; XLA's own peak, without gaps but with VMEM, {memory.live / GIB:.2f}" if memory.live is not None else ""
    return (
        f"{memory.peak / GIB:.2f} GiB of {memory.limit / GIB:.2f}, {memory.share:.0%}: {memory.arguments / GIB:.2f}"
        f" arguments + {memory.temporaries / GIB:.2f} temporaries{code}{live}"
    )


def _by_part(parts: dict[str, int]) -> list[tuple[str, int]]:
    """Heads and up-heads as one each, the largest first."""
    joined: dict[str, int] = {}
    for part, count in parts.items():
        name = part.split("/")[0].replace("_", "-")
        joined[name] = joined.get(name, 0) + count
    return sorted(joined.items(), key=lambda item: -item[1])


def _traffic(kind: str, traffic: Traffic) -> str:
    return f"{kind:28s} {traffic.count:7,d} {traffic.ici_bytes / GB:9.3f} {traffic.dcn_bytes / GB:9.3f}"
