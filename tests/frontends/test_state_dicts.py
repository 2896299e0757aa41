"""Weights alone into a network: strict but for BatchNorm's counters, one line for every fault."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from jointsparse.frontends.errors import InputError
from jointsparse.frontends.networks import build
from jointsparse.frontends.state_dicts import load_weights


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "ckpt"])
def test_counters_may_be_missing_and_nothing_else(tmp_path: Path, suffix: str) -> None:
    state = build("resnet20", width=4).state_dict()
    bare = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    assert len(bare) < len(state)
    path = tmp_path / f"weights.{suffix}"

    def write(tensors: dict[str, torch.Tensor]) -> None:
        if suffix == "safetensors":
            save_file(tensors, path)
        else:
            torch.save({"state_dict": tensors} if suffix == "ckpt" else tensors, path)

    write(bare)
    model = build("resnet20", width=4)
    load_weights(model, path)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items() if key in bare)
    for tensors in (dict(list(bare.items())[1:]), {**bare, "more": torch.zeros(1)}):
        write(tensors)
        with pytest.raises(InputError, match="does not fit the network") as caught:
            load_weights(model, path)
        assert "\n" not in str(caught.value)


def test_other_files_are_refused_in_one_line(tmp_path: Path) -> None:
    model = build("vdsr", depth=3, width=8)
    save_file({"conv0.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"1234567890")
    (tmp_path / "broken.pt").write_bytes(b"1234567890")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    torch.save({1: torch.zeros(1)}, tmp_path / "number.pt")
    cases = {
        "other.safetensors": "does not fit",
        "broken.safetensors": "weights alone",
        "broken.pt": "weights alone",
        "list.pt": "no state dict",
        "number.pt": "no state dict",
        "missing.safetensors": "no such file",
    }
    for name, words in cases.items():
        with pytest.raises(InputError, match=words) as caught:
            load_weights(model, tmp_path / name)
        assert "\n" not in str(caught.value)
