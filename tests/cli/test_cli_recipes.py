"""The shipped recipes: found, shown, copied, and each of them parses against the present signatures."""

from __future__ import annotations

import shlex
from importlib import resources
from pathlib import Path

import pytest
from shipped import recipe_of, shipped_rules

from lightning_bpfree.cli import main
from lightning_bpfree.cli.common import recipes
from lightning_bpfree.cli.common.configured import Blueprint
from lightning_bpfree.cli.common.preconditions import CommandError
from lightning_bpfree.demos.loading import idx

EXPECTED = {
    "quickstart",
    "loggers/csv",
    "loggers/wandb",
    "loggers/tensorboard",
    "papers/forward_gradient_random",
    *map(recipe_of, shipped_rules()),
}


MODELS = (
    "Classifier",
    "ControlModule",
    "ActorCritic",
    "LanguageModel",
    "DigitDiffusion",
    "RewardFineTuning",
    "Denoiser",
)

# Ensembles and analyses, which are no rules; overlays with these names bring a rule beside them.
NO_RULES = ("loggers/", "papers/ann_bp_ensemble", "papers/concept_backprop", "papers/dnarch")
WITH_RULE = ("/evolution_strategy", "/forward_forward")


def trains_by_backprop(name: str) -> bool:
    return name.startswith(NO_RULES) and not name.endswith(WITH_RULE)


def a_pipeline(folder: str) -> None:
    """Write an untrained model where a recipe expects the one that another recipe trains."""
    pytest.importorskip("diffusers")
    from lightning_bpfree.demos.diffusion_tasks.digit_diffusion import DigitDiffusion

    DigitDiffusion(folder, channels=(8, 16)).save(folder)


def test_the_recipes_are_there() -> None:
    assert set(recipes.names()) >= EXPECTED


def test_list_says_what_each_is(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["recipes"], ["recipes", "list"]):
        assert main(arguments) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == len(recipes.names())
        assert all(len(line.split(maxsplit=1)[1]) > 20 for line in lines)


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml", "recipes/quickstart.yaml", "./recipes/quickstart"])
def test_show_prints_the_file(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "show", name]) == 0
    assert capsys.readouterr().out == (recipes.folder() / "quickstart.yaml").read_text()


@pytest.mark.parametrize(
    ("name", "near"), [("quickstrt", "quickstart"), ("forward_gradient", "rules/forward_gradient")]
)
@pytest.mark.parametrize("action", ["show", "copy"])
def test_an_unknown_name_gets_the_nearest(
    action: str, name: str, near: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recipes", action, name, *(["."] if action == "copy" else [])]) == 2
    message = capsys.readouterr().err
    assert repr(name) in message
    assert f"Did you mean {near}" in message


def test_copy_overwrites_only_by_force(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "copy", "rules/zeroth_order", "new"]) == 0
    copied = folder / "new" / "zeroth_order.yaml"
    copied.write_text("mine")
    assert main(["recipes", "copy", "rules/zeroth_order", "new"]) == 2
    assert "--force" in capsys.readouterr().err
    assert copied.read_text() == "mine"
    assert main(["recipes", "copy", "rules/zeroth_order", "new", "--force"]) == 0
    assert copied.read_bytes() == recipes.find("rules/zeroth_order").read_bytes()


def test_copy_to_a_place_that_is_no_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "file").write_text("")
    assert main(["recipes", "copy", "quickstart", "file/there"]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_a_file_goes_before_a_recipe_of_its_name(folder: Path) -> None:
    assert recipes.resolve("quickstart") == str(recipes.find("quickstart"))
    (folder / "quickstart").write_text("trainer: {}")
    assert recipes.resolve("quickstart") == "quickstart"


def test_every_way_to_give_a_configuration_is_resolved() -> None:
    path = str(recipes.find("quickstart"))
    given = ["fit", "-c", "quickstart", "--config", "quickstart", "--config=quickstart", "--trainer.x=quickstart"]
    assert recipes.with_paths(given) == ["fit", "-c", path, "--config", path, f"--config={path}", given[-1]]
    assert recipes.resolve("{trainer: {max_epochs: 1}}") == "{trainer: {max_epochs: 1}}"


def test_an_installed_package_brings_them_inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = folder / "lightning_bpfree"
    (installed / "recipes").mkdir(parents=True)
    (installed / "recipes" / "quickstart.yaml").write_text("# inside\n")
    monkeypatch.setattr(resources, "files", lambda package: installed)
    assert recipes.names() == ["quickstart"]
    (installed / "recipes" / "quickstart.yaml").unlink()
    with pytest.raises(CommandError, match="install the package again"):
        recipes.folder()


@pytest.mark.parametrize(
    "name",
    # Of the studies' many overlays, half a second each.
    [
        pytest.param(name, marks=[pytest.mark.slow] if name.count("/") > 1 else [])
        for name in recipes.names()
        if not name.startswith("papers/baffle")  # of `bpfree federate`: see test_cli_federate.py
    ],
)
def test_each_recipe_parses_and_says_how_to_run_it(name: str, base: str) -> None:
    path = recipes.find(name)
    first, command = path.read_text().splitlines()[:2]
    assert first.startswith("# ")
    own, study = "\nmodel:" in path.read_text(), name.rpartition("/")[0]
    if study.count("/"):  # part of a study: an overlay of its recipe, or one of the rules to compare with it
        fitted, moved = f"# bpfree fit -c {study} -c {name}", f"# bpfree tickets -c {study} --transfer {name} --out "
        compared = f"# bpfree compare -c {study} --rules {name}"
        alone = own or trains_by_backprop(name)  # rather than one of several rules
        assert command.startswith(compared) or (alone and (command == fitted or command.startswith(moved)))
    else:
        words = shlex.split(command)
        assert words[:4] in (["#", "bpfree", "fit", "-c"], ["#", "bpfree", "tickets", "-c"])
        options = list(zip(words[3::2], words[4::2], strict=True))
        files = [word for option, word in options if option == "-c" and word != "mine.yaml"]
        assert files == [name], "the command runs this recipe"
    arguments = ["-c", str(path)]
    if not own or command.startswith(f"# bpfree tickets -c {study} "):  # brings a rule, and may bring its optimizer
        arguments = ["-c", base, *arguments]
    elif study.count("/"):
        arguments = ["-c", str(recipes.find(study)), *arguments]
    blueprint = Blueprint(arguments)  # checks every option against the signatures
    assert blueprint.config.model.class_path.endswith(MODELS)
    if "pipeline" in blueprint.config.model.init_args:
        a_pipeline(blueprint.config.model.init_args.pipeline)
    built = blueprint.build()
    assert len(built.rules) == (0 if trains_by_backprop(name) else 1)
    Path("again.yaml").write_text(blueprint.dump())
    assert Blueprint(["-c", "again.yaml"]).dump() == blueprint.dump()


@pytest.mark.slow  # three seconds each
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.parametrize("name", [name for name in recipes.names() if name.startswith("papers/dnarch")])
def test_the_sizes_of_each_recipe_can_meet_its_budget(name: str, folder: Path) -> None:
    """When a fit starts, its budget is compared with the smallest network that the sizes to learn allow."""
    text = recipes.find(name).read_text()
    if "FashionMNIST" in text and not Path(idx.FASHION_MNIST.system_folder).is_dir():
        pytest.skip("Debian's dataset-fashion-mnist is not installed")
    short = [f"--trainer.limit_{part}_batches=1" for part in ("train", "val", "test")]
    command = shlex.split(text.splitlines()[1])[2:]
    assert main([*command, "--trainer.max_epochs=1", "--trainer.log_every_n_steps=1", *short]) == 0
