"""Run folders: resuming the same config only, finding and pruning checkpoints, results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ldgan.engine.checkpoint import save_checkpoint
from ldgan.engine.cli import UserError
from ldgan.engine.run import Best, RunFolder, resolve_checkpoint

CONFIG = "total_steps: 100\nnetwork:\n  channels: 64\n  attention: [16, 8]\n"


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create_or_resume(tmp_path / "run", CONFIG)


def save(run: RunFolder, *steps: int) -> None:
    for step in steps:
        save_checkpoint(run.checkpoint_path(step), {}, {"step": step})


def saved_steps(run: RunFolder) -> list[str]:
    return sorted(path.name for path in run.checkpoints.iterdir())


def test_same_config_resumes(run: RunFolder) -> None:
    reordered = "network: {attention: [16, 8], channels: 64}\ntotal_steps: 100\n"
    assert RunFolder.create_or_resume(run.path, reordered).path == run.path


def test_other_config_is_refused_with_every_difference(run: RunFolder) -> None:
    other = "total_steps: 100\nnetwork:\n  channels: 32\n  heads: 2\n"
    with pytest.raises(UserError) as caught:
        RunFolder.create_or_resume(run.path, other)
    message = str(caught.value)
    assert "network.channels: 64 in the run, 32 asked" in message
    assert "network.attention: [16, 8] in the run, nothing asked" in message
    assert "network.heads: nothing in the run, 2 asked" in message
    assert "total_steps" not in message
    assert run.config_path.read_text() == CONFIG


def test_keys_that_may_change_are_updated(run: RunFolder) -> None:
    longer = CONFIG.replace("100", "200")
    with pytest.raises(UserError, match="total_steps: 100 in the run, 200 asked"):
        RunFolder.create_or_resume(run.path, longer)
    RunFolder.create_or_resume(run.path, longer, may_change=["total_steps"])
    assert run.config_path.read_text() == longer


def test_all_keys_of_a_section_may_change_and_a_run_may_be_older_than_the_section(run: RunFolder) -> None:
    later = CONFIG + "logs:\n  every_steps: 10\n  names:\n    first: loss\n"
    with pytest.raises(UserError, match=r"logs.every_steps: nothing in the run, 10 asked"):
        RunFolder.create_or_resume(run.path, later)
    for config in (later, later.replace("every_steps: 10", "every_steps: 20"), CONFIG):
        RunFolder.create_or_resume(run.path, config, may_change=["logs.*"])
        assert run.config_path.read_text() == config
    with pytest.raises(UserError, match=r"network.channels: 64 in the run, 65 asked"):
        RunFolder.create_or_resume(run.path, CONFIG.replace("64", "65"), may_change=["logs.*"])


def test_foreign_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"not a run folder \(no config.yaml\)"):
        RunFolder.create_or_resume(tmp_path, CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_killed_while_it_wrote_its_config_is_no_foreign_folder(tmp_path: Path) -> None:
    (tmp_path / ".config.yaml.tmp").write_text(CONFIG[:20])
    assert RunFolder.create_or_resume(tmp_path, CONFIG).config_path.read_text() == CONFIG
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_a_config_that_is_no_text_is_named(run: RunFolder) -> None:
    run.config_path.write_bytes(b"network: \xed\xff")
    with pytest.raises(UserError, match=r"config.yaml: cannot read the config: 'utf-8' codec"):
        RunFolder.create_or_resume(run.path, CONFIG)


def test_latest_is_the_highest_complete_step(run: RunFolder) -> None:
    assert run.latest_checkpoint() is None
    save(run, 2000, 10_000_000_000, 900)
    (run.checkpoints / ".step_000003000.tmp").mkdir()
    (run.checkpoints / ".step_000003000.tmp" / "checkpoint.json").write_text("{}")
    run.checkpoint_path(99_000_000_000).mkdir()  # no checkpoint.json: not a checkpoint
    assert run.latest_checkpoint() == run.checkpoints / "step_10000000000"


def test_pruning_keeps_the_newest_and_the_protected(run: RunFolder) -> None:
    save(run, 100, 200, 300, 400)
    (run.checkpoints / ".step_000000500.tmp").mkdir()
    run.prune_checkpoints(keep=2, protect=[run.checkpoint_path(100)])
    assert saved_steps(run) == ["step_000000100", "step_000000300", "step_000000400"]
    run.prune_checkpoints(keep=5)
    assert len(saved_steps(run)) == 3
    with pytest.raises(ValueError, match="at least 1"):
        run.prune_checkpoints(keep=0)


def test_the_newest_undamaged_checkpoint_is_found_and_newer_ones_are_set_aside(run: RunFolder) -> None:
    assert run.undamaged_checkpoint() == (None, [])
    save(run, 100, 200, 300, 400)
    assert run.undamaged_checkpoint() == (run.checkpoint_path(400), [])
    description = run.checkpoint_path(400) / "checkpoint.json"
    description.write_text(description.read_text().replace("400", "401"))
    (run.checkpoint_path(300) / "checkpoint.json").unlink()
    found, warnings = run.undamaged_checkpoint()
    assert found == run.checkpoint_path(200)
    assert warnings == [
        f"{description}: damaged (SHA-256 is not that of its contents); kept as damaged_step_000000400,"
        " going on from step_000000200",
        f"{run.checkpoint_path(300)}: not a checkpoint: it has no checkpoint.json; kept as damaged_step_000000300,"
        " going on from step_000000200",
    ]
    assert saved_steps(run) == [
        *("damaged_step_000000300", "damaged_step_000000400", "step_000000100", "step_000000200"),
    ]
    save(run, 300)
    (run.checkpoint_path(300) / "checkpoint.json").write_text("")
    _, (warning,) = run.undamaged_checkpoint()
    assert "kept as damaged_step_000000300_2," in warning
    run.prune_checkpoints(keep=1)
    assert saved_steps(run) == [
        *("damaged_step_000000300", "damaged_step_000000300_2", "damaged_step_000000400", "step_000000200"),
    ]
    assert run.latest_checkpoint() == run.checkpoint_path(200)


def test_where_all_checkpoints_are_damaged_none_is_moved(run: RunFolder) -> None:
    save(run, 100, 200)
    for step in (100, 200):
        (run.checkpoint_path(step) / "checkpoint.json").write_text("{")
    for _ in range(2):  # not a fresh start the second time
        with pytest.raises(UserError, match=r"no checkpoint is undamaged \(.*200.*damaged.*; .*100.*\); put a copy"):
            run.undamaged_checkpoint()
    assert saved_steps(run) == ["step_000000100", "step_000000200"]


def test_a_checkpoint_of_another_version_is_not_damaged(run: RunFolder) -> None:
    save(run, 100, 200)
    (run.checkpoint_path(200) / "checkpoint.json").write_text('{"format": "ldgan-checkpoint/2", "things": {}}')
    with pytest.raises(UserError, match="format 'ldgan-checkpoint/2', expected"):
        run.undamaged_checkpoint()
    assert saved_steps(run) == ["step_000000100", "step_000000200"]


def test_resolve_takes_a_run_or_a_checkpoint(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a run that has saved no checkpoint yet; expected"):
        resolve_checkpoint(run.path)
    save(run, 100, 200)
    assert resolve_checkpoint(run.path) == run.checkpoint_path(200)
    assert resolve_checkpoint(run.checkpoint_path(100)) == run.checkpoint_path(100)
    with pytest.raises(UserError, match="nowhere: does not exist; expected a run folder"):
        resolve_checkpoint(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is neither a run nor a checkpoint; expected"):
        resolve_checkpoint(tmp_path)


def test_the_best_checkpoint_has_a_name(run: RunFolder) -> None:
    with pytest.raises(UserError, match=r"run/best: the run keeps no best checkpoint \(evaluation.best\); expected"):
        resolve_checkpoint(run.path / "best")
    save(run, 100, 200)
    run.write_best(Best(100, "FID", 3.25))
    assert resolve_checkpoint(run.path / "best") == run.checkpoint_path(100)
    assert resolve_checkpoint(run.path) == run.checkpoint_path(200)
    assert json.loads(run.best_path.read_text()) == {
        "step": 100,
        "metric": "FID",
        "value": 3.25,
        "checkpoint": "checkpoints/step_000000100",
    }
    run.prune_checkpoints(keep=1)
    with pytest.raises(UserError, match="keeps no best checkpoint"):
        resolve_checkpoint(run.path / "best")
    for damaged in ("{", "[]", "{}", '{"step": null}'):
        run.best_path.write_text(damaged)
        with pytest.raises(UserError, match=r"best.json: damaged .*; name a checkpoint of the run instead"):
            resolve_checkpoint(run.path / "best")


def test_a_run_may_be_called_best(tmp_path: Path) -> None:
    run = RunFolder.create_or_resume(tmp_path / "best", CONFIG)
    save(run, 100)
    assert resolve_checkpoint(run.path) == run.checkpoint_path(100)


def test_summary_round_trip(run: RunFolder) -> None:
    with pytest.raises(UserError, match=r"summary.json: not there yet"):
        run.read_summary()
    run.write_summary({"fid": 3.25, "num_images": 50_000})
    assert run.read_summary() == {"fid": 3.25, "num_images": 50_000}
    run.summary_path.write_text("{")
    with pytest.raises(UserError, match=r"summary.json: damaged"):
        run.read_summary()
