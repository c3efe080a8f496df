"""The command line and the checks before a rank starts."""

import shutil
import socket
import subprocess
import sys
from functools import partial

import pytest

from avatars.errors import UserError
from launch.cli import COMMANDS, main, usage
from launch.preflight import check_hosts, free_port, read_hostfile
from launch.recipes import RECIPES, find_recipe


def test_usage_names_every_command():
    assert all(f"  {name} " in usage() for name in COMMANDS)


def test_every_command_can_be_found():
    from importlib import import_module

    for target, _ in COMMANDS.values():
        module, function = target.split(":")
        assert callable(getattr(import_module(module), function))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["trian"], "Did you mean `headsplat train`"),
        (["shards", "pak"], "Did you mean `headsplat shards pack`"),
        (["train", "avat3r-cpuu"], "The nearest is 'avat3r-cpu'"),
        (["train"], "Name a recipe"),
        (["launch", "avat3r-tiny", "--nodes", "8"], "NODES=8 needs HOSTFILE="),
        (["launch", "avat3r-tiny", "--data", "nowhere"], "nowhere"),
        (["fit", "flashavatar", "--data", "nowhere"], "nowhere"),
    ],
)
def test_what_a_user_can_mend_is_a_sentence(words, sentence, capsys):
    assert main(words) == 1
    error = capsys.readouterr().err
    assert sentence in error
    assert error.startswith("headsplat: ")
    assert "Traceback" not in error


def test_output_that_nobody_reads_to_its_end_is_no_traceback():
    # `true` closes the pipe at once, long before the first word is printed.
    command = f"{sys.executable} -m launch.cli train --help | true; exit ${{PIPESTATUS[0]}}"
    told = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (told.returncode, told.stderr) == (141, "")


def test_an_unknown_override_names_the_nearest(capsys):
    words = ["train", "avat3r-tiny", "--data", "d", "--run", "r", "--optimizer.lrr", "1"]
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert "--optimizer.lr" in capsys.readouterr().err


def test_an_unknown_override_is_told_before_data_are_made(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(["launch", "avat3r-tiny", "--out", str(tmp_path), "--args=--optimizer.lrr 1"])
    assert stop.value.code == 2
    assert "--optimizer.lr" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_more_nodes_than_hosts(tmp_path):
    hostfile = tmp_path / "hosts"
    hostfile.write_text("a slots=8\n# a comment\n\nb slots=8\n")
    assert read_hostfile(hostfile) == {"a": 8, "b": 8}
    check_hosts(2, hostfile)
    with pytest.raises(UserError, match=r"NODES=3 but .* names 2 hosts"):
        check_hosts(3, hostfile)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("a 8\n", "line 1"), ("a slots=8\na slots=4\n", "twice"), ("a slots=0\n", "line 1")],
)
def test_a_hostfile_that_is_wrong(tmp_path, text, sentence):
    hostfile = tmp_path / "hosts"
    hostfile.write_text(text)
    with pytest.raises(UserError, match=sentence):
        read_hostfile(hostfile)


def test_a_port_in_use():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"PORT={port} cannot be used"):
            free_port(port)
    assert free_port(None) > 0


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_what_it_is_called(name):
    assert find_recipe(name).recipe == name


@pytest.mark.parametrize(("full", "prefix"), [("avat3r", "avat3r"), ("avat3r-cpu-full", "avat3r-cpu")])
def test_an_ablation_leaves_out_one_thing(full, prefix):
    whole = find_recipe(full).to_json()

    def changed(row):
        values = find_recipe(f"{prefix}-{row}").to_json()
        flat = {f"{a}.{b}": v for a in ("model", "data") for b, v in values[a].items() if v != whole[a][b]}
        others = {name for name in values if name not in ("model", "data") and values[name] != whole[name]}
        assert others == {"recipe"}
        return flat

    no_positions = {"model.position_prior": False, "model.position_skip": False}
    assert changed("no-positions") == no_positions
    assert changed("no-features") == {"model.feature_dim": 0}
    assert changed("no-priors") == {**no_positions, "model.feature_dim": 0}
    assert changed("no-random-timesteps") == {"data.input_timesteps": "same"}
    assert changed("no-position-skip") == {"model.position_skip": False}
    assert changed("no-color-skip") == {"model.color_skip": False}


