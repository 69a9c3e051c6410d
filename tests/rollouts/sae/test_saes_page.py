"""The code and the commands of docs/saes.md run, block after block, as they stand there but for smaller amounts."""

import re
import shlex
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from hooked_vla import HookedVLA
from hooked_vla.cli import app
from hooked_vla.rollouts import tabletop
from hooked_vla.rollouts.sae import training
from hooked_vla.rollouts.suites import get_suite, observation
from hooked_vla.sae import files, saelens
from hooked_vla.sae.autoencoder import SparseAutoencoder
from hooked_vla.sae.presets import preset

# settings of small autoencoders are beside the tests of training
sys.path.insert(0, str(Path(__file__).parents[2] / "sae"))
from toy_saes import D, tokens

PAGE = Path(__file__).parents[3] / "docs" / "saes.md"
MODEL, SITE = "smolvla-tabletop", "expert.blocks.2.hook_resid_post"
# amounts of the page -> those of the test, in commands and in code
SMALLER = {"--episodes": "2", "--counts": "1,4"}
LESS = {"steps=2000": "steps=2", "episodes=6": "episodes=2"}


@pytest.fixture(scope="module", autouse=True)
def _place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An empty folder, short episodes, little training, and an autoencoder of the package: a small one where the
    package has none of that name."""
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setitem(tabletop.SUITES, "goal", replace(get_suite("goal"), max_steps=8))
        little = replace(training.QUICK, steps=4, batch_size=64, buffer_rows=5120, evaluated=200)
        patched.setattr(training, "QUICK", little)
        if f"{MODEL}/{SITE}" not in files.shipped_saes():
            config = preset("hooked", MODEL, SITE, 96, architecture="topk", n_features=40, k=4)
            SparseAutoencoder(config).save_pretrained(folder / "package" / MODEL / SITE)
            patched.setattr(files, "SHIPPED", folder / "package")
        yield


def blocks() -> list[tuple[str, str]]:
    """(language, text) of every block of the page; "" for commands."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)


def run(command: str) -> str:
    """What a command of the page prints, with smaller amounts."""
    given = shlex.split(command)
    assert given[0] == "hooked-vla"
    for name, value in SMALLER.items():
        if name in given:
            given[given.index(name) + 1] = value
    done = CliRunner().invoke(app, given[1:], terminal_width=300)
    assert done.exit_code == 0, f"{command}\n{done.output}"
    return done.output


def names() -> dict:
    """What the page takes from the reader: an observation and its activations, and rows."""
    model = HookedVLA.from_pretrained(MODEL)
    env = get_suite("goal").make("red-orange", model.spec.features.cameras, 96)
    obs = observation(env.reset(seed=3)[0])
    env.close()
    _, cache = model.run_with_cache(obs, SITE)
    return {"obs": obs, "cache": cache, "rows": tokens(5000, seed=1)}


def test_the_page_runs() -> None:
    given, printed = names(), {}
    # what "other" stands for: an autoencoder in SAELens's format
    saelens.write(SparseAutoencoder(preset("hooked", "m", "here", D, steps=1, architecture="topk", k=4)), "other")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for language, text in blocks():
            if language == "python":
                for amount, less in LESS.items():
                    text = text.replace(amount, less)
                exec(text, given)
                continue
            for command in text.replace("\\\n", " ").strip().splitlines():
                name = command.split()[2]
                printed[name] = printed.get(name, "") + run(command)
    assert set(printed) == {"steer", "collect", "train", "eval", "index", "features"}
    table: pd.DataFrame = given["found"].table.set_index("arm")
    # the sham moves nothing, the feature does
    assert table.loc["sham", "unchanged"] == 2 and table.loc["feature +0.5", "unchanged"] == 0
    assert given["loop"].is_exact and "identity" in printed["eval"]
    steered, titrated = (set(pd.read_csv(f"outputs/{name}/steered.csv")["arm"]) for name in ("steered", "titration"))
    assert {"sham", "feature -1", "feature +1", "feature out", "random 0 +1"} <= steered
    assert titrated == {"baseline", "ranked 1", "random 1", "ranked 4", "random 4"}
    assert all(f"end effector along {axis}" in printed["steer"] for axis in "xyz")
    # two plans of eight action tokens, at the last denoise step
    assert given["last"].shape == (16, 96)
    [heat_map] = given["maps"]
    assert heat_map.segment == "action" and heat_map.value.shape == (10, 8) and heat_map.value.max() > 0
