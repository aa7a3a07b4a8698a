"""The `skyjax` command: one verb, one thin function. A verb imports its room only when it is called."""

import argparse
import functools
import json
import logging
import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from skyjax.errors import EXIT_USER_ERROR, UserError, nearest

Verb = Callable[[argparse.Namespace, list[str]], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb.

    Returns:
      The exit code: 0 done, 1 crash, 2 the user's mistake, 75 preempted and nothing lost, 124 hung.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("absl").setLevel(logging.ERROR)
    words = list(sys.argv[1:] if arguments is None else arguments)
    known, rest = _parser(words[0] if words else "").parse_known_args(words)
    overrides = [word.removeprefix("--config.") for word in rest if word.startswith("--config.")]
    stray = [word for word in rest if not word.startswith("--config.")]
    try:
        if stray:
            raise UserError(f'"{stray[0]}" is not understood{nearest(stray[0].split("=")[0], known.flags)}')
        if overrides and "config" not in known:
            raise UserError(f'"--config.{overrides[0]}" has no meaning here: only train and compile take a config')
        _refuse_buckets(known)
        return known.run(known, overrides)
    except UserError as error:
        print(f"skyjax: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


def _refuse_buckets(options: argparse.Namespace) -> None:
    """As a path, gs://BUCKET would be a folder called "gs:" on this disk."""
    for name, value in vars(options).items():
        if isinstance(value, pathlib.Path) and re.match(r"\w+:/", str(value)):
            raise UserError(
                f"--{name}={str(value).replace(':/', '://', 1)} is in a bucket, and skyjax writes files: mount it by"
                " Cloud Storage FUSE, as launch/ does, and name the folder where it is mounted"
            )


def _parser(verb: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="skyjax",
        description="Pre-trains remote-sensing foundation models in JAX.",
        epilog="example: skyjax train --config=configs/pretrain_sample.py --workdir=runs/first",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_train(verbs)
    _add_compile(verbs)
    _add_eval(verbs, verb)
    _add_import(verbs)
    _add_export(verbs)
    _add_report(verbs)
    _add_data(verbs)
    return parser


def _verb(verbs: Any, name: str, run: Verb, about: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name, help=about, description=about, epilog=f"example: {example}", allow_abbrev=False
    )
    parser.set_defaults(run=run, flags=parser._option_string_actions)
    return parser


def _add_train(verbs: Any) -> None:
    train = _verb(
        verbs,
        "train",
        _train,
        "Trains; goes on by itself if the directory holds a checkpoint.",
        "skyjax train --config=configs/pretrain_sample.py --workdir=runs/first --config.steps=200",
    )
    train.add_argument("--config", required=True, help="a Python file with get_config(); --config.KEY=VALUE overrides")
    train.add_argument("--workdir", type=pathlib.Path, help="gets config, metrics, checkpoints and report")
    train.add_argument("--profile", default="", metavar="FIRST:LAST", help="trace these steps into WORKDIR/profile")
    train.add_argument("--dry-run", action="store_true", help="print config and parameter table; allocate nothing")


def _train(options: argparse.Namespace, overrides: list[str]) -> int:
    from skyjax.train.preemption import Preemption

    with Preemption():  # before the imports that take seconds; the loop has its own, which knows of the state
        return _train_here(options, overrides)


def _train_here(options: argparse.Namespace, overrides: list[str]) -> int:
    from skyjax.config import load_config
    from skyjax.evals.report import write_report
    from skyjax.train import loop

    config = load_config(options.config, overrides)
    if options.dry_run:
        print(loop.dry_run(config))
        return 0
    if options.workdir is None:
        raise UserError("train: --workdir=DIR is missing; it gets config, metrics, checkpoints and report")
    config_for = functools.partial(load_config, options.config, overrides)
    return loop.train(config, options.workdir, report=write_report, profile=options.profile, config_for=config_for)


def _add_compile(verbs: Any) -> None:
    compile_ = _verb(
        verbs,
        "compile",
        _compile,
        "Compiles the whole training step for TPUs that are not here: whether it fits, what it computes, moves and"
        " sends, and what bounds its time. Exit 1 where it does not fit.",
        "skyjax compile --config=configs/skysense.py --topology=v5p:4x4x8",
    )
    compile_.add_argument(
        "--config", required=True, help="a Python file with get_config(); --config.KEY=VALUE overrides"
    )
    compile_.add_argument(
        "--topology", required=True, help="GENERATION:AxB or AxBxC: v5e:16x16, v5p:4x4x8, tpu7x:4x4x4"
    )
    compile_.add_argument("--slices", type=int, default=1, help="equal slices, with the data centre's network between")
    compile_.add_argument("--code", action="store_true", help="also write the machine code; takes many times longer")
    compile_.add_argument(
        "--search", action="store_true", help="compile up to 8 choices of batch, remat and mesh, and name the fastest"
    )
    compile_.add_argument("--json", type=pathlib.Path, help="also write the results to this file")


def _compile(options: argparse.Namespace, overrides: list[str]) -> int:
    from skyjax.config import load_config
    from skyjax.parallel.ahead import CompilerError
    from skyjax.train import plan, plan_text

    def say(words: str) -> None:
        print(words, file=sys.stderr, flush=True)

    where = options.topology + (f"*{options.slices}" if options.slices > 1 else "")
    config = load_config(options.config, overrides, where)
    try:
        if options.search:
            return _search(options, config, say)
        found = plan.compile_step(config, options.topology, options.slices, code=options.code, say=say)
    except CompilerError as error:
        print(f"skyjax: XLA did not compile it: {error}", file=sys.stderr)
        return 1
    print(plan_text.show(found))
    if options.json:
        options.json.write_text(json.dumps(plan_text.to_json(found), indent=1) + "\n")
    if found.memory.shortfall:
        print(f"\n{plan_text.shortfall(found)}")
        return 1
    return 0


def _search(options: argparse.Namespace, config: Any, say: Callable[[str], None]) -> int:
    from skyjax.parallel import topology
    from skyjax.train import plan, search

    def compile_step(chosen: Any) -> plan.Plan:
        return plan.compile_step(chosen, options.topology, options.slices, say=say)

    tried = search.search(config, options.topology, options.slices, compile_step, say)
    print(search.show(tried, len(topology.describe(options.topology, options.slices))))
    if options.json:
        options.json.write_text(json.dumps(search.to_json(tried), indent=1) + "\n")
    return 0 if tried[0].fits else 1


def _add_eval(verbs: Any, verb: str) -> None:
    evaluate = _verb(
        verbs,
        "eval",
        _eval,
        "Probes the frozen features of a checkpoint, beside the baselines that keep everybody honest.",
        "skyjax eval --checkpoint=runs/first --task=knn --dataset=data/sample/eurosat_rgb",
    )
    if verb == "eval":  # the room takes seconds to import; the other verbs need not wait for it
        from skyjax.evals import captions, probe, retrieval, segmentation

        probe.add_arguments(evaluate, other_tasks=tuple(_eval_tasks()))
        segmentation.add_arguments(evaluate)
        retrieval.add_arguments(evaluate)
        captions.add_arguments(evaluate)


def _eval_tasks() -> dict[str, Any]:
    """Task -> its module, of the tasks that are not the image probe's."""
    from skyjax.evals import captions, change, retrieval, segmentation, vqa, zero_shot

    return {module.TASK: module for module in (segmentation, vqa, change, zero_shot, retrieval, captions)}


def _eval(options: argparse.Namespace, overrides: list[str]) -> int:
    from skyjax.evals import probe, scores

    result = _eval_tasks().get(options.task, probe).from_arguments(options)
    workdir = pathlib.Path(options.checkpoint)
    if (workdir / "config.json").is_file():
        scores.keep_probe(workdir / scores.PROBES, result)
        print(f"Kept for {workdir / 'report.html'}: skyjax report --workdir={workdir}")
    return 0


def _add_import(verbs: Any) -> None:
    importing = _verb(
        verbs,
        "import",
        _import,
        "Turns a released SkySense file into a folder that skyjax.load and --checkpoint read. A pickle is never run."
        " Sizes are read from the weights, and what they do not tell is printed.",
        "skyjax import --source=skysense_model_backbone_s2.pth --out=runs/skysense_s2",
    )
    importing.add_argument(
        "--source", type=pathlib.Path, required=True, help=".pth or .safetensors, whole or one encoder"
    )
    importing.add_argument("--out", type=pathlib.Path, required=True, help="the folder; an earlier import is replaced")
    importing.add_argument(
        "--heads", default="", help="of the plain transformers: 8, or fusion:16,multispectral:8 (default: width / 64)"
    )
    importing.add_argument("--window", type=int, help="of the Swin's attention (default: by the file, else 8)")
    importing.add_argument(
        "--bands",
        action="append",
        default=[],
        help="what the model is to see, by name: MODALITY:BAND,BAND or SENSOR:BAND,BAND, once a modality; as in"
        " --bands=optical:red,green,blue,nir",
    )
    importing.add_argument("--json", type=pathlib.Path, help="also write the results to this file")


def _import(options: argparse.Namespace, overrides: list[str]) -> int:
    from skyjax.convert import importing

    result = importing.run(options.source, options.out, heads=options.heads, window=options.window, bands=options.bands)
    return _tell(importing.describe(result), result, options.json)


def _add_export(verbs: Any) -> None:
    export = _verb(
        verbs,
        "export",
        _export,
        "Writes a checkpoint for others, compares the written file with skyjax, and puts a model card beside it."
        " skysense: the encoder by the released names, .pth or .safetensors; safetensors: a folder for skyjax.load,"
        " with text tower, projections to words, decoder and tokenizer where there are such; pytorch: a folder with a"
        " PyTorch module, with the same but the decoder.",
        "skyjax export --checkpoint=runs/pretrain_sample --format=safetensors --out=runs/weights",
    )
    export.add_argument(
        "--checkpoint", type=pathlib.Path, required=True, help="a run, a checkpoint or a weights folder"
    )
    export.add_argument("--format", required=True, help="skysense, safetensors or pytorch")
    export.add_argument(
        "--out",
        type=pathlib.Path,
        required=True,
        help="file or folder; an earlier one is replaced once the new is whole",
    )
    export.add_argument("--json", type=pathlib.Path, help="also write the results to this file")


def _export(options: argparse.Namespace, overrides: list[str]) -> int:
    from skyjax.convert import export

    result = export.run(options.checkpoint, options.format, options.out)
    return _tell(export.describe(result), result, options.json)


def _tell(text: str, result: Any, path: pathlib.Path | None) -> int:
    """Results for people, and for programs where they are wanted."""
    print(text)
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--json={path} cannot be written: {error.strerror}; name another file") from error
    return 0


def _add_report(verbs: Any) -> None:
    report = _verb(
        verbs,
        "report",
        _report,
        "Writes report.html anew: curves, probes, pictures. Training writes it by itself.",
        "skyjax report --workdir=runs/first",
    )
    report.add_argument("--workdir", type=pathlib.Path, required=True)


def _report(options: argparse.Namespace, overrides: list[str]) -> int:
    from skyjax.evals.report import write_report

    print(f"Report: {write_report(options.workdir)}")
    return 0


def _add_data(verbs: Any) -> None:
    data = verbs.add_parser("data", help="Makes, measures and pictures data sets.")
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")

    build = _verb(
        actions,
        "build",
        _data_build,
        "Turns the files of a source into records.",
        "skyjax data build --source=data/triples.py --input=data/sample/triples --out=runs/records/triples",
    )
    build.add_argument("--source", type=pathlib.Path, required=True, help="a builder: data/X.py")
    build.add_argument("--input", type=pathlib.Path, required=True, help="folder of the source's own files")
    build.add_argument("--out", type=pathlib.Path, required=True, help="new folder for the records")
    build.add_argument("--compression", default="zstd", help="zstd (default), or none: larger files, read faster")

    stats = _verb(
        actions,
        "stats",
        _data_stats,
        "Mean and std of each band over valid, clear pixels, beside the values of the sensor table.",
        "skyjax data stats --dataset=runs/records/triples",
    )
    stats.add_argument(
        "--dataset", required=True, help="a folder made by data build, also gs://BUCKET/PATH, or one of images"
    )
    stats.add_argument("--json", type=pathlib.Path, help="also write the rows to this file")

    show = _verb(
        actions,
        "show",
        _data_show,
        "A contact sheet (PNG): all dates of a site side by side, clouds marked.",
        "skyjax data show --dataset=runs/records/triples --out=triples.png --sites=4",
    )
    show.add_argument(
        "--dataset", required=True, help="a folder made by data build, also gs://BUCKET/PATH, or one of images"
    )
    show.add_argument("--out", type=pathlib.Path, required=True, help="the PNG to write")
    show.add_argument("--sites", type=int, default=4, help="how many of the first sites (default 4)")

    tokenizer = _verb(
        actions,
        "tokenizer",
        _data_tokenizer,
        "Trains a SentencePiece model on texts: files with a text a line, .json and .jsonl with captions or questions,"
        " folders of records.",
        "skyjax data tokenizer --input captions.json runs/records/triples --vocab-size=4000 --out=runs/words.model",
    )
    tokenizer.add_argument(
        "--input", type=pathlib.Path, action="extend", nargs="+", required=True, help="files and folders, in this order"
    )
    tokenizer.add_argument("--vocab-size", type=int, default=8000, help="pieces; few texts give fewer (default 8000)")
    tokenizer.add_argument("--lower-case", action="store_true", help="fold letters: one piece for both cases")
    tokenizer.add_argument("--out", type=pathlib.Path, required=True, help="the file to write")


def _data_build(options: argparse.Namespace, overrides: list[str]) -> int:
    from skyjax.input.build import build

    print(build(options.source, options.input, options.out, compression=options.compression))
    return 0


def _data_stats(options: argparse.Namespace, overrides: list[str]) -> int:
    from skyjax.input.statistics import print_table, stats

    rows = stats(options.dataset)
    print_table(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return 0


def _data_show(options: argparse.Namespace, overrides: list[str]) -> int:
    from skyjax.input.contact_sheet import contact_sheet
    from skyjax.input.loader import open_source

    source = open_source(options.dataset)
    contact_sheet([source[i] for i in range(min(options.sites, len(source)))], options.out)
    print(options.out)
    return 0


def _data_tokenizer(options: argparse.Namespace, overrides: list[str]) -> int:
    from skyjax.input.tokenizer import train_tokenizer

    made = train_tokenizer(options.input, options.vocab_size, options.out, lower_case=options.lower_case)
    print(f"{options.out}: {made.size:,} ids, {options.vocab_size:,} asked for; SHA-256 {made.digest}")
    return 0
