"""What all launchers share: the words of `skyjax train`, where its files lie, and running or printing what is run.

A workdir or a dataset on gs://BUCKET/PATH is read and written as /gcs/BUCKET/PATH: skyjax works on files, and the
launchers mount each bucket that the words name.
"""

import argparse
import dataclasses
import pathlib
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence

import accelerators

from skyjax.cli import EXIT_USER_ERROR
from skyjax.config import load_config
from skyjax.errors import UserError, nearest

ROOT = pathlib.Path(__file__).parents[1]
MOUNTS = "/gcs"
BUCKET = "[a-z0-9][a-z0-9._-]{2,62}"  # what the name of one may be
# The name of a pod is NAME-slice-1234-12345, and a host's name has at most 63 characters.
LONGEST_NAME = 45

# Restarts after anything but a preemption with notice. Spot machines vanish, and each time their peers count as lost.
RESTARTS, RESTARTS_SPOT = 20, 200


@dataclasses.dataclass(frozen=True)
class Step:
    """One command that a launcher runs: its words, and text for its standard input."""

    words: tuple[str, ...]
    text: str | None = None

    def shown(self) -> str:
        """As one would type it into a shell."""
        line = shlex.join(self.words)
        return line if self.text is None else f"{line} <<'END'\n{self.text.rstrip()}\nEND"


