"""launch.tpu against a gcloud that records its calls and plays a scenario."""

import shlex
import subprocess
from pathlib import Path

import pytest

from launch.command import repository
from launch.tpu import main

FAKE = """#!/bin/bash
# The n-th `describe` prints the n-th line of $PLAY/states, the n-th follow exits with the n-th line of $PLAY/codes.
printf '%s\\n' "$*" >>"$PLAY/calls"
next() {
  n=$(( $(cat "$PLAY/$1.n" 2>/dev/null || echo 0) + 1 )); echo $n >"$PLAY/$1.n"; sed -n "${n}p" "$PLAY/$1"
}
case "$*" in
  "config get-value"*) cat "$PLAY/config" 2>/dev/null; exit 0;;
  *describe*)
    state=$(next states)
    [ "$state" = NONE ] && { echo "ERROR: NOT_FOUND: no such resource" >&2; exit 1; }
    [ "$state" = DENIED ] && { echo "ERROR: PERMISSION_DENIED" >&2; exit 1; }
    echo "$state";;
  *tail*) exit "$(next codes)";;
  *create*) exit "$(cat "$PLAY/create" 2>/dev/null || echo 0)";;
esac
"""
WHERE = ["--zone", "us-east5-b", "--project", "lab"]
SLICE = ["--name", "r1", *WHERE, "--accelerator-type", "v6e-16", "--poll-seconds", "0.01"]
COMMAND = ["--", "-m", "experiments.pretrain", "--run_dir", "/mnt/my runs/r1"]


class Play:
    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, states: str = "", codes: str = "") -> None:
        (self.folder / "states").write_text("\n".join(states.split()))
        (self.folder / "codes").write_text("\n".join(codes.split()))

    @property
    def calls(self) -> list[str]:
        """What was called, as "verb" or, over SSH, "ssh setup", "ssh start", "ssh follow"."""
        short = []
        for call in (self.folder / "calls").read_text().splitlines():
            verb = call.split()[3]
            if verb == "ssh":
                words = {"install": "uv venv", "start": "setsid", "follow": "tail", "stop": "kill -TERM"}
                verb = "ssh " + next(name for name, word in words.items() if word in call)
            short.append(verb)
        return short


def remote(words: list[str]) -> str:
    """What an ssh command runs on the host."""
    return next(word for word in words if word.startswith("--command=")).removeprefix("--command=")


@pytest.fixture
def play(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "play").mkdir()
    for name, text in {"gcloud": FAKE, "tar": "#!/bin/bash\nexit 0\n"}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("PLAY", str(tmp_path / "play"))
    return Play(tmp_path / "play")


def test_run_waits_in_the_queue_then_sets_up_and_runs(play, capsys):
    play("NONE ACCEPTED WAITING_FOR_RESOURCES WAITING_FOR_RESOURCES PROVISIONING ACTIVE", codes="0")
    assert main(["run", *SLICE, *COMMAND]) == 0
    waits = ["describe"] * 5
    assert play.calls == ["describe", "create", *waits, "scp", "ssh install", "ssh start", "ssh follow"]
    said = capsys.readouterr().err
    assert said.count("WAITING_FOR_RESOURCES: in the queue until enough chips are free") == 1
    create = next(c for c in (play.folder / "calls").read_text().splitlines() if " create " in c)
    assert create == (
        "compute tpus queued-resources create r1 --accelerator-type=v6e-16 --runtime-version=v2-alpha-tpuv6e"
        " --node-id=r1 --zone=us-east5-b --project=lab"
    )


def test_a_preempted_slice_is_deleted_created_anew_and_the_command_started_again(play, capsys):
    play("ACTIVE ACTIVE SUSPENDED SUSPENDED ACTIVE", codes="255 0")
    assert main(["run", *SLICE, "--spot", *COMMAND]) == 0
    one_go = ["scp", "ssh install", "ssh start", "ssh follow"]
    again = ["describe", "describe", "delete", "create", "describe"]
    assert play.calls == ["describe", "describe", *one_go, *again, *one_go]
    assert "pre-empted (SUSPENDED): creating it anew" in capsys.readouterr().err
    assert "--spot" in (play.folder / "calls").read_text()


def test_a_broken_connection_is_not_a_failure_and_a_failure_is_not_repeated(play, capsys):
    play("ACTIVE ACTIVE ACTIVE ACTIVE", codes="255 3")
    assert main(["run", *SLICE, *COMMAND]) == 3
    assert play.calls[-5:] == ["ssh start", "ssh follow", "describe", "ssh follow", "describe"]
    assert "exit code 3; the slice is ACTIVE and costs until `delete`" in capsys.readouterr().err


def test_retries_are_bounded(play, capsys):
    play("ACTIVE ACTIVE SUSPENDED SUSPENDED ACTIVE SUSPENDED", codes="255 255")
    assert main(["run", *SLICE, "--retries", "1", *COMMAND]) == 2
    assert "SUSPENDED again, after --retries 1" in capsys.readouterr().err


@pytest.mark.parametrize("state", ["NONE", "DELETING"])
def test_a_slice_that_someone_deleted_is_not_created_anew(play, capsys, state):
    play(f"ACTIVE ACTIVE {state}", codes="255")
    assert main(["run", *SLICE, *COMMAND]) == 2
    assert play.calls[-2:] == ["ssh follow", "describe"]
    assert "r1 was deleted while the command ran" in capsys.readouterr().err


