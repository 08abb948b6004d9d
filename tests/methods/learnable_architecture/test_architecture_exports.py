"""Exports elsewhere: without this package, by torch.export, by ONNX."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from searched_networks import built, crop_at_random

from lightning_bpfree.methods.learnable_architecture.continuous import plain
from lightning_bpfree.methods.learnable_architecture.export import export

LOAD = """
import importlib.abc, json, sys
import torch

class Without(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("lightning_bpfree", "lightning"):
            raise ImportError(name)

sys.meta_path.insert(0, Without())
sys.path.insert(0, sys.argv[1])
from plain import PlainCCNN, resized

for folder in sys.argv[2:]:
    config = json.load(open(f"{folder}/config.json"))
    if "blocks" in config:
        network = PlainCCNN(config)
    else:
        import networks
        network = resized(networks.ResNet(), config)
    network.load_state_dict(torch.load(f"{folder}/state_dict.pt", weights_only=True))
    x, expected = torch.load(f"{folder}/example.pt", weights_only=True)
    with torch.no_grad():
        assert torch.allclose(network.eval()(x), expected, rtol=1e-5, atol=1e-5), folder
print("equal")
"""


@pytest.mark.slow  # a process that imports torch
def test_exports_are_loaded_without_this_package(tmp_path):
    source = Path(__file__).with_name("searched_networks.py").read_text(encoding="utf-8")
    classes = source[source.index("class Residual") : source.index("class Concatenating")]
    (tmp_path / "networks.py").write_text(f"from torch import nn\n\n{classes}", encoding="utf-8")
    (tmp_path / "plain.py").write_text(Path(plain.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    folders = []
    for name in ("ccnn", "dense ccnn", "resnet"):
        _, call, architecture = built(name)
        architecture.install()
        crop_at_random(architecture, 4)
        exported = export(architecture)
        exported.save(tmp_path / name.replace(" ", "_"))
        x = torch.randn(3, *call.args[0].shape[1:])
        with torch.no_grad():
            torch.save([x, exported.network(x)], tmp_path / name.replace(" ", "_") / "example.pt")
        folders.append(str(tmp_path / name.replace(" ", "_")))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOAD, str(tmp_path), *folders],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


@pytest.mark.slow  # torch.export takes seconds
@pytest.mark.filterwarnings("ignore:No complete tensor found in the group")
@pytest.mark.parametrize("name", ["ccnn", "resnet"])
def test_exports_go_through_torch_export(name, tmp_path):
    _, call, architecture = built(name)
    architecture.install()
    crop_at_random(architecture, 4)
    network = export(architecture).network
    program = torch.export.export(network, call.args)
    torch.export.save(program, tmp_path / "network.pt2")
    again = torch.export.load(tmp_path / "network.pt2").module()
    assert torch.allclose(again(*call.args), network(*call.args), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the exporter
@pytest.mark.parametrize("name", ["ccnn", "resnet"])
def test_exports_go_through_onnx(name, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    _, call, architecture = built(name)
    architecture.install()
    crop_at_random(architecture, 4)
    network = export(architecture).network
    torch.onnx.export(network, call.args, str(tmp_path / "network.onnx"), dynamo=True, verbose=False)
    session = runtime.InferenceSession(str(tmp_path / "network.onnx"))
    (found,) = session.run(None, {session.get_inputs()[0].name: call.args[0].numpy()})
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(found), network(*call.args), rtol=1e-4, atol=1e-5)
