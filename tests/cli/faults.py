"""Mistakes that people make on the command line: files, options, checkpoints, data and folders, by command."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import NamedTuple

import torch

TRAINER = ("fit", "validate", "test", "predict")
READ_CONFIG = (*TRAINER, "check", "compare", "tickets")
# What else a command needs, so that the mistake is the only one.
NEEDED = {
    "compare": ["--rules", "rules/zeroth_order", "--out", "out"],
    "tickets": ["--out", "out"],
}


class Case(NamedTuple):
    """One command line with a mistake.

    Args:
        name: of the test.
        arguments: behind ``bpfree``.
        said: what the one line of the error must have.
        slow: whether it is left out of the fast set.
    """

    name: str
    arguments: list[str]
    said: tuple[str, ...]
    slow: bool = False


# Files that are no configuration: found before any library is imported.
FILES: dict[str, tuple[bytes | None, tuple[str, ...]]] = {
    "none.yaml": (None, ("there is no file none.yaml",)),
    "empty.yaml": (b"", ("empty.yaml is empty",)),
    "comments.yaml": (b"# nothing\n", ("comments.yaml is empty",)),
    "bracket.yaml": (b"trainer:\n  max_epochs: [1\nmodel: x\n", ("bracket.yaml, line 3",)),
    "indent.yaml": (b"trainer:\n  max_epochs: 1\n bad: 2\n", ("indent.yaml, line 3",)),
    "colons.yaml": (b"a: b: c\n", ("colons.yaml, line 1",)),
    "tab.yaml": (b"trainer:\n\tmax_epochs: 1\n", ("tab.yaml, line 2",)),
    "list.yaml": (b"- 1\n- 2\n", ("list.yaml, line 1", "a list")),
    "scalar.yaml": (b"text\n", ("scalar.yaml, line 1", "a single value")),
    "binary.yaml": (bytes(range(128, 256)), ("binary.yaml", "UTF-8")),
    "twice.yaml": (b"trainer: {max_epochs: 1}\ntrainer: {max_steps: 2}\n", ("twice.yaml, line 2", "line 1")),
}
# Configurations that the parser refuses: the line is that of the key.
PARSED: dict[str, tuple[str, tuple[str, ...]]] = {
    "top.yaml": ("# one\ntrainr:\n  max_epochs: 3\n", ("top.yaml, line 3", "trainer.max_epochs")),
    "key.yaml": ("trainer:\n  max_epoch: 3\n", ("key.yaml, line 2", "Did you mean trainer.max_epochs")),
    "type.yaml": ("trainer:\n  max_epochs: many\n", ("type.yaml, line 2", "give a whole number or null")),
    "class.yaml": (
        "model:\n  class_path: lightning_bpfree.demos.modules.Clasifier\n",
        ("class.yaml, line 1", "Did you mean Classifier"),
    ),
    "module.yaml": ("model:\n  class_path: no_such_module.Net\n", ("module.yaml, line 1", "no_such_module")),
    "rule.yaml": (
        "trainer:\n  callbacks+: [{class_path: ForwardGradiet}]\n",
        ("rule.yaml, line 2", "Did you mean ForwardGradient"),
    ),
    "argument.yaml": (
        "trainer:\n  callbacks+: [{class_path: ZerothOrder, init_args: {sgima: 1}}]\n",
        ("argument.yaml, line 2", "nearest: sigma"),
    ),
    "value.yaml": (
        "trainer:\n  callbacks+: [{class_path: ZerothOrder, init_args: {num_directions: few}}]\n",
        ("value.yaml, line 2", "num_directions='few': give a whole number"),
    ),
    "range.yaml": ("model:\n  init_args:\n    lr: -1\n", ("Classifier: lr=-1.0: give a positive number",)),
}
OPTIONS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "option": (["--trainr.max_epochs=3"], ("there is no option --trainr.max_epochs", "Did you mean --trainer")),
    "key": (["--trainer.max_epochz=3"], ("there is no option --trainer.max_epochz", "Did you mean --trainer.max_epo")),
    "value": (["--trainer.max_epochs=soon"], ("trainer.max_epochs='soon': give a whole number",)),
    "choice": (["--trainer.precision=17"], ("trainer.precision='17': give", "'bf16-mixed'")),
    "name": (["--trainer.callbacks+=ZerothOrdr"], ("ZerothOrdr", "Did you mean ZerothOrder")),
    "seed": (["--seed_everything=x"], ("seed_everything='x': give",)),
    "no-file": (["-c"], ("expected one argument",)),
}


def write_files(folder: Path) -> None:
    """Write all files that cases name, but not the base configuration."""
    for name, (content, _) in FILES.items():
        if content is not None:
            (folder / name).write_bytes(content)
    for name, (text, _) in PARSED.items():
        (folder / name).write_text(text)
    (folder / "folder.yaml").mkdir()
    (folder / "file").write_text("")
    raw = folder / "broken_data/FashionMNIST/raw"
    raw.mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (raw / f"{name}-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\x03" + bytes(40))[:-6])


def write_checkpoints(folder: Path, good: Path) -> None:
    """Write damaged copies of a checkpoint."""
    content = good.read_bytes()
    (folder / "empty.ckpt").write_bytes(b"")
    (folder / "half.ckpt").write_bytes(content[: len(content) // 2])
    (folder / "short.ckpt").write_bytes(content[:-30])
    (folder / "text.ckpt").write_text("no checkpoint\n")
    weights = content.index(b"/data/0")
    middle = content.index(b"FB", weights) + 80  # behind the padding before the numbers
    (folder / "flipped.ckpt").write_bytes(content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :])
    torch.save({"weights": torch.zeros(2)}, folder / "other.ckpt")
    torch.save(torch.zeros(2), folder / "tensor.ckpt")


def configuration_cases() -> list[Case]:
    """Return mistakes in the configuration, for every command that reads one."""
    found = []
    for command in READ_CONFIG:
        base, more = [command, "-c", "base.yaml"], NEEDED.get(command, [])
        repeated = command in ("validate", "test", "predict", "tickets")  # the same code as fit or check
        found += [Case(f"{command}-{n}", [*base, "-c", n, *more], said) for n, (_, said) in FILES.items()]
        found.append(Case(f"{command}-folder", [*base, "-c", "folder.yaml", *more], ("folder.yaml is a folder",)))
        found.append(Case(f"{command}-recipe", [command, "-c", "quikstart", *more], ("Did you mean quickstart",)))
        parsed = {n: said for n, (_, said) in PARSED.items() if n != "range.yaml" or command not in NEEDED}
        found += [Case(f"{command}-{n}", [*base, "-c", n, *more], said, repeated) for n, said in parsed.items()]
        found += [Case(f"{command}-{n}", [*base, *more, *o], said, repeated) for n, (o, said) in OPTIONS.items()]
    return found


def checkpoint_cases() -> list[Case]:
    """Return checkpoints that cannot be loaded."""
    faults = {
        "none.ckpt": ("there is no file none.ckpt",),
        "godo.ckpt": ("there is no file godo.ckpt", "good.ckpt"),
        "empty.ckpt": ("empty.ckpt is empty", "Give an earlier checkpoint"),
        "half.ckpt": ("half.ckpt is truncated", "Give an earlier checkpoint"),
        "short.ckpt": ("short.ckpt is truncated", "Give an earlier checkpoint"),
        "flipped.ckpt": ("flipped.ckpt is damaged", "Give an earlier checkpoint"),
        "text.ckpt": ("text.ckpt is not a checkpoint",),
        "other.ckpt": ("other.ckpt is not a checkpoint of Lightning", "state_dict"),
        "tensor.ckpt": ("tensor.ckpt is not a checkpoint of Lightning", "state_dict"),
        "folder.yaml": ("folder.yaml is a folder",),
    }
    return [
        Case(f"{command}-{name}", [command, "-c", "base.yaml", f"--ckpt_path={name}"], said, command != "fit")
        for command in TRAINER
        for name, said in faults.items()
    ]


def other_cases() -> list[Case]:
    """Return mistakes that belong to one command, to data and to folders."""
    found = [
        Case("command", ["fitt"], ("Did you mean fit",)),
        Case("command-far", ["xyz"], ("there is no such command",)),
        Case("recipes-action", ["recipes", "shwo"], ("Did you mean show",)),
        Case("recipes-name", ["recipes", "show", "quickstrt"], ("Did you mean quickstart",)),
        Case("recipes-option", ["recipes", "list", "--al"], ("unrecognized arguments: --al",)),
        Case("recipes-no-name", ["recipes", "show"], ("NAME",)),
        Case("recipes-unwritable", ["recipes", "copy", "quickstart", "file/x"], ("cannot write", "file/x")),
        Case("metrics-name", ["metrics", "ForwardGradiet"], ("Did you mean ForwardGradient",)),
        Case("metrics-option", ["metrics", "--rule"], ("unrecognized arguments",)),
        Case("completion-shell", ["completion", "bsh"], ("Did you mean bash",)),
        Case("completion-none", ["completion"], ("shell",)),
        Case("check-repeats", ["check", "-c", "base.yaml", "--repeats", "0"], ("--repeats 0: give 1 or more",)),
        Case("check-own-option", ["check", "-c", "base.yaml", "--repeat", "2"], ("Did you mean --repeats",)),
        Case("check-number", ["check", "-c", "base.yaml", "--repeats", "x"], ("--repeats", "'x'")),
        Case("check-no-config", ["check"], ("-c/--config",)),
        Case("fit-own-option", ["fit", "-c", "base.yaml", "--ckptpath=x"], ("Did you mean --ckpt_path",)),
        Case("fit-no-model", ["fit"], ("there is no model", "-c quickstart")),
        *(
            Case(f"{command}-empty-name", [command, "-c", "", *NEEDED.get(command, [])], ("is empty", "-c quickstart"))
            for command in READ_CONFIG
        ),
        Case("fit-stray", ["fit", "-c", "base.yaml", "more.yaml"], ("more.yaml", "-c more.yaml")),
        Case("fit-two-rules", [*_fit(), "-c", "rules/zeroth_order", "-c", "rules/backprop"], ("Two training rules",)),
    ]
    for name, option, said in (
        ("accelerator", "--trainer.accelerator=tpux", "tpux"),
        ("strategy", "--trainer.strategy=foo", "foo"),
        ("steps", "--trainer.max_steps=-7", "max_steps"),
        ("batches", "--trainer.limit_train_batches=7.5", "limit_train_batches"),
        ("batch-size", "--data.init_args.batch_size=0", "batch_size=0: give"),
        ("train-size", "--data.init_args.train_size=100000", "train_size is 100000"),
        ("network", "--model.init_args.net.init_args.in_features=3", "MLP was built for inputs of shape"),
        ("idx", "--data=lightning_bpfree.demos.data.FashionMNISTDataModule --data.data_dir=broken_data", "IDX file"),
        ("save-dir", "--trainer.logger.init_args.save_dir=file", "cannot write to the output folder"),
        ("root", "--trainer.logger=false --trainer.default_root_dir=file/x", "cannot write to the output folder"),
    ):
        found.append(Case(f"fit-{name}", [*_fit(), *option.split()], (said,)))
        if name in ("batch-size", "train-size", "network", "idx"):
            found.append(Case(f"check-{name}", ["check", "-c", "base.yaml", *option.split()], (said,), name == "idx"))
    return found + _compare_cases() + _tickets_cases()


def _fit() -> list[str]:
    return ["fit", "-c", "base.yaml"]


def _compare_cases() -> list[Case]:
    base = ["compare", "-c", "base.yaml"]
    ruled = [*base, "--rules", "rules/zeroth_order", "--out", "out"]
    lines: dict[str, tuple[list[str], str]] = {
        "epochs-0": ([*ruled, "--epochs", "0"], "--epochs 0: give 1 or more"),
        "epochs-minus": ([*ruled, "--epochs", "-1"], "--epochs -1: give 1 or more"),
        "epochs-text": ([*ruled, "--epochs", "many"], "--epochs"),
        "endless": ([*ruled, "--trainer.max_epochs=-1"], "trainer.max_epochs=-1: give --epochs N"),
        "no-epoch": ([*ruled, "--trainer.max_epochs=0"], "trainer.max_epochs=0: give --epochs N"),
        "seeds-twice": ([*ruled, "--seeds", "0", "0"], "--seeds: 0 is given more than once"),
        "seeds-negative": ([*ruled, "--seeds", "-3"], "--seeds -3: give whole numbers"),
        "seeds-text": ([*ruled, "--seeds", "a"], "--seeds"),
        "jobs": ([*ruled, "--jobs", "0"], "--jobs 0: give 1 or more"),
        "budget": ([*ruled, "--budget", "epoch"], "Did you mean epochs"),
        "option": ([*ruled, "--sedes", "0"], "Did you mean --seeds"),
        "no-rules": ([*base, "--out", "out"], "--rules"),
        "no-out": ([*base, "--rules", "rules/zeroth_order"], "--out"),
        "rules": ([*base, "--out", "out", "--rules", "rules/zeroth_ordr"], "Did you mean rules/zeroth_order"),
        "pattern": ([*base, "--out", "out", "--rules", "none*.yaml"], "no file matches the pattern"),
        "no-rule": ([*base, "--out", "out", "--rules", "loggers/csv"], "one training rule"),
        "tune-form": ([*ruled, "--tune", "model.init_args.lr"], "KEY=V1,V2"),
        "tune-key": ([*ruled, "--tune", "model.init_args.nonsense=1,2"], "error: --tune model.init_args.nonsense=1: "),
        "vary-key": ([*ruled, "--vary", "data.init_args.nonsense=1,2"], "error: --vary data.init_args.nonsense=1: "),
        "tune-label": ([*ruled, "--tune", "zo:model.init_args.lr=1,2"], "no rule has the label 'zo'"),
        "tune-curve": ([*ruled, "--tune-by", "curve"], "--curve"),
        "vary-form": ([*ruled, "--vary", "model.init_args.lr"], "KEY=V1,V2"),
        "vary-one": ([*ruled, "--vary", "model.init_args.lr=1"], "two or more values"),
        "reach": ([*ruled, "--reach", "0.5"], "--curve"),
        "reach-nan": ([*ruled, "--curve", "val_acc", "--reach", "nan"], "finite"),
        "unwritable": ([*ruled[:-1], "file/out"], "cannot write to the output folder"),
        "metric": ([*ruled, "--metric", "test_ac"], "Did you mean test_acc"),
        "curve": ([*ruled, "--curve", "val_ac"], "Did you mean val_acc"),
        "damaged": ([*ruled[:-1], "damaged"], "comparison.json is damaged"),
        "other": ([*ruled[:-1], "other"], "holds the results of another comparison"),
    }
    return [Case(f"compare-own-{name}", arguments, (said,)) for name, (arguments, said) in lines.items()]


def _tickets_cases() -> list[Case]:
    base = ["tickets", "-c", "base.yaml", "--out", "out"]
    study = ["tickets", "-c", "study.yaml", "--out", "out"]
    lines: dict[str, tuple[list[str], str]] = {
        "kinds": ([*base, "--kinds", "magnitud"], "Did you mean magnitude"),
        "seeds": ([*base, "--seeds", "a"], "--seeds"),
        "seeds-negative": ([*base, "--seeds", "-1"], "--seeds -1: give whole numbers"),
        "earlier": ([*study[:-1], "earlier"], "earlier holds the results of an earlier study"),
        "no-rule": (base, "one training rule"),
        "no-ticket": ([*base, "-c", "rules/zeroth_order"], "no LotteryTicket"),
        "option": ([*base, "--metrc", "x"], "Did you mean --metric"),
        "metric": ([*study, "--metric", "test_ac"], "does not log the metric test_ac"),
        "unwritable": ([*study[:-1], "file/out"], "cannot write to the output folder"),
        "first-kind": ([*study, "--kinds", "random", "snr"], "--kinds random"),
        "transfer": ([*study, "--transfer", "none.yaml"], "there is no file none.yaml"),
    }
    return [Case(f"tickets-own-{name}", arguments, (said,)) for name, (arguments, said) in lines.items()]


CASES = [*configuration_cases(), *checkpoint_cases(), *other_cases()]
