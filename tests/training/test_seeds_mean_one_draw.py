"""A seed means one draw, whatever torch's default type is; Trainers of other precisions change it around the step."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_bpfree as bpf
from lightning_bpfree.core.directions import Directions
from lightning_bpfree.federated.federation import Federation
from lightning_bpfree.federated.partition import LocalData
from lightning_bpfree.federated.privacy import Privacy
from lightning_bpfree.methods.diffusion_adjoint.pipeline_sampler import PipelineSampler
from lightning_bpfree.methods.evolution_strategy.population.noise import Noise, noise_table

PACKAGE = Path(bpf.__file__).parent


def table() -> Tensor:
    noise_table.cache_clear()  # as if no other fit of this process had drawn it
    try:
        return noise_table(torch.device("cpu"))[:4096].clone()
    finally:
        noise_table.cache_clear()


DRAWS: dict[str, Callable[[], Any]] = {
    "table of noise": table,
    "independent noise": lambda: Noise(100, 2, 3, "independent").row(1),
    "latents of a pipeline": lambda: PipelineSampler.noise(
        SimpleNamespace(family=SimpleNamespace(shape=lambda *_: (1, 5, 5))), [1, 2]
    ),
    "fates of clients": lambda: Federation(num_clients=40, dropout=0.3, straggler=0.3).fates(1, range(40)),
    "portable directions": lambda: torch.stack(
        [Directions({"w": torch.zeros(9, dtype=torch.float32)}, 3, 0, generator="portable")[k]["w"] for k in (0, 1, 2)]
    ),
}
if find_spec("cryptography"):
    DRAWS["samples of a private round"] = lambda: (
        LocalData(torch.arange(500), range(500), 500, torch.stack)
        .drawn(Privacy(seed=0).source(1).uniforms(500).tolist(), 0.29)[0][0]
        .tolist()
    )


@pytest.fixture(params=[torch.float64, torch.bfloat16])
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_draws_do_not_depend_on_the_default_type(draw, default_dtype):
    found = draw()
    torch.set_default_dtype(torch.float32)
    expected = draw()
    assert str(found) == str(expected)
    if isinstance(found, Tensor):
        assert found.dtype == expected.dtype == torch.float32
        assert torch.equal(found, expected)


class Quadratic(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(50))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.weight.square().sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def trained(precision: str) -> Tensor:
    module = Quadratic()
    trainer = pl.Trainer(
        max_steps=1, precision=precision, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[bpf.EvolutionStrategy(bpf.OpenAIES(0.1, "raw"), 8, seed=3)],
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(torch.zeros(2, 1))))
    return module.weight.detach()


def test_the_fit_before_does_not_decide_the_noise():
    noise_table.cache_clear()
    single = trained("32-true")
    noise_table.cache_clear()
    double = trained("64-true")
    noise_table.cache_clear()
    torch.testing.assert_close(double.float(), single)  # two precisions of one step
    trained("bf16-true")
    assert torch.equal(trained("32-true"), single)


def test_seeded_draws_name_their_type():
    unnamed = [
        f"{path.relative_to(PACKAGE)}:{call.lineno}"
        for path in PACKAGE.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call)
        and ast.unparse(call.func) in ("torch.rand", "torch.randn")
        and {word.arg for word in call.keywords} & {"generator", "dtype"} == {"generator"}
    ]
    assert unnamed == []