def make_parser(script: str, about: str | None, actions: Sequence[str]) -> argparse.ArgumentParser:
    """A launcher's parser with its actions, of which the first is done where none is named, and `skyjax train`'s words.

    --config.KEY=VALUE come to these (`parse`).
    """
    parser = argparse.ArgumentParser(
        prog=script, description=about, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("action", nargs="?", choices=actions, default=actions[0])
    parser.add_argument("--config", help="as of skyjax train, a path in this checkout; --config.KEY=VALUE overrides")
    parser.add_argument("--workdir", help="as of skyjax train; on Google Cloud gs://BUCKET/PATH")
    parser.add_argument("--name", help="of the run (default: the config's)")
    parser.add_argument("--dry-run", action="store_true", help="print exactly what would be run, and run nothing")
    return parser


def add_slices(parser: argparse.ArgumentParser) -> None:
    """The words of `skyjax compile`, and what Google Cloud needs beside them."""
    parser.add_argument("--topology", help="one slice, as of skyjax compile: v5p:4x4x8")
    parser.add_argument("--slices", type=int, default=1, help="how many equal slices (default 1)")
    parser.add_argument("--image", help="made by the Containerfile, in a registry that the machines can read")
    parser.add_argument("--project", required=True, help="of Google Cloud")
    parser.add_argument("--spot", action="store_true", help="cheaper, may be taken away at any time")
    parser.add_argument(
        "--max-restarts",
        type=int,
        help=f"after crashes, hangs, lost hosts (default {RESTARTS}, with --spot {RESTARTS_SPOT})",
    )


def parse(parser: argparse.ArgumentParser, words: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Options, and the overrides of the config as "KEY=VALUE".

    Raises:
      UserError: a word is not understood, or there is no such config or key in this checkout.
    """
    given = list(sys.argv[1:] if words is None else words)
    # Taken out first: argparse takes a word with a space for a positional one.
    overrides = [word.removeprefix("--config.") for word in given if word.startswith("--config.")]
    options, stray = parser.parse_known_args([word for word in given if not word.startswith("--config.")])
    for word in stray:
        raise UserError(f'"{word}" is not understood{nearest(word.split("=")[0], parser._option_string_actions)}')
    return options, overrides


def require(options: argparse.Namespace, *names: str) -> None:
    """Raises UserError where one of the options is missing."""
    for name in names:
        if getattr(options, name) is None:
            raise UserError(f"--{name.replace('_', '-')}=... is missing; --help has an example")


def train(options: argparse.Namespace, overrides: Sequence[str]) -> list[str]:
    """`skyjax train` with its words, gs:// and all; the config is loaded here, before a chip is paid for.

    Raises:
      UserError: a word is missing, or the config or one of its keys does not exist.
    """
    require(options, "config", "workdir")
    load_config(options.config, overrides)
    words = [f"--config={options.config}", f"--workdir={options.workdir}"]
    return ["skyjax", "train", *words, *(f"--config.{override}" for override in overrides)]


def train_in_cloud(options: argparse.Namespace, overrides: Sequence[str]) -> list[str]:
    """As `train`, for a container of the image, which holds this checkout's configs.

    Raises:
      UserError: as in `train`; or the workdir is not a bucket's, or the config not of this checkout.
    """
    words = train(options, overrides)
    config = pathlib.Path(options.config).resolve()
    if not config.is_relative_to(ROOT):
        raise UserError(f'--config="{options.config}" is not in this checkout, so it will not be in the image either')
    if not re.fullmatch(rf"gs://{BUCKET}/.+", options.workdir):
        raise UserError(f'--workdir="{options.workdir}" would vanish with the machines; it is gs://BUCKET/PATH')
    words[2] = f"--config={config.relative_to(ROOT)}"
    return words


def mounted(words: Sequence[str]) -> list[str]:
    """The words with each gs://BUCKET/PATH as the file that it is mounted at."""
    return [re.sub(rf"gs://(?={BUCKET})", f"{MOUNTS}/", word) for word in words]


def buckets(words: Sequence[str]) -> list[str]:
    """The buckets that the words name, each once, in order."""
    return list(dict.fromkeys(re.findall(rf"gs://({BUCKET})", " ".join(words))))


def name_of(options: argparse.Namespace) -> str:
    """--name, or one made from the config's.

    Raises:
      UserError: neither is there, or it cannot be a host's name.
    """
    if options.name is None:
        require(options, "config")
    name = options.name or pathlib.Path(options.config).stem.replace("_", "-").lower()
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > LONGEST_NAME:
        raise UserError(
            f'--name="{name}" cannot be part of a host\'s name: small letters, digits and "-", first a letter, at most'
            f" {LONGEST_NAME} characters"
        )
    return name


def slice_of(options: argparse.Namespace) -> accelerators.Slice:
    """The slice that --topology names.

    Raises:
      UserError: there is none such, or --slices is not a number of slices.
    """
    require(options, "topology")
    if options.slices < 1:
        raise UserError(f"--slices={options.slices} is not a number of slices; it is 1 or more")
    return accelerators.find(options.topology)


def restarts(options: argparse.Namespace) -> int:
    """How often a run may start again after anything but a preemption with notice.

    Raises:
      UserError: it is negative.
    """
    if options.max_restarts is None:
        return RESTARTS_SPOT if options.spot else RESTARTS
    if options.max_restarts < 0:
        raise UserError(f"--max-restarts={options.max_restarts} is not a number of restarts; it is 0 or more")
    return int(options.max_restarts)


def perform(steps: Sequence[Step], dry_run: bool) -> int:
    """Runs the steps in order until one fails, or prints them all.

    Returns:
      The exit code: 0, or that of the step that failed.

    Raises:
      UserError: a program is not installed.
    """
    for step in steps:
        if dry_run:
            print(step.shown())
            continue
        print(f"+ {shlex.join(step.words)}", file=sys.stderr, flush=True)
        try:
            code = subprocess.run(step.words, input=step.text, text=True, check=False).returncode
        except FileNotFoundError as error:
            raise UserError(f'"{step.words[0]}" is not installed; --dry-run shows what it is for') from error
        if code:
            print(f"skyjax: {step.words[0]} ended with {code}; nothing after it was run", file=sys.stderr)
            return code
    return 0


def launcher(body: Callable[[], int]) -> int:
    """Runs a launcher's body; a user's mistake is one sentence and exit 2."""
    try:
        return body()
    except UserError as error:
        print(f"skyjax: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return 130
