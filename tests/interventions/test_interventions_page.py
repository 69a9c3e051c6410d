"""The code of docs/interventions.md runs, block after block."""

import re
import warnings
from pathlib import Path

import torch
from conftest import make_observation

from hooked_vla import HookedVLA

PAGE = Path(__file__).parent.parent.parent / "docs" / "interventions.md"


def test_the_page_runs(tmp_path, capsys) -> None:
    model = HookedVLA.from_spec("smolvla", "tiny").requires_grad_(False)
    torch.manual_seed(0)
    d, same = 64, ["put the red block on the tray"] * 4
    _, cache_all = model.run_with_cache(make_observation(1, seed=7, instruction=same[:1]), "vlm.*.hook_resid_post")
    names = {
        "model": model, "folder": tmp_path, "cache_all": cache_all, "direction": torch.randn(d),
        "obs": make_observation(), "other_obs": make_observation(seed=3), "noise": torch.randn(2, 8, 8),
        "four_copies": make_observation(4, instruction=same), "noise_of_four": torch.randn(4, 8, 8),
        "w_enc": torch.randn(16, d), "b_enc": torch.zeros(16), "w_dec": torch.randn(16, d), "b_dec": torch.zeros(d),
        "threshold": torch.zeros(16), "mean": torch.randn(d), "std": torch.ones(1),
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
            exec(block, names)
    assert not torch.equal(names["weak"].chunk, names["strong"].chunk)
    assert torch.equal(names["same"], names["weak"].chunk)
    swept = names["swept"].chunk
    assert all(
        not torch.equal(swept[i], model(names["four_copies"], names["noise_of_four"]).chunk[i]) for i in (1, 2, 3)
    )
    assert "2 edits at 2 hook points\n  steer: AddRelative 2 × ‖x‖" in capsys.readouterr().out
