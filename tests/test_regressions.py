"""Bugs that other implementations have shipped, and the tests that keep them out: every line names its tests."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent

# what went wrong elsewhere -> file::test, or file::test[id] where one case of a table is meant
REGRESSIONS = {
    "p of the target near 1 (gaps of 3 to 16 nats): relative error of log-probs and of rows of dh": (
        "test_linear_logprob::test_op_against_fp64_on_planted_rows",
        "test_linear_logprob::test_oracles_notice_the_three_usual_mistakes",
    ),
    "all logits far below 0, and a common offset of 1e4": (
        "test_edges::test_edges_are_finite_and_right[all_logits_below_minus_120]",
        "test_edges::test_edges_are_finite_and_right[common_offset_1e4]",
        "test_edges::test_entropy_under_a_common_offset",
        "test_fused::test_edges[all_logits_below_minus_120]",
        "test_fused::test_edges[common_offset_1e4]",
    ),
    "|logit| > 65504": (
        "test_edges::test_edges_are_finite_and_right[logits_beyond_fp16]",
        "test_fused::test_edges[logits_beyond_fp16]",
    ),
    "V no multiple of a tile, V = 1, odd H": (
        "test_edges::test_edges_are_finite_and_right",
        "test_fused::test_edges",
        "test_fused::test_every_form_of_the_kernel[odd]",
        "test_gpu::test_real_heads_against_fp64[odd]",
    ),
    "every other column impossible (bias -inf), and a tile without a possible token": (
        "test_edges::test_edges_are_finite_and_right[bias_minus_inf_elsewhere]",
        "test_edges::test_a_first_tile_without_any_possible_token",
        "test_fused::test_edges[bias_minus_inf_in_the_first_block]",
    ),
    "labels -100 everywhere in a sequence or in the batch, an empty completion": (
        "test_edges::test_nothing_to_score",
        "test_rows_and_labels::test_ignored_tokens_among_the_scored_ones",
        "test_logprob::test_sequence_logprob",
    ),
    "upstream gradients of any sign and size, 0, None": (
        "test_linear_logprob::test_upstream_gradients_of_every_kind",
        "test_linear_logprob::test_op_against_fp64_on_planted_rows",
    ),
    "frozen hidden, frozen weight, both; no_grad; evaluation with a trainable head": (
        "test_linear_logprob::test_what_is_not_wanted_is_not_computed",
        "test_linear_logprob::test_float64_is_exact_on_every_path",
    ),
    "retain_graph twice, double backward": ("test_linear_logprob::test_upstream_gradients_of_every_kind",),
    "softcap under torch.compile": ("test_compile::test_compiled_is_eager_to_the_bit",),
    "N*V > 2^31, N >= 65536, a device that is not the current one": (
        "test_edges::test_more_tokens_and_logits_than_16_and_31_bits_count",
        "test_gpu::test_more_than_two_to_the_31_logits_in_all",
        "test_gpu::test_offsets_past_two_to_the_31_in_one_tensor",
        "test_gpu_graphs::test_a_device_that_is_not_current",
    ),
    "step-0 loss is ln 2 to the bit where policy is reference": (
        "test_linear_logprob::test_policy_and_reference_give_equal_bits",
        "test_fused::test_bits_depend_on_neither_tile_nor_path",
        "test_head_lora::test_an_adapter_that_adds_nothing_changes_no_bit",
    ),
    "a LoRA on lm_head gets gradients": (
        "test_head_lora::test_peft_s_own_layer_on_the_head_gives_the_same",
        "test_models::test_adapters_on_the_head_are_trained",
    ),
    "the same bits from run to run": (
        "test_linear_logprob::test_op_against_fp64_on_planted_rows",
        "test_gpu::test_real_heads_against_fp64",
    ),
}


@pytest.mark.parametrize("bug", REGRESSIONS)
def test_every_regression_has_its_tests(bug):
    assert REGRESSIONS[bug]
    for place in REGRESSIONS[bug]:
        module, _, name = place.partition("::")
        name, _, case = name.partition("[")
        (path,) = TESTS.glob(f"**/{module}.py")
        text = path.read_text()
        functions = {x.name for x in ast.walk(ast.parse(text)) if isinstance(x, ast.FunctionDef)}
        assert name in functions, place
        assert not case or f'"{case[:-1]}"' in text, place
