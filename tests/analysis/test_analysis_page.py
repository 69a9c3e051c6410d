"""The code of docs/analysis.md runs, block after block."""

import re
import warnings
from pathlib import Path

import pandas as pd
import torch

PAGE = Path(__file__).parent.parent.parent / "docs" / "analysis.md"


def test_the_page_runs() -> None:
    names: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
            exec(block, names)
    exact: pd.DataFrame = names["exact"].table
    words = exact[(exact.site == "vlm.blocks.0.hook_resid_pre") & (exact.segment == "language")]
    # the two runs differ in the instruction alone, so at the bottom its tokens are all of the difference
    assert torch.allclose(torch.tensor(words.effect.tolist()), torch.ones(len(words)), atol=1e-5)
    assert names["shares"].error < 1e-4
