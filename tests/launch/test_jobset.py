"""launch.jobset: the manifest, and what is handed to a kubectl that records it."""

import json

import pytest

from launch.jobset import main, to_yaml

yaml = pytest.importorskip("yaml")
OPTIONS = ["--name", "my-run", "--image", "repo/image:1", "--accelerator", "tpu-v5p-slice", "--topology", "2x2x4"]
COMMAND = ["--", "-m", "experiments.pretrain", "--run_dir", "/data/my run: #1"]


def dry(capsys, *options: str) -> dict:
    assert main([*OPTIONS, *options, "--dry-run", *COMMAND]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_one_pod_per_host_of_each_slice(capsys):
    manifest = dry(capsys, "--slices", "3", "--max-restarts", "7")
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert manifest["metadata"]["name"] == "my-run"
    assert manifest["spec"]["failurePolicy"] == {"maxRestarts": 7}
    (slices,) = manifest["spec"]["replicatedJobs"]
    assert slices["replicas"] == 3
    job = slices["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (4, 4, 0)  # 16 chips, 4 a host
    pod = job["template"]["spec"]
    assert (pod["restartPolicy"], pod["hostNetwork"]) == ("Never", True)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "2x2x4",
    }
    (container,) = pod["containers"]
    assert container["command"] == ["python", *COMMAND[1:]]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert "tolerations" not in pod and "volumes" not in pod and "labels" not in manifest["metadata"]


def test_queue_spot_and_volume(capsys):
    manifest = dry(capsys, "--queue", "team", "--spot", "--volume-claim", "disk", "--namespace", "lab")
    assert manifest["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "team"}
    assert manifest["metadata"]["namespace"] == "lab"
    pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert pod["tolerations"][0]["key"] == "cloud.google.com/gke-spot"
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "disk"}
    assert pod["containers"][0]["volumeMounts"] == [{"name": "data", "mountPath": "/data"}]


def test_yaml_of_nested_values_is_read_back():
    value = {
        "a": [{"b": 1, "c": ["x: y", "- #"]}, [1, [2]], "yes"],
        "empty": {},
        "none": [],
        "d": {"e": None, "f": True},
    }
    assert yaml.safe_load(to_yaml(value)) == value


def fake_kubectl(tmp_path, monkeypatch, code: int) -> None:
    tool = tmp_path / "kubectl"
    tool.write_text(f'#!/bin/bash\necho "$*" >{tmp_path}/call\n/bin/cat >{tmp_path}/manifest\nexit {code}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))


def test_apply(tmp_path, monkeypatch, capsys):
    expected = dry(capsys)
    fake_kubectl(tmp_path, monkeypatch, 0)
    assert main([*OPTIONS, *COMMAND]) == 0
    assert (tmp_path / "call").read_text() == "apply --namespace default --filename -\n"
    assert yaml.safe_load((tmp_path / "manifest").read_text()) == json.loads(json.dumps(expected))
    assert "kubectl logs --follow" in capsys.readouterr().out


def test_refusals(tmp_path, monkeypatch, capsys):
    def error(*arguments: str) -> str:
        assert main(list(arguments)) == 2
        return capsys.readouterr().err

    assert "put it after --" in error(*OPTIONS, "--dry-run")
    assert "at most 28 characters" in error(*OPTIONS, "--name", "x" * 29, *COMMAND)
    assert "--topology 4by4" in error(*OPTIONS, "--topology", "4by4", *COMMAND)
    assert "no multiple of --chips-per-host 3" in error(*OPTIONS, "--chips-per-host", "3", *COMMAND)
    fake_kubectl(tmp_path, monkeypatch, 1)
    assert "the cluster needs JobSet" in error(*OPTIONS, *COMMAND)
    monkeypatch.setenv("PATH", "")
    assert "kubectl is not installed" in error(*OPTIONS, *COMMAND)
