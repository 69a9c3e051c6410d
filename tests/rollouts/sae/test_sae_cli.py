"""`hooked-vla sae collect`: the small policy of the package, and mistakes in one line."""

import pytest
from typer.testing import CliRunner

from hooked_vla.cli import app
from hooked_vla.sae.store import TokenStore

SITE = "expert.blocks.1.hook_resid_post"


def call(*arguments: str):
    return CliRunner().invoke(app, ["sae", "collect", *arguments], terminal_width=200)


def test_a_store_is_made_and_gone_on_with(tmp_path):
    arguments = ["--model", "smolvla-tabletop", "--site", SITE, "--suite", "goal", "--episodes", "1", "--n-envs", "1",
                 "--denoise-steps", "0,9", "--keep", "bfloat16", "--out", str(tmp_path / "s")]  # fmt: skip
    done = call(*arguments)
    assert done.exit_code == 0, done.output
    store = TokenStore(tmp_path / "s")
    assert store.complete and f"{store.n_rows(SITE):,}" in done.output and "bfloat16" in done.output
    assert set(store.ids(SITE)[:, 2].tolist()) == {0, 9}
    assert call(*arguments).exit_code == 0
    again = call(*arguments[:-1], str(tmp_path / "s"), "--pooling", "mean")
    assert again.exit_code == 2 and "another store: pooling" in " ".join(again.output.replace("│", "").split())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--suite", "goal"], "how many --episodes"),
        ([], "either in which --suite"),
        (["--suite", "goal", "--dataset", "d"], "either in which --suite"),
        (["--dataset", "nowhere"], "not a LeRobotDataset"),
        (["--suite", "goal", "--episodes", "2", "--pooling", "max"], "unknown pooling 'max'"),
        (["--suite", "goal", "--episodes", "2", "--keep", "int8"], "unknown dtype 'int8'"),
        (["--suite", "goal", "--episodes", "2", "--denoise-steps", "99"], "no denoise steps [99]"),
    ],
)
def test_mistakes_are_said_in_one_line(tmp_path, more, said):
    done = call("--model", "smolvla-tabletop", "--site", SITE, "--out", str(tmp_path / "s"), *more)
    assert done.exit_code == 2 and said in " ".join(done.output.replace("│", "").split()), done.output
    assert not (tmp_path / "s").exists()
