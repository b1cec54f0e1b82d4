"""Of several answers the best is chosen and the worst rejected, and one line says by what."""

import pytest

from fastdpo.data.errors import RowError
from fastdpo.data.formats import preference_from_row

ASK = [{"role": "user", "content": "1 + 2?"}]


def completion(response, **scores):
    return {"model": "m", "response": response, **scores}


def rated(**ratings):
    return {name: {"Rating": rating, "Rationale": "r"} for name, rating in ratings.items()}


FINE, OVERALL = "fine-grained_score", "overall_score"
NECTAR = "\n\nHuman: 1 + 2?\n\nAssistant: "
PKU = {"prompt": "1 + 2?", "response_0": "worst", "response_1": "best", "better_response_id": 1, "safer_response_id": 0}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {
                "instruction": "1 + 2?",
                "completions": [
                    completion("middle", **{FINE: 3.0, OVERALL: 10}),
                    completion("best", **{FINE: 4.5, OVERALL: 7}),
                    completion("worst", **{FINE: 1.25, OVERALL: 8}),
                ],
            },
            "in `completions` with the best `fine-grained_score`",
        ),
        (
            {
                "instruction": "1 + 2?",
                "completions": [completion("worst", **{OVERALL: 2}), completion("best", **{OVERALL: "7"})],
            },
            "in `completions` with the best `overall_score`",
        ),
        (
            {
                "instruction": "1 + 2?",
                "completions": [
                    completion("best", annotations=rated(helpfulness="4", honesty="N/A", truthfulness="5")),
                    completion("worst", annotations=rated(helpfulness="5", honesty="3")),
                ],
            },
            "in `completions` with the best mean `Rating`",
        ),
        (
            {
                "prompt": NECTAR,
                "answers": [
                    {"answer": text, "rank": rank} for text, rank in (("middle", 2), ("worst", 7), ("best", 1))
                ],
            },
            "in `answers` with the best `rank`",
        ),
        (
            {"instruction": "1 + 2?", "generations": ["worst", "middle", "best", "none"], "ratings": [1, 2, 5, None]},
            "best of `ratings`",
        ),
        ({"input": "1 + 2?", "generations": ["best", "worst"], "rating": [9.5, 9.0]}, "best of `rating`"),
        ({"messages": ASK, "generations": ["best", "worst"], "ratings": [2, 1]}, "best of `ratings`"),
        (PKU, "the response that `better_response_id` names"),
        ({**PKU, "better_response_id": None, "safer_response_id": 1}, "the response that `safer_response_id` names"),
    ],
)
def test_the_best_against_the_worst(row, said):
    record = preference_from_row(row)
    answers = [{"role": "assistant", "content": "best"}], [{"role": "assistant", "content": "worst"}]
    assert (record.prompt, record.chosen, record.rejected) == (ASK, *answers)
    (note,) = record.notes
    assert said in note.text
    assert not note.lost


def test_system_prompts_of_ranked_rows():
    row = {"instruction": "1 + 2?", "generations": ["a", "b"], "ratings": [2, 1], "system_prompt": "Add."}
    assert preference_from_row(row).prompt == [{"role": "system", "content": "Add."}, *ASK]
    scored = [completion(text, overall_score=score, custom_system_prompt="X") for text, score in (("a", 1), ("b", 2))]
    (note,) = preference_from_row({"instruction": "1 + 2?", "completions": scored}).notes
    assert "(the system prompts that the answers were sampled with are not used)" in note.text


def test_whole_nectar_dialogues_are_the_prompt():
    prompt = "\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant: "
    row = {"prompt": prompt, "answers": [{"answer": "D", "rank": 1}, {"answer": "E", "rank": 2}]}
    record = preference_from_row(row)
    assert [message["content"] for message in record.prompt if isinstance(message, dict)] == ["A", "B", "C"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"instruction": "?", "completions": [completion("a", score=1), completion("b", score=1)]},
            "`completions` are all equally good",
        ),
        ({"instruction": "?", "completions": [completion("a", score=1)]}, "has 1 scored answers; wanted at least 2"),
        (
            {"instruction": "?", "completions": [completion("a"), completion("b", score=1)]},
            "`completions[0]` has no score",
        ),
        (
            {"instruction": "?", "completions": [completion("a", score=1), completion("b", overall_score=1)]},
            "`completions` are scored in different ways (`overall_score`, `score`)",
        ),
        ({"instruction": "?", "completions": ["a", "b"]}, "`completions[0]` is not an object with `response`"),
        ({"instruction": "?", "completions": [completion("", score=1)]}, "`completions[0].response` is empty"),
        (
            {"instruction": "?", "completions": [completion("a", score="x")]},
            "`completions[0].score` is 'x'; wanted a number",
        ),
        (
            {"instruction": "?", "completions": [completion("a", score=float("nan"))]},
            "`completions[0].score` is nan; wanted a number",
        ),
        ({"prompt": "?", "answers": [{"answer": "a"}]}, "`answers[0]` is not an object with `answer` and `rank`"),
        ({"answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}]}, "has answers but no question"),
        ({"instruction": "?", "generations": ["a", "b"]}, "has `generations` but no `ratings`"),
        ({"instruction": "?", "generations": ["a", "b"], "ratings": [1]}, "`generations` has 2 texts and `ratings` 1"),
        ({"instruction": "?", "generations": ["a", "b"], "ratings": [3, 3]}, "`generations` are all equally good"),
        ({**PKU, "better_response_id": 2}, "`better_response_id` is 2; wanted 0 or 1"),
        ({**PKU, "response_1": None}, "`response_1` is null"),
    ],
)
def test_rows_without_a_best_and_a_worst(row, said):
    with pytest.raises(RowError) as caught:
        preference_from_row(row)
    assert said in str(caught.value)
