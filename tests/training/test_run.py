import io
import json
import math
import os
import signal
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]

from moe_jax.training.run import Progress, Run, RunError, load_config

CONFIG = {"model": {"layers": 2, "dims": (4, 8)}, "seed": 0}


def _open(path, experiment="pretrain", config=None):
    return Run.open(path / "run", experiment, CONFIG if config is None else config)


def _events(folder):
    """Events of a TensorBoard folder: each is a length, its checksum, a protocol buffer and its checksum."""
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            yield Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]


def test_new_folder_says_what_it_is(tmp_path):
    with _open(tmp_path) as run:
        assert not run.resumed
        content = json.loads((run.dir / "config.json").read_text())
    assert content["experiment"] == "pretrain"
    assert content["config"] == {"model": {"layers": 2, "dims": [4, 8]}, "seed": 0}
    assert {"python", "jax", "flax", "optax"} <= content["versions"].keys()
    assert content["command"]
    assert load_config(tmp_path / "run") == content


def test_same_experiment_and_config_resumes(tmp_path):
    with _open(tmp_path) as run:
        run.log("train", 1, {"loss": 2.5})
        first = run.metrics()[-1]["elapsed"]
    with _open(tmp_path) as run:
        assert run.resumed
        assert run.metrics("train")[0]["loss"] == 2.5
        assert run.elapsed >= first
        run.log("train", 2, {"loss": 2.0})
        assert [row["step"] for row in run.metrics()] == [1, 2]
        assert run.metrics()[1]["elapsed"] >= first


def test_elapsed_goes_on_from_the_last_session(tmp_path):
    with _open(tmp_path) as run:
        (run.dir / "metrics.jsonl").write_text('{"phase": "train", "step": 1, "elapsed": 1000.0}\n')
    with _open(tmp_path) as run:
        assert 1000 <= run.elapsed < 1100


def test_another_experiment_is_refused(tmp_path):
    _open(tmp_path).close()
    with pytest.raises(RunError, match=r"belongs to the experiment 'pretrain', this is 'grpo'.*--run-dir"):
        _open(tmp_path, experiment="grpo")


@pytest.mark.parametrize("bucket", ["gs://bucket/run", "s3://bucket/run"])
def test_a_bucket_is_no_folder(tmp_path, monkeypatch, bucket):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match="mount the bucket"):
        Run.open(bucket, "pretrain", CONFIG)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_processes_do_not_share_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("moe_jax.training.run._SHARED_SECONDS", 0.0)
    _open(tmp_path).close()
    monkeypatch.setattr("jax.process_index", lambda: 1)
    with _open(tmp_path) as run:
        assert not run.writes
    with pytest.raises(RunError, match=r"process 1 on .* does not see .*disk that all processes share"):
        _open(tmp_path / "elsewhere")


def test_a_result_is_read_or_absent(tmp_path):
    with _open(tmp_path) as run:
        assert run.result("evaluations/a.json") is None
        run.write_json("evaluations/a.json", {"x": 1.5})
        assert run.result("evaluations/a.json") == {"x": 1.5}


def test_another_config_is_refused_with_both_values(tmp_path):
    _open(tmp_path).close()
    other = {"model": {"layers": 3, "dims": [4, 8]}, "seed": 0, "new": {"x": None}}
    with pytest.raises(RunError) as error:
        _open(tmp_path, config=other)
    assert "model.layers: 2 there, 3 here" in str(error.value)
    assert "new.x: absent there, null here" in str(error.value)
    assert "seed" not in str(error.value) and "dims" not in str(error.value)
    assert "--run-dir" in str(error.value)
    _open(tmp_path).close()  # the refusal holds no lock


def test_damaged_or_missing_config_is_refused(tmp_path):
    with _open(tmp_path) as run:
        run.log("train", 1, {})
    config = tmp_path / "run" / "config.json"
    config.write_text(config.read_text()[:20])
    with pytest.raises(RunError, match=r"config\.json cannot be read"):
        _open(tmp_path)
    config.unlink()
    with pytest.raises(RunError, match=r"holds metrics\.jsonl but no config\.json"):
        _open(tmp_path)
    with pytest.raises(RunError, match="is not the folder of a run"):
        load_config(tmp_path / "run")


