"""Each line of `docs/limits.md` has a test that refuses, warns or shows what it says; or is said to have none."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ADVICE = ""  # a fact about training, or about machines that these tests do not have

SUITE = "foreign/suite/test_foreign_suite.py::test_trained_right_or_refused"
REPLAY = "foreign/test_limits_of_replay.py::test_"
REVERSIBLE = "methods/reversible_recompute/test_reversible_edges.py::test_"

# The first words of a line -> its test.
LINES = {
    "**Side effects outside": REPLAY + "side_effects_outside_of_the_module_repeat",
    "**A step that writes to parameters": SUITE,
    "If a step starts": REPLAY + "unseen_writes_between_rehearsals_are_noticed_at_the_next",
    "Class-level numbers": REPLAY + "side_effects_outside_of_the_module_repeat",
    "Finite differences see": REPLAY + "finite_differences_see_a_target_that_is_cut_from_the_graph",
    "Lazy layers are initialized": SUITE,
    "parameters that are in the optimizer": SUITE,
    "a step that itself computes": SUITE,
    "functions whose backward pass": SUITE,
    "data loaders of unequal lengths": (
        "training/test_uneven_ranks.py::test_uneven_numbers_of_batches_are_refused_at_once"
    ),
    "a step that takes an iterator": SUITE,
    "`.detach()`, `torch.no_grad()`": "foreign/test_foreign_refusals.py::test_stopped_gradients_stop_tangents",
    "Some layers have no forward-mode": SUITE,
    "You cannot differentiate an estimate": "core/test_params_and_injection.py::test_",
    "The error grows": "training/test_estimators.py::test_mean_cosine_is_that_of_theory",
    "A learning rate that suits": ADVICE,
    "Weight decay and momentum": SUITE,
    "Zeroth order in half precision": "training/test_bad_input.py::test_a_sigma_that_rounding_swallows",
    "`ForwardForward`, and forward gradients": SUITE,
    "The weights that `ForwardForward`": (
        "methods/forward_forward/test_forward_forward_predictions.py::test_a_checkpoint_predicts_again_by_install"
    ),
    "Under DDP, nonlinear functions": "training/test_two_ranks.py::test_losses_in_blocks_equal_one_process",
    "Under `ForwardForward`": ("methods/forward_forward/test_forward_forward_networks.py::test_alignment_says"),
    "Conversion changes": (
        "methods/reversible_recompute/test_reversible_recompute.py::test_the_converted_model_is_warned_of"
    ),
    "All converted layers": "methods/reversible_recompute/test_conversion_uses.py::test_layers_that_models_give_masks",
    "A stack has first derivatives only": REVERSIBLE + "derivatives_that_are_refused",
    "Random numbers of torch": REVERSIBLE + "foreign_random_numbers_are_caught_by_max_error",
    "Modules that change": REPLAY + "lists_of_modules_in_a_reversible_stack_grow_twice",
    "A branch may use tensors": "methods/reversible_recompute/test_reversible_container.py::test_lost_gradients",
    "CUDA streams": ADVICE,
    "The network learns": "methods/team_reinforce/test_team_bad_input.py::test_a_reward_is_of_one_call",
    "Some settings are biased": "methods/team_reinforce/test_team_identities.py::test_straight_through_is_biased",
    "Lateral weights need": "methods/team_reinforce/test_team_bad_input.py::test_lateral_weights_are_refused",
    "Dropout within the network": "methods/team_reinforce/test_team_map_propagation.py::test_a_network_that_runs_again",
    "Under DDP, ranks draw": "methods/team_reinforce/test_team_on_two_ranks.py::test_ranks_draw_different_noise",
    "Checkpoints contain eligibility traces": (
        "methods/team_reinforce/test_team_traces.py::test_traces_are_saved_and_restored"
    ),
    "Under `TeamReinforce`": ("methods/team_reinforce/test_team_in_a_fit.py::test_alignment_says"),
    "BatchNorm in training": "methods/evolution_strategy/test_evolution_routes.py::test_vectorised_populations",
    "Low-rank noise needs": "methods/evolution_strategy/test_evolution_fits.py::test_bad_arguments",
    "A population": "training/test_two_ranks.py::test_a_split_population_equals_one_process_bit_for_bit",
    "Under DDP, each rank sorts": "training/test_two_ranks.py::test_populations_on_data_of_each_rank_stay_together",
    "With `LotteryTicket`": "methods/lottery_ticket/test_lottery_levels.py::test_optimizers_and_schedules_begin_anew",
    "`bpfree tickets` uses": "cli/test_cli_tickets_plan.py::test_",
    "A resumed run is exact": "test_kill_and_resume.py::test_",
    "Every rank continues": "training/test_two_ranks.py::test_a_resume_goes_on_bit_for_bit_with_the_random_numbers",
    "CPU and CUDA generators": ADVICE,
    '`chunk_size="fastest"`': "training/test_estimators.py::test_the_chosen_chunk",
    "Resuming under another rule": "conformance.py::resuming_under_another_rule_is_said",
    "Only automatic optimization": SUITE,
    "`training_step` must return one loss": SUITE,
    "`ForwardGradient` refuses compiled": "foreign/test_foreign_modules.py::test_compiled_module_is_refused",
    "The callbacks also work in a Trainer": (
        "foreign/test_foreign_modules.py::test_trainer_and_module_of_pytorch_lightning"
    ),
    "`bpfree/forward_evals` counts": "training/test_estimators.py::test_what_a_rule_costs_is_counted",
    "On a CPU, peak memory": ADVICE,
}


def limits() -> list[str]:
    """Return the lines of the page, behind what is tested and what is not."""
    text = (ROOT / "docs/limits.md").read_text(encoding="utf-8")
    return re.findall(r"^- (.*)$", text[text.index("## Your training step") :], re.M)


@pytest.mark.parametrize("line", limits(), ids=lambda line: line[:40])
def test_each_line_has_a_test(line):
    (start,) = [start for start in LINES if line.startswith(start)]
    if LINES[start] == ADVICE:
        return
    path, name = LINES[start].split("::")
    assert f"def {name}" in (ROOT / "tests" / path).read_text(encoding="utf-8"), LINES[start]


def test_no_line_is_left_over():
    assert all(any(line.startswith(start) for line in limits()) for start in LINES)