def test_only_the_packages_travel(play, capsys):
    assert main(["setup", *SLICE, "--dry-run"]) == 0
    tar = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("tar "))
    assert tar.split()[-5:] == ["pyproject.toml", "README.md", "moe_jax", "experiments", "launch"]
    for name in tar.split()[-5:]:
        assert (repository() / name).exists()


def test_a_request_that_cannot_be_fulfilled_ends_the_wait(play, capsys):
    play("NONE ACCEPTED FAILED")
    assert main(["create", *SLICE]) == 2
    assert "r1 is FAILED" in capsys.readouterr().err


def test_several_slices_are_nodes_of_one_request(play):
    play("NONE ACTIVE", codes="0")
    assert main(["run", *SLICE, "--slices", "2", *COMMAND]) == 0
    assert play.calls == ["describe", "create", "describe", "scp", "scp", *["ssh install"] * 2, *["ssh start"] * 2,
                          "ssh follow"]  # fmt: skip
    calls = (play.folder / "calls").read_text()
    assert "--node-count=2 --node-prefix=r1" in calls and "tpu-vm ssh r1-1 --worker=all" in calls


def test_status_logs_stop_delete(play, capsys):
    play("SUSPENDED NONE DENIED", codes="4")
    assert main(["status", *SLICE]) == 0
    assert "SUSPENDED: pre-empted or stopped" in capsys.readouterr().out
    assert main(["status", *SLICE]) == 1
    assert "not there" in capsys.readouterr().out
    assert main(["status", *SLICE]) == 2
    assert "PERMISSION_DENIED" in capsys.readouterr().err
    assert main(["logs", *SLICE]) == 4
    assert main(["stop", *SLICE]) == 0
    assert main(["delete", *SLICE]) == 0
    assert play.calls[-3:] == ["ssh follow", "ssh stop", "delete"]


def test_dry_run_prints_commands_that_bash_reads_and_runs_none(play, capsys, tmp_path):
    assert main(["run", *SLICE, "--dry-run", *COMMAND]) == 0
    text = capsys.readouterr().out
    assert not (play.folder / "calls").exists()
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    commands = [shlex.split(line) for line in text.splitlines() if not line.startswith("#")]
    verbs = [words[4] if words[0] == "gcloud" else words[0] for words in commands]
    assert verbs == ["describe", "create", "describe", "tar", "scp", "ssh", "ssh", "ssh"]
    for words in commands[5:]:
        subprocess.run(["bash", "-n"], input=remote(words), text=True, check=True)
    # The command that the host's shell would run is the one that was asked for.
    start = remote(commands[6])
    body = shlex.split(start.partition("bash -c ")[2])[0]
    assert shlex.split(body.split("; ")[1]) == [".venv/bin/python", *COMMAND[1:]]


def test_start_follow_and_stop_work_on_a_real_shell(play, capsys, tmp_path, monkeypatch):
    home = tmp_path / "home"
    (home / "moe_jax").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))

    def remotes(*arguments: str) -> list[str]:
        assert main([*arguments[:1], *SLICE, "--dry-run", *arguments[1:]]) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if "tpu-vm ssh" in line]
        return [remote(shlex.split(line)) for line in lines]

    program = "trap 'echo saved; exit 143' TERM; echo begun; while :; do sleep 0.05; done"
    _, start, follow = remotes("run", "--", "bash", "-c", program)
    (stop,) = remotes("stop")
    subprocess.run(["bash", "-c", start], cwd=home, check=True, timeout=10)
    follower = subprocess.Popen(["bash", "-c", follow], stdout=subprocess.PIPE, text=True)
    assert follower.stdout is not None and follower.stdout.readline() == "begun\n"
    subprocess.run(["bash", "-c", stop], check=True, timeout=10)
    text, _ = follower.communicate(timeout=10)
    assert follower.returncode == 143 and text.endswith("saved\n")

    _, start, _ = remotes("run", "--prepare", "false || touch prepared; false", "--", "true")
    assert subprocess.run(["bash", "-c", start], cwd=home, timeout=10).returncode == 1
    assert (home / "moe_jax" / "prepared").exists()


def test_refuses_what_is_missing_or_wrong(play, capsys, monkeypatch):
    def error(*arguments: str) -> str:
        assert main(list(arguments)) == 2
        return capsys.readouterr().err

    assert "--zone is missing" in error("status", "--name", "r1", "--project", "lab")
    assert "--project is missing" in error("status", "--name", "r1", "--zone", "z")
    (play.folder / "config").write_text("from-config\n")
    play("NONE NONE")
    assert "--accelerator-type is missing" in error("create", "--name", "r1", *WHERE)
    play("NONE NONE")
    assert "launch.jobset" in error("create", "--name", "r1", *WHERE, "--accelerator-type", "tpu7x-8")
    assert "put it after --" in error("run", *SLICE)
    assert "--name R_1" in error("run", "--name", "R_1", *COMMAND)
    monkeypatch.setenv("PATH", "")
    assert "gcloud is not installed" in error("status", *SLICE)


def test_zone_and_project_come_from_gcloud_config(play):
    (play.folder / "config").write_text("from-config\n")
    play("ACTIVE")
    assert main(["status", "--name", "r1"]) == 0
    assert "--zone=from-config --project=from-config" in (play.folder / "calls").read_text()