def test_second_process_is_refused_and_kill_9_releases_the_folder(tmp_path):
    script = f"""
    import sys, time
    from moe_jax.training.run import Run
    run = Run.open({str(tmp_path / "run")!r}, "pretrain", {CONFIG!r})
    print("open", flush=True)
    time.sleep(100)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True, cwd=os.getcwd()
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        with pytest.raises(RunError, match=rf"in use by another process \(pid {process.pid} "):
            _open(tmp_path)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with _open(tmp_path) as run, pytest.raises(RunError, match="in use"):
        assert run.resumed
        _open(tmp_path)


@pytest.mark.parametrize("torn", ["", '{"phase": "train", "st'])
def test_rewind_drops_later_lines_of_the_phase_and_a_torn_line(tmp_path, torn):
    with _open(tmp_path) as run:
        for step in range(1, 6):
            run.log("train", step, {"loss": step})
        run.log("eval", 5, {"accuracy": 0.5})
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write(torn)
    with _open(tmp_path) as run:
        run.rewind("train", 3)
        run.log("train", 4, {"loss": 40})
        assert [(row["phase"], row["step"]) for row in run.metrics()] == [
            ("train", 1),
            ("train", 2),
            ("train", 3),
            ("eval", 5),
            ("train", 4),
        ]
        assert run.metrics("train")[-1]["loss"] == 40
        assert [row["accuracy"] for row in run.metrics("eval")] == [0.5]


def test_broken_line_in_the_middle_is_named(tmp_path):
    with _open(tmp_path) as run:
        (run.dir / "metrics.jsonl").write_text('{"phase": "train", "step": 1, "elapsed": 1}\nnonsense\n{}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl, line 2 is not JSON"):
        _open(tmp_path)


def test_tensorboard_gets_the_scalars_and_the_restart(tmp_path):
    with _open(tmp_path) as run:
        run.log("train", 7, {"loss": 1.5, "reward/mean": jnp.float32(0.25)})
        run.rewind("train", 3)
        events = list(_events(run.dir / "tensorboard" / "train"))
    assert events[0].file_version == "brain.Event:2"
    assert events[1].step == 7
    assert {v.tag: v.simple_value for v in events[1].summary.value} == {"train/loss": 1.5, "train/reward/mean": 0.25}
    assert (events[2].step, events[2].session_log.status) == (4, SessionLog.START)


def test_non_finite_values_keep_the_json_strict(tmp_path):
    with _open(tmp_path) as run:
        run.log("train", 1, {"a": math.nan, "b": math.inf, "c": -np.float32("inf")})

        def refuse(name):
            raise AssertionError(name)

        row = json.loads((run.dir / "metrics.jsonl").read_text(), parse_constant=refuse)
        assert (row["a"], row["b"], row["c"]) == (None, "Infinity", "-Infinity")
        row = run.metrics()[0]
        assert math.isnan(row["a"]) and row["b"] == math.inf and row["c"] == -math.inf


def test_json_and_rows_are_written_whole(tmp_path):
    with _open(tmp_path) as run:
        run.write_json("summary.json", {"pass": {"mean": np.float32(0.5)}, "nan": math.nan, "steps": jnp.arange(2)})
        assert run.read_json("summary.json") == {"pass": {"mean": 0.5}, "nan": None, "steps": [0, 1]}
        run.write_rows("rollouts/grpo/000010.jsonl", [{"prompt": "é\n"}, {"reward": 1.0}])
        lines = (run.dir / "rollouts/grpo/000010.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == [{"prompt": "é\n"}, {"reward": 1.0}]
        with pytest.raises(TypeError):
            run.write_json("summary.json", {"x": object()})
        assert run.read_json("summary.json")["pass"] == {"mean": 0.5}
        with pytest.raises(RunError, match="does not exist"):
            run.read_json("absent.json")
        assert not list(run.dir.rglob("*.tmp"))
        assert run.path("plots", "a.png").parent.is_dir()
        assert run.checkpointer("train").directory == run.dir / "checkpoints" / "train"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_full_disk_is_a_run_error_and_keeps_what_was_written(tmp_path, monkeypatch):
    with _open(tmp_path) as run:
        run.log("train", 1, {"loss": 1.0})
        run.write_json("summary.json", {"x": 1})
        metrics, aside = run.dir / "metrics.jsonl", run.dir / "aside"
        metrics.rename(aside)
        metrics.symlink_to("/dev/full")
        with pytest.raises(RunError, match=r"disk is full\. Make room"):
            run.log("train", 2, {"loss": 1.0})
        aside.replace(metrics)
        (run.dir / ".summary.json.tmp").symlink_to("/dev/full")
        with pytest.raises(RunError, match="disk is full"):
            run.write_json("summary.json", {"x": 2})
        assert run.read_json("summary.json") == {"x": 1}
        assert len(run.metrics()) == 1


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(RunError, match=r"cannot write the run folder .*--run-dir"):
        _open(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o500)
    with pytest.raises(RunError, match="no permission"):
        _open(tmp_path)


def test_progress_prints_lines_where_there_is_no_terminal():
    file = io.StringIO()
    with Progress("grpo", total=50, start=10, file=file) as progress:
        for step in range(11, 51):
            progress.update(step, reward=0.25, loss=1e-5)
    lines = file.getvalue().splitlines()
    assert lines[0] == "grpo 11/50  reward 0.25  loss 1e-05"
    assert lines[-1].startswith("grpo 50/50  reward 0.25  loss 1e-05  00:00 left")
    assert len(lines) == 2  # the rest came within 10 seconds
    assert "\r" not in file.getvalue()


def test_progress_is_a_bar_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    file = Terminal()
    with Progress("grpo", total=20, start=10, file=file) as progress:
        for step in range(11, 21):
            progress.update(step, reward=0.25)
    assert "\r" in file.getvalue()
    assert "grpo: 100%" in file.getvalue() and "20/20" in file.getvalue() and "reward 0.25" in file.getvalue()
