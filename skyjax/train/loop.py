"""The training loop: a config and a folder in, a trained run that can be started again out.

The order of the loop's body (CONTRIBUTING.md, rule 4) is what makes a resumed run equal to one that was never
stopped: evaluate and save the old state before the next batch is drawn, and write the metrics before the checkpoint.
"""

import contextlib
import importlib.metadata
import json
import logging
import os
import pathlib
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from skyjax import __version__
from skyjax.config import to_json
from skyjax.errors import UserError
from skyjax.input.loader import ORDER, Loader, device_batches
from skyjax.input.tokenizer import FILE as TOKENIZER
from skyjax.input.tokenizer import Tokenizer
from skyjax.input.views import plan_views
from skyjax.models.parameters import parts, show, table
from skyjax.parallel import distributed, flops, topology
from skyjax.parallel.mesh import make_mesh
from skyjax.parallel.sharding import batch_sharding, check_batch_size, replicated, state_shardings, with_shardings
from skyjax.sensors import statistics
from skyjax.train import checkpoint
from skyjax.train import state as states
from skyjax.train.goodput import Device, Ledger, summary
from skyjax.train.hosts import Hosts, compile_together, count_bad, fingerprint, leave_when_broken, share_of_batch
from skyjax.train.metrics import Journal, cannot_write, is_due
from skyjax.train.preemption import EXIT_PREEMPTED, Preemption
from skyjax.train.profiling import Profiler, parse_window
from skyjax.train.start import take_over
from skyjax.train.step import Metrics, make_step
from skyjax.train.watchdog import Watchdog

log = logging.getLogger(__name__)

EXIT_DONE, EXIT_FAILED = 0, 1
ABOUT_THE_RUN = ("git", "hardware", "command")  # in versions.json, beside versions of packages
NONFINITE_LIMIT = 10  # updates skipped in a row that end a run

# (state, step, stop) -> numbers. It runs on all processes. It calls `stop` every few seconds, on all processes alike;
# once that is true, its numbers are not wanted any more.
Evaluator = Callable[[states.State, int, Callable[[], bool]], Mapping[str, float]]


def train(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    *,
    evaluators: Sequence[Evaluator] = (),
    report: Callable[[pathlib.Path], Any] | None = None,
    profile: str = "",
    config_for: Callable[[str], ml_collections.ConfigDict] | None = None,
) -> int:
    """Trains to `config.steps`; goes on from the newest checkpoint where `workdir` holds one.

    Where the environment names several processes (parallel/distributed.py), all of them call this alike with one
    `workdir` that all can read and write. The first writes metrics and reports, all write their part of a checkpoint.

    Args:
      config: the experiment.
      workdir: gets config.json, versions.json, metrics.jsonl, goodput.json, tensorboard/ and checkpoints/.
      evaluators: called every `config.eval.every` steps with the state and the step; their numbers join that step's
        line of metrics.jsonl. One that fails is named in a warning and the run goes on.
      report: called with `workdir` when training is done.
      profile: "FIRST:LAST", the steps to trace into profile/; "" for none.
      config_for: the experiment for the devices that are there, of their name (parallel/topology.py): its mesh rules.

    Returns:
      The exit code: 0 done, 75 preempted with everything saved, 1 after NONFINITE_LIMIT skipped updates in a row (the
      last good checkpoint stays). A hang ends the process with 124.

    Raises:
      UserError: config, data, workdir, environment or checkpoints are not usable, or the disk is full.
    """
    with contextlib.ExitStack() as stack:
        preemption = stack.enter_context(Preemption())
        watchdog = stack.enter_context(Watchdog(config.watchdog.seconds))
        profiler = stack.enter_context(Profiler(parse_window(profile, config.steps) if profile else None, workdir))
        began = time.monotonic()
        distributed.initialise()  # below the two above: a peer that never comes is a hang, and SIGTERM may come first
        stack.enter_context(leave_when_broken())
        is_first = jax.process_index() == 0
        ledger = Ledger(workdir if is_first else None, began)
        if config_for is not None:
            config = config_for(topology.name_of(jax.devices()))
        mesh = make_mesh(config.mesh)
        check_batch_size(config.batch_size, config.micro_batches, mesh)
        state, loader, notes = start(config, workdir, mesh)
        ledger.resume(notes["step"], notes.get("goodput"))
        stack.callback(loader.close)
        batches = stack.enter_context(contextlib.closing(device_batches(loader, batch_sharding(mesh))))
        writer = stack.enter_context(checkpoint.CheckpointWriter(workdir, config.checkpoint))
        journal = stack.enter_context(
            Journal(config, workdir, notes["step"], notes["seconds"], notes["bad_samples"], quiet=not is_first)
        )
        device = stack.enter_context(Device())
        hosts = Hosts(mesh, lambda: preemption.requested)
        stack.enter_context(jax.set_mesh(mesh))
        train_step = jit_step(config, notes["statistics"], state, mesh)

        def save() -> None:
            journal.finish()
            goodput = ledger.totals(step)
            with ledger.measure("checkpoint"):
                told = {"step": step, "position": position, "evaluated": evaluated, "goodput": goodput}
                told |= {"seconds": journal.clock.seconds, "bad_samples": journal.bad_samples}
                writer.save(state, notes | told)

        def end(code: int) -> int:
            with ledger.measure("checkpoint"):
                writer.wait()
            ledger.write(step)
            journal.say(summary(ledger.totals(step)))
            return code

        def stop() -> bool:
            watchdog.beat()
            return hosts.ask()

        step, position, saved, evaluated = notes["step"], notes["position"], notes["step"], notes["evaluated"]
        if step:
            journal.say(f"going on from step {step}")
        ledger.turn_to("step")
        while True:
            if hosts.stop:
                if step != saved:
                    save()
                return end(EXIT_PREEMPTED)
            if is_due(config.eval.every, step) and step != evaluated:  # also where a stop broke it off
                with ledger.measure("evaluate"):
                    journal.add(evaluate(evaluators, state, step, stop))
                if hosts.stop:
                    continue
                evaluated = step
            if (is_due(config.checkpoint.every, step) or step == config.steps) and step != saved:
                save()
                saved = step
            if step >= config.steps:
                break
            with ledger.waiting_for_data(device):
                position, batch = next(batches)
            hosts.ready()
            is_new = step == notes["step"]
            with ledger.measure("compile" if is_new else "step"), profiler.step(step + 1, state):
                if is_new:
                    train_step = compile_together(train_step, state, batch, begin=preemption.something_to_save)
                state, metrics = train_step(state, batch)
            step += 1
            preemption.something_to_save()
            metrics = {**metrics, "bad_samples": count_bad(batch)}
            device.dispatched(metrics)
            if is_due(config.log.every, step):
                metrics = {**metrics, "samples": fingerprint(batch)}
                ledger.write(step)
            if journal.log(step, metrics) >= NONFINITE_LIMIT:
                journal.say(
                    f"skyjax: loss or gradient was not finite in {NONFINITE_LIMIT} steps in a row; the last good"
                    f" checkpoint is that of step {saved}. Lower optimizer.learning_rate, or look at the data there"
                )
                return end(EXIT_FAILED)
            hosts.report()
            if is_due(config.log.every, step) and (slow := hosts.slow()):
                journal.say(f"step {step}: {slow}")
                journal.add(slow.numbers)
            loader.check_bad()
            watchdog.beat()
        end(EXIT_DONE)
    jax.distributed.shutdown()  # before the report, which the other processes need not wait for
    if report is not None and is_first:
        report(workdir)
    return EXIT_DONE


