"""Coal pillars: formula, classes, files; tables split by seed; the recipe's classifier reports by class."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_bpfree.demos.pillars import (
    CoalPillarDataModule,
    SafetyFactor,
    pillar_classes,
    read_pillars,
    simulated_pillars,
)
from lightning_bpfree.demos.tables import ScikitTableDataModule, TableClassifier

HEADER = "w,h,B,H,failed\n"


def test_the_safety_factor_is_its_closed_form():
    w, h, bord, depth = torch.rand(4, 100, dtype=torch.float64) * 10 + 1
    closed = 288 * w**2.46 / (depth * h**0.66 * (w + bord) ** 2)  # 7.2 / 0.025 = 288
    assert torch.allclose(SafetyFactor()(w, h, bord, depth), closed, rtol=1e-10)  # float64
    with pytest.raises(ValueError, match=r"strength=-1\.0: give a positive number"):
        SafetyFactor(strength=-1.0)


@pytest.mark.parametrize("labeling", ["agreement", "adequacy"])
def test_classes_are_a_partition(labeling):
    cases = simulated_pillars()
    safety = SafetyFactor()(*(cases[column] for column in "whBH"))
    classes = pillar_classes(cases["failed"], safety, 1.3, labeling)
    assert torch.equal(classes >= 2, cases["failed"].bool())
    dangerous = cases["failed"].bool() & (safety >= 1.3)
    assert torch.equal(classes == (3 if labeling == "agreement" else 2), dangerous)
    assert torch.bincount(classes, minlength=4).sum() == 423
    # As the threshold goes to zero, the factor of every intact pillar is suitable.
    assert set(pillar_classes(cases["failed"], safety, 1e-9).tolist()) == {0, 3}


def test_simulated_pillars_are_a_function_of_the_seed_and_say_so(caplog):
    first, again, other = simulated_pillars(seed=1), simulated_pillars(seed=1), simulated_pillars(seed=2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["w"], other["w"])
    assert int(first["failed"].sum()) == 86
    with caplog.at_level("INFO"):
        CoalPillarDataModule().setup()
    assert "SIMULATED" in caplog.text
    with pytest.raises(ValueError, match="num_failed=0: give a whole number of at least 1"):
        simulated_pillars(num_failed=0)


def test_a_file_is_read_and_checked(tmp_path):
    def read(text: str):
        path = tmp_path / "cases.csv"
        path.write_text(text, encoding="utf-8")
        return read_pillars(path)

    found = read("mine,w,h,B,H,failed,ratio\nx,12,3,6,100,0,4.0\ny,6,4,6,120,1,\n")
    assert found["w"].tolist() == [12, 6]
    assert found["failed"].tolist() == [0, 1]
    for text, message in {
        "w,h,B,failed\n1,1,1,0\n": "column H is missing; it has w, h, B, failed",
        HEADER + "-12,3,6,100,0\n": "line 2: w is -12; give a length above 0",
        HEADER + "12,3,6,100,0\n12,3,0,100,0\n": "line 3: B is 0",
        HEADER + "12000,3,6,100,0\n": "w is 12000 m, more than 200 m; is it in feet or millimeters",
        HEADER + "12,3,6,100,2\n": "failed is 2; give 1 for failed",
        HEADER + "12,3,6,deep,1\n": "H is 'deep', which is not a number",
        HEADER + "12,3,6,nan,1\n": "H is nan",
        "w,h,B,H,failed,ratio\n12,3,6,100,0,1.2\n": "ratio is 1.2, but w / h is 4",
        HEADER: "a header but no pillars",
    }.items():
        with pytest.raises(ValueError, match=message):
            read(text)
    path = tmp_path / "cases.csv"
    path.write_text(HEADER + "".join(f"{12 + i % 7},3,6,{60 + i},{int(i % 3 == 0)}\n" for i in range(60)))
    data = CoalPillarDataModule(str(path), threshold=1.6, labeling="adequacy")
    data.setup()
    assert data.dataset("train").tensors[0].shape[1] == 5


def test_arguments_are_checked():
    for arguments, message in (
        ({"threshold": 0.0}, "threshold=0.0: give a positive number"),
        ({"labeling": "both"}, "labeling='both': choose 'agreement' or 'adequacy'"),
        ({"test_fraction": 1.0}, "test_fraction=1.0: give a number in"),
        ({"batch_size": 0}, "batch_size=0: give a whole number of at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            CoalPillarDataModule(**arguments)
    with pytest.raises(ValueError, match="name='iris': choose 'breast_cancer'"):
        ScikitTableDataModule("iris")  # type: ignore[arg-type]


def test_only_training_rows_scale_the_features():
    data = ScikitTableDataModule("wine", seed=3)
    data.setup()
    x = data.dataset("train").tensors[0]
    assert x.mean(0).abs().max() < 1e-5  # float32
    assert (x.std(0, correction=0) - 1).abs().max() < 1e-5
    assert data.dataset("test").tensors[0].mean(0).abs().max() > 1e-3
    parts = [len(data.dataset(split)) for split in ("train", "val", "test")]
    assert sum(parts) == 178
    other = ScikitTableDataModule("wine", seed=4)
    other.setup()
    assert not torch.equal(data.dataset("test").tensors[0], other.dataset("test").tensors[0])


def test_the_classifier_reports_each_class(tmp_path):
    data = CoalPillarDataModule(seed=0)
    model = TableClassifier(nn.Linear(5, 4), 4, ["a", "b", "c", "d"], str(tmp_path / "confusion.png"))
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    (found,) = trainer.test(model, data, verbose=False)
    x, y = data.dataset("test").tensors
    predicted = model(x).argmax(-1)
    hits, claimed, there = ((predicted == y) & (y == 0)).sum(), (predicted == 0).sum(), (y == 0).sum()
    precision, recall = hits / claimed.clamp_min(1), hits / there
    assert found["test_f2/a"] == pytest.approx(float(5 * precision * recall / (4 * precision + recall)), rel=1e-5)
    assert found["test_acc/a"] == pytest.approx(float(recall), rel=1e-5)
    assert found["test_rows/a"] == float(there)
    assert (tmp_path / "confusion.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="2 names for 4 classes"):
        TableClassifier(nn.Linear(5, 4), 4, ["a", "b"])
