"""The command line that every experiment shares."""

from dataclasses import dataclass

import pytest

from moe_jax.config import MeshConfig, ModelConfig
from moe_jax.presets import tiny_dense, tiny_moe
from moe_jax.training.experiment import main


@dataclass(frozen=True)
class Config:
    """Nothing but what every experiment has."""

    seed: int = 0
    run_dir: str = ""
    init: str = ""
    preset: str = "tiny_moe"
    tokenizer: str = "byte"
    model: ModelConfig = tiny_moe()
    mesh: MeshConfig = MeshConfig(data=1)


def run(*arguments):
    seen = []
    main("nothing", Config(), lambda config, session: seen.append((config, session)), list(arguments))
    return seen[0]


def test_the_bare_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, session = run()
    assert config == Config()
    assert session.run.dir == tmp_path / "runs" / "nothing-seed0"
    assert (session.run.dir / "config.json").exists()


@pytest.mark.parametrize("arguments", [("--preset", "tiny_dense", "--seed", "1"), ("--seed=1", "--preset=tiny_dense")])
def test_a_preset_comes_before_the_flags_that_change_it(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    config, session = run(*arguments, "--model.num-layers", "5")
    assert config.model.num_layers == 5 and config.model.moe.num_experts == tiny_dense().moe.num_experts
    assert session.run.dir.name == "nothing-seed1"


def test_a_typo_ends_in_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run("--preset", "tiny_mo")
    assert stop.value.code == 2 and "tiny_moe" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