def start(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, mesh: Mesh
) -> tuple[states.State, Loader, checkpoint.Notes]:
    """State, loader and notes of a new run, or of the newest checkpoint in `workdir`. Errors as in `train`."""
    abstract = states.abstract(config)
    shardings = state_shardings(abstract, mesh)
    restored = checkpoint.restore_newest(workdir / checkpoint.FOLDER, with_shardings(abstract, shardings), config)
    notes: checkpoint.Notes = {"step": 0, "position": 0, "evaluated": 0, "bad_samples": 0, "seconds": 0.0}
    notes["order"] = ORDER
    notes["statistics"] = statistics_table(config.model)
    now = versions()
    if restored:
        notes = restored[1]
        other = [
            f"{name} {was}"
            for name, was in notes["versions"].items()
            if name not in ABOUT_THE_RUN and was != now.get(name)
        ]
        if other:
            log.warning("this run was begun with %s; numbers may differ in the last bits", ", ".join(other))
    notes |= {"config": json.loads(to_json(config)), "versions": now}
    share, shares = share_of_batch(mesh)
    loader = Loader(config, position=notes["position"], order=notes["order"], process_index=share, process_count=shares)
    records = dict(zip((path for path, _ in config.data.sources), loader.sizes, strict=True))
    for path, was in notes.get("records", records).items():
        if was != records.get(path):
            log.warning(
                '"%s" had %s records when this run began and has %s now: from here on samples come in another order',
                path, f"{was:,}", f"{records.get(path, 0):,}",
            )  # fmt: skip
    notes.setdefault("records", records)
    if jax.process_index() == 0:
        files = {"config.json": to_json(config), "versions.json": json.dumps(notes["versions"], indent=1)}
        write_files(workdir, files)
    keep_tokenizer(loader.tokenizer, workdir, notes)
    loader.begin()  # it reads while the state is made
    if restored:
        return restored[0], loader, notes
    state = states.create(config, mesh)
    return take_over(state, config.start) if config.get("start") else state, loader, notes


def keep_tokenizer(tokenizer: Tokenizer | None, workdir: pathlib.Path, notes: checkpoint.Notes) -> None:
    """Puts the tokenizer beside what is trained on it, and its digest into the notes.

    Raises:
      UserError: the run began with another one, to which its ids belong.
    """
    if tokenizer is None:
        return
    if notes.setdefault("tokenizer", tokenizer.digest) != tokenizer.digest:
        raise UserError(
            f'"{tokenizer.path}" is not the tokenizer that this run began with; that is "{workdir / TOKENIZER}": name'
            " it in data.text.tokenizer"
        )
    if jax.process_index() == 0:
        tokenizer.save(workdir / TOKENIZER)


