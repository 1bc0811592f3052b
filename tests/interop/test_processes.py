"""An export from several processes: all gather, one writes, and all hear of a failure."""

import os
import subprocess
import sys

import numpy as np
import pytest

from moe_jax.interop.weight_files import WeightFiles

SCRIPT = """
import pathlib, sys
import jax
from moe_jax.config import MeshConfig
from moe_jax.interop.pretrained import CheckpointFilesError, load_pretrained, save_pretrained
from moe_jax.sharding import make_mesh
from moe_jax.training.distributed import initialize

initialize()
source, target = sys.argv[1:]
model = load_pretrained(source, make_mesh(MeshConfig(data=1, fsdp=2, expert=2)))
assert not model.params["embed_VD"].is_fully_addressable
save_pretrained(model, target)
assert (pathlib.Path(target) / "SHA256SUMS").is_file()
try:
    save_pretrained(model, target)
except CheckpointFilesError as error:
    print(f"refused: {error}")
"""


@pytest.mark.slow
def test_one_process_writes_what_all_hold(tmp_path):
    source = os.path.join(os.path.dirname(__file__), "checkpoints", "deepseek_v2")
    (tmp_path / "export.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "launch.local", "--processes", "2", "--devices", "2", "--"]
    command += [str(tmp_path / "export.py"), source, str(tmp_path / "export")]
    paths = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": paths})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "exists and is not empty" in done.stdout
    assert "process 0 could not write it" in done.stdout
    ours, theirs = WeightFiles(tmp_path / "export"), WeightFiles(source)
    assert set(ours.names) == set(theirs.names)
    for name in theirs.names:
        np.testing.assert_array_equal(ours.read(name), theirs.read(name))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "export.py"]