def test_train_help_names_the_recipes(capsys):
    assert main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in RECIPES)


def test_a_recipe_prints_its_whole_configuration(capsys):
    assert main(["train", "avat3r-tiny", "--print-config", "--model.width", "128"]) == 0
    assert '"width": 128' in capsys.readouterr().out


def refused_before_a_rank_starts(capsys, tmp_path, *words):
    status = main(["launch", "avat3r-tiny", "--out", str(tmp_path / "out"), *words])
    assert status == 1
    assert not (tmp_path / "out" / "runs").exists()
    error = capsys.readouterr().err
    assert error.startswith("headsplat: ")
    return error


def test_data_without_a_manifest(capsys, tmp_path):
    (tmp_path / "data").mkdir()
    error = refused_before_a_rank_starts(capsys, tmp_path, "--data", str(tmp_path / "data"))
    assert "headsplat shards pack" in error


def test_a_shard_cut_short(capsys, tmp_path, tiny_shards):
    shutil.copytree(tiny_shards, tmp_path / "data")
    tar = sorted((tmp_path / "data").glob("*.tar"))[0]
    tar.write_bytes(tar.read_bytes()[:-2000])
    error = refused_before_a_rank_starts(capsys, tmp_path, "--data", str(tmp_path / "data"))
    assert tar.name in error


def test_a_port_in_use_starts_nothing(capsys, tmp_path, tiny_shards):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        error = refused_before_a_rank_starts(capsys, tmp_path, "--data", str(tiny_shards), "--port", port)
    assert f"PORT={port}" in error


def test_pictures_of_another_size_than_the_recipes(capsys, tmp_path, tiny_shards):
    error = refused_before_a_rank_starts(
        capsys, tmp_path, "--data", str(tiny_shards), "--args=--model.size 96"
    )
    assert "48" in error
    assert "96" in error


def test_a_fit_that_failed_is_in_the_report_s_list(tmp_path, monkeypatch):
    import cluster.fit
    from cluster.fit import FitResult, Fits
    from eval.failures import read_failures
    from launch.fitting import FitOptions, run_fits
    from launch.workspace import Workspace

    told = [("s01", "failed", "no face"), ("s02", "fitted", None)]
    results = [
        FitResult("flashavatar", name, status, tmp_path / name, error=error) for name, status, error in told
    ]
    monkeypatch.setattr(cluster.fit, "fit_subjects", lambda *words, **options: Fits(results))
    workspace = Workspace(tmp_path)
    with pytest.raises(UserError, match="could not be fitted to s01"):
        run_fits(FitOptions(), tmp_path, workspace)
    assert [(f.subject, f.reason) for f in read_failures(workspace.results)] == [("s01", "no face")]


def test_the_demo_is_packed_as_a_recipe_needs_it(tmp_path, monkeypatch):
    import cluster.synth
    from launch.data import DemoCaptures, demo_shards
    from launch.workspace import Workspace
    from shards import Manifest
    from shards.synth import synthesize

    monkeypatch.setattr(cluster.synth, "synthesize_population", partial(synthesize, progress=False))
    demo = DemoCaptures(subjects=2, timesteps=5, views=4, size=32, heldout=1, input_sets=1)
    workspace = Workspace(tmp_path)
    plain = demo_shards(workspace, 32, demo)
    special = demo_shards(workspace, 32, demo, input_timesteps="same", surface=True)
    assert special.name == f"{plain.name}-same-timestep-surface"
    for folder, timesteps, features in ((plain, "different", "none"), (special, "same", "surface:makehuman")):
        manifest = Manifest.load(folder)
        assert (manifest.settings.input_timesteps, manifest.priors.features) == (timesteps, features)
    assert {path.parent for path in workspace.shards.glob("*/manifest.json")} == {plain, special}
    before = (special / "manifest.json").stat().st_mtime_ns
    assert demo_shards(workspace, 32, demo, input_timesteps="same", surface=True) == special
    assert (special / "manifest.json").stat().st_mtime_ns == before
