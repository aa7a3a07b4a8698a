"""What a TPU VM does: the script that launch/tpu_vm.py sends, run here with stand-ins for the machine's programs."""

import re
import shlex

import pytest
import tpu_vm

WORDS = [
    "--config=configs/pretrain_sample.py",
    "--workdir=gs://runs/first",
    "--config.data.sources=(('gs://data/it''s $HOME',1.0),)",
    "--topology=v5e:4x4",
    "--image=europe-docker.pkg.dev/p/i:1",
    "--project=p",
    "--zone=z",
    "--max-restarts=2",
]


def script(*words):
    return tpu_vm.on_vm(*tpu_vm.parse(tpu_vm._parser(), [*WORDS, *words]))


@pytest.fixture
def machine(programs, tmp_path, monkeypatch):
    """`sudo` writes the files of the system to a folder, and everything else is recorded."""
    programs.record("docker", "gcloud", "curl", "apt-get", "gcsfuse", "mountpoint")
    programs.add("systemctl", '#!/bin/bash\necho "systemctl $*" >> "$RECORDS/../system"; [ "$1" != is-active ]\n')
    programs.add("sudo", f'#!/bin/bash\nif [ "$1" = tee ]; then cat > "{tmp_path}/${{2##*/}}"; else exec "$@"; fi\n')
    programs.add("sleep", "#!/bin/bash\n")
    return programs


def test_leaves_the_run_to_systemd(machine, tmp_path):
    done = machine.bash(script())
    assert done.returncode == 0, done.stderr
    unit = (tmp_path / "skyjax.service").read_text()
    assert "ExecStart=/bin/bash /var/lib/skyjax.sh" in unit
    assert "TimeoutStopSec=600" in unit
    assert "systemctl enable --now skyjax" in (tmp_path / "system").read_text()
    assert [call.split(b"\0")[:3] for call in machine.take()] == [
        [b"docker", b"pull", b"--quiet"],
        [b"gcloud", b"auth", b"configure-docker"],
    ]


def test_a_second_start_is_refused(machine):
    machine.add("systemctl", "#!/bin/bash\nexit 0\n")
    done = machine.bash(script())
    assert done.returncode == 1
    assert "stop it first" in done.stderr
    assert machine.take() == []


def run(machine, tmp_path, codes):
    """The script that systemd runs, where skyjax ends with these codes in turn; how it ends, and how often it ran."""
    machine.bash(script())
    machine.take()
    machine.add("mountpoint", "#!/bin/bash\nexit 1\n")
    machine.add("mkdir", "#!/bin/bash\n")
    machine.add(
        "docker",
        f"""#!/bin/bash
        [ "$1" = run ] || exit 0
        printf '%s\\0' "$@" > "$RECORDS/../docker"
        echo x >> "$RECORDS/../runs"
        codes=({codes})
        exit "${{codes[$(wc -l < "$RECORDS/../runs") - 1]}}"
        """,
    )
    text = (tmp_path / "skyjax.sh").read_text()
    assert text.count("/sys/kernel") == 1
    done = machine.bash(re.sub("/sys/kernel.*enabled", "/dev/null", text))
    return done, len((tmp_path / "runs").read_text().splitlines())


@pytest.mark.parametrize(
    ("codes", "want", "times"),
    [
        ("0", 0, 1),
        ("2", 2, 1),  # the user's mistake is not tried again
        ("75 75 75 75 75 0", 0, 6),  # preemptions do not count
        ("1 124 134 0", 134, 3),  # at most two restarts
        ("1 75 134 0", 0, 4),
    ],
)
def test_starts_again(codes, want, times, machine, tmp_path):
    done, runs = run(machine, tmp_path, codes)
    assert (done.returncode, runs) == (want, times)


def test_runs_the_command_with_its_buckets(machine, tmp_path):
    run(machine, tmp_path, "0")
    words = (tmp_path / "docker").read_bytes().decode().split("\0")[:-1]
    image = words.index("europe-docker.pkg.dev/p/i:1")
    assert words[image + 1 :] == [
        "skyjax",
        "train",
        "--config=configs/pretrain_sample.py",
        "--workdir=/gcs/runs/first",
        "--config.data.sources=(('/gcs/data/it''s $HOME',1.0),)",
    ]
    assert {"--privileged", "--net=host", "--volume=/gcs:/gcs"} <= set(words[:image])
    mounts = {words[-2]: words[1:-2] for words in (call.decode().split("\0")[:-1] for call in machine.take())}
    assert set(mounts) == {"runs", "data"}
    assert "ro" in mounts["data"]
    assert "ro" not in mounts["runs"]
    assert "--metadata-cache-ttl-secs=0" in mounts["runs"]


def test_sigterm_ends_it_after_it_has_saved(machine, tmp_path):
    """systemd sends SIGTERM to the script and to docker, which hands it on; skyjax ends with 75, and is not started."""
    machine.bash(script())
    machine.add("mountpoint", "#!/bin/bash\n")
    machine.add("mkdir", "#!/bin/bash\n")
    machine.add(
        "docker",
        '#!/bin/bash\n[ "$1" = run ] || exit 0\necho x >> "$RECORDS/../runs"\nkill -TERM "$PPID"\nexit 75\n',
    )
    text = re.sub("/sys/kernel.*enabled", "/dev/null", (tmp_path / "skyjax.sh").read_text())
    (tmp_path / "it.sh").write_text(text)
    done = machine.bash(f"exec bash {shlex.quote(str(tmp_path / 'it.sh'))}")
    assert done.returncode == 75
    assert len((tmp_path / "runs").read_text().splitlines()) == 1