def jit_step(
    config: ml_collections.ConfigDict, statistics: Mapping[str, Any], state: states.State, mesh: Mesh
) -> Callable[[states.State, Any], tuple[states.State, Metrics]]:
    """`make_step` compiled: the state is donated and keeps its shardings.

    Args:
      config: the experiment.
      statistics: as `statistics_table` gives them.
      state: concrete or abstract.
      mesh: of the devices.
    """
    shardings = state_shardings(state, mesh)
    arrays = {m: (np.array(t["mean"], np.float32), np.array(t["std"], np.float32)) for m, t in statistics.items()}
    return jax.jit(make_step(config, arrays), donate_argnums=0, out_shardings=(shardings, replicated(mesh)))


def statistics_table(model: ml_collections.ConfigDict) -> dict[str, dict[str, Any]]:
    """What images are normalised by, as it travels in checkpoints: modality -> sensors, bands, mean and std.

    `mean` and `std` are (sensors, bands) lists in the sensors' units; a band that a sensor lacks has 0 and 1. A sensor
    under a modality's `statistics` has those of the config, the others have those of sensors.toml.

    Raises:
      UserError: `statistics` names a sensor that the modality has not, or has not one number a band.
    """
    tables = {}
    for modality, part in model.modalities.items():
        mean, std = statistics(part.sensors, part.bands)
        for sensor, measured in (part.get("statistics") or {}).items():
            where = f"config: model.modalities.{modality}.statistics.{sensor}"
            if sensor not in part.sensors:
                raise UserError(f"{where}: the modality's sensors are {', '.join(part.sensors)}; name one of them")
            for name, rows in (("mean", mean), ("std", std)):
                if len(measured[name]) != len(part.bands):
                    raise UserError(f"{where}.{name} has {len(measured[name])} numbers for {len(part.bands)} bands")
                rows[part.sensors.index(sensor)] = measured[name]
            if min(measured["std"]) <= 0:
                raise UserError(f"{where}.std has a number of 0 or less; measure it with `skyjax data stats`")
        tables[modality] = {
            "sensors": list(part.sensors),
            "bands": list(part.bands),
            "mean": mean.tolist(),
            "std": std.tolist(),
        }
    return tables


def evaluate(
    evaluators: Sequence[Evaluator], state: states.State, step: int, stop: Callable[[], bool]
) -> dict[str, float]:
    """The numbers of all evaluators until `stop`; one that fails costs a warning, not the run."""
    numbers: dict[str, float] = {}
    for evaluator in evaluators:
        if stop():
            break
        try:
            numbers |= evaluator(state, step, stop)
        except Exception as error:
            log.warning("step %d: an evaluation failed, training goes on: %r", step, error)
    return numbers


def dry_run(config: ml_collections.ConfigDict) -> str:
    """The resolved config, every parameter, and the parts of the model with their FLOPs; nothing is allocated.

    Errors as in `train`.
    """
    state = states.abstract(config)
    plan_views(config.data, config.model, {})
    params = state["params"]
    rows = [f"{row.path}  {row.shape}  {row.count:,}" for row in table(params).rows]
    lines = parts(params["encoder"], params["heads"], state.get("prototypes"))
    images = flops.view_images(config)["global"][1]
    columns = {"GFLOPs a view": flops.encoder(config.model, images), "GFLOPs a sample": flops.model_parts(config)}
    sizes = ", ".join(f"{m} {n.dates} x {n.rows} x {n.columns} px" for m, n in images.items())
    return "\n".join(
        [
            to_json(config),
            "",
            *rows,
            "",
            show(lines, columns),
            "",
            f"A view: one forward pass on one global view ({sizes}).",
            "A sample: a training step's share, 3 x the student's forward passes + the teacher's, all views, without"
            " recomputation.",
        ]
    )


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on, the machine, the command and this checkout's revision where it is one."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    found = {"skyjax": __version__, "python": platform.python_version()}
    found |= {package: importlib.metadata.version(package) for package in packages}
    found |= {"hardware": machine(), "command": shlex.join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]])}
    git = ["git", "-C", str(pathlib.Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # installed from a wheel
        found["git"] = subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return found


def machine() -> str:
    """What this process computes on, in words."""
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        return f"{os.cpu_count()} CPU cores, {platform.machine()}"
    return f"{len(devices)} × {devices[0].device_kind}"


def write_files(workdir: pathlib.Path, files: Mapping[str, str]) -> None:
    """Makes the folder and writes each file whole or not at all.

    Raises:
      UserError: no permission or no space.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            part = workdir / f"{name}.part"
            part.write_text(text + "\n")
            part.replace(workdir / name)
    except OSError as error:
        raise cannot_write(workdir, error) from error
