"""Makes tests/golden/saelens again: tiny autoencoders that sae-lens saved, and what it makes of some tokens.

python tests/sae/record_saelens.py      # where sae-lens is installed
"""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

GOLDEN = Path(__file__).parents[1] / "golden" / "saelens"
D, M, D_OUT = 6, 10, 4
SETTINGS: dict[str, dict[str, Any]] = {
    "standard": {},
    "standard_plain_input": {"architecture": "standard", "apply_b_dec_to_input": False},
    "topk": {"k": 3},
    "topk_rescaled": {"architecture": "topk", "k": 3, "rescale_acts_by_decoder_norm": True},
    "jumprelu": {},
    "gated": {},
    "gated_plain_input": {"architecture": "gated", "apply_b_dec_to_input": False},
    "transcoder": {"d_out": D_OUT, "apply_b_dec_to_input": False},
}


def main() -> None:
    from sae_lens import SAE

    version = importlib.metadata.version("sae-lens")
    for number, (name, settings) in enumerate(SETTINGS.items()):
        generator = torch.Generator().manual_seed(number)
        about = {
            "architecture": name, "d_in": D, "d_sae": M, "dtype": "float32", "device": "cpu", **settings,
            "metadata": {"model_name": "tiny", "hook_name": "expert.blocks.0.hook_resid_post",
                         "hook_name_out": "expert.blocks.0.hook_mlp_out", "sae_lens_version": version},
        }  # fmt: skip
        sae = SAE.from_dict(about)
        with torch.no_grad():
            for key, parameter in sae.named_parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.7)
                if key == "threshold":
                    parameter.abs_()
        folder = GOLDEN / name
        sae.save_model(folder)
        x = torch.randn(16, D, generator=generator)
        with torch.no_grad():
            expected = {"x": x, "features": sae.encode(x), "output": sae(x)}
        save_file({key: each.contiguous() for key, each in expected.items()}, folder / "expected.safetensors",
                  metadata={"sae_lens": version})  # fmt: skip
        # as it was written, with line ends
        config = folder / "cfg.json"
        config.write_text(json.dumps(json.loads(config.read_text()), indent=1) + "\n")


if __name__ == "__main__":
    main()
