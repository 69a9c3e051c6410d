"""The command line as a user meets it."""

import pytest
from public_checkpoints import GOLDEN
from typer.testing import CliRunner

from hooked_vla import list_models
from hooked_vla.cli import app

runner = CliRunner(env={"COLUMNS": "160", "TERM": "xterm"})


def test_models_are_listed() -> None:
    result = runner.invoke(app, ["models"])
    assert result.exit_code == 0 and all(name in result.output for name in list_models())


@pytest.mark.parametrize("name", list_models())
def test_hooks_and_info_of_every_model(name: str) -> None:
    hooks = runner.invoke(app, ["hooks", name])
    assert hooks.exit_code == 0 and "hook points in" in hooks.output and "head.hook_action" in hooks.output
    info = runner.invoke(app, ["info", name])
    assert info.exit_code == 0 and "parameters" in info.output and "dead ends" in info.output


def test_hooks_of_a_published_size_group_layers() -> None:
    output = runner.invoke(app, ["hooks", "smolvla", "--match", "vlm.blocks.*.hook_resid_p*"]).output
    assert "vlm.blocks.{0-15}.hook_resid_pre" in output and "[batch, seq, 960]" in output and "all but 15" in output
    listed = runner.invoke(app, ["hooks", "smolvla", "--match", "vlm.blocks.1?.hook_resid_pre", "--every-layer"]).output
    assert all(f"vlm.blocks.{i}.hook_resid_pre" in listed for i in range(10, 16))
    assert "| `expert.hook_velocity` |" in runner.invoke(app, ["hooks", "smolvla", "--markdown"]).output


def test_info_of_a_checkpoint_says_what_loading_did() -> None:
    output = runner.invoke(app, ["info", str(GOLDEN / "smolvla")]).output
    assert "124 loaded" in output and "cameras ['top', 'wrist']" in output


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["info", "no such folder"], "neither a folder nor a checkpoint"),
        (["hooks", "smolvla", "--match", "vlm.blocks.0.hook_resid_pst"], "nearest: vlm.blocks.0.hook_resid_post"),
        (["hooks", "smolvla", "--size", "huge"], "unknown size 'huge'"),
    ],
)
def test_mistakes_are_one_message_without_a_traceback(command: list[str], message: str) -> None:
    result = runner.invoke(app, command)
    assert result.exit_code == 2 and message in " ".join(result.output.replace("│", " ").split())
    assert "Traceback" not in result.output
