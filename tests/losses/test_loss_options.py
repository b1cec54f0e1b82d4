"""Bad options of a loss get one sentence, from `LossOptions` and from the modules."""

import math

import pytest

from fastdpo.losses import LossOptions
from fastdpo.losses.modules import DPOLoss


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"loss_type": "sigmoi"},
            r"unknown loss 'sigmoi'; choose from sigmoid, hinge, .* Did you mean 'sigmoid'\?",
        ),
        ({"loss_type": "sigmoid", "beta": 0.0}, r"beta must be a number > 0, got 0.0"),
        (
            {"loss_type": "hinge", "label_smoothing": 0.1},
            r"'hinge' has no label smoothing.*to sigmoid, exo_pair, robust",
        ),
        ({"loss_type": "sigmoid", "label_smoothing": 0.5}, r"must be in \[0, 0.5\), got 0.5"),
        ({"loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0]}, r"1 numbers for 2 losses \(sigmoid, ipo\)"),
        ({"loss_type": []}, r"loss_type is empty"),
        ({"loss_type": None}, r"loss_type must be a name or a list of names, got None"),
        ({"loss_type": "sigmoid", "beta": math.inf}, r"beta must be a number > 0, got inf"),
        ({"loss_type": "sigmoid", "loss_weights": [-1.0]}, r"must be a list of numbers >= 0, .* got \[-1.0\]"),
        ({"loss_type": "sigmoid", "loss_weights": 1.0}, r"must be a list of numbers >= 0, .* got 1.0"),
        ({"discopop_tau": 0.0}, r"discopop_tau must be a number > 0, got 0.0"),
        ({"f_alpha_divergence_coef": None}, r"f_alpha_divergence_coef must be a number, got None"),
        ({"simpo_gamma": -0.5}, r"simpo_gamma must be a number >= 0, got -0.5"),
        ({"rpo_alpha": "1"}, r"rpo_alpha must be a number >= 0, got '1'"),
        ({"ld_alpha": 1.5}, r"ld_alpha must be in \[0, 1\], got 1.5; 1 is plain DPO"),
        (
            {"f_divergence_type": "reverse"},
            r"must be one of .*got 'reverse'. Did you mean 'reverse_kl'",
        ),
        ({"loss_type": [["sigmoid"]]}, r"loss_type must be a name or a list of names, got \[\['sigmoid'\]\]"),
        ({"cpo_alpha": None}, r"cpo_alpha must be a number >= 0, got None"),
        ({"use_weighting": "no"}, r"use_weighting must be True or False, got 'no'"),
        ({"aggregate": "avg"}, r"aggregate must be one of sum, mean, got 'avg'"),
        (
            {"loss_type": "simpo", "f_divergence_type": "forward_kl"},
            r"does not apply to the loss 'simpo'",
        ),
        ({"loss_type": "aot", "use_weighting": True}, r"weighs pairs, and the loss 'aot' sorts them"),
    ],
)
def test_bad_options_get_one_sentence(arguments, words):
    with pytest.raises(ValueError, match=words):
        LossOptions(**{"beta": 0.1, **arguments})
    with pytest.raises(ValueError, match=words):
        DPOLoss(**arguments)
