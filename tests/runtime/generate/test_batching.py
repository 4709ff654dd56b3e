"""A batch gives each prompt what it would get alone, whatever its neighbours do and whenever they end."""

from __future__ import annotations

import numpy as np
import pytest

from retnet_export.runtime.errors import UserError
from retnet_export.runtime.generate.batching import Prompt
from retnet_export.runtime.generate.generation import Options
from retnet_export.runtime.generate.stats import Stats

PROMPTS = [np.random.default_rng(index).integers(0, 50, length).tolist() for index, length in enumerate([1, 19, 4, 8, 9, 2, 30])]


def alone(model, prompt, options) -> list[int]:
    session = model.session()
    session.feed(prompt)
    return list(session.generate_tokens(options))


@pytest.mark.parametrize("batch", [1, 2, 3, 16])
@pytest.mark.parametrize(
    "options",
    [
        Options(temperature=0.0, max_new_tokens=9),
        Options(temperature=1.3, top_k=9, seed=5, max_new_tokens=9),
        Options(temperature=1.3, top_p=0.9, repetition_penalty=1.4, frequency_penalty=0.2, seed=6, max_new_tokens=9),
    ],
    ids=["greedy", "top-k", "penalties"],
)
def test_results_equal_single_runs(model, options, batch):
    prompts = [Prompt(prompt, max_new_tokens=3 + 4 * (index % 3), seed=index) for index, prompt in enumerate(PROMPTS)]
    completions = list(model.generate_many(prompts, options, batch=batch))
    assert [completion.index for completion in completions] == list(range(len(PROMPTS)))
    for completion, prompt in zip(completions, prompts, strict=True):
        assert completion.tokens == alone(model, prompt.text, options.changed(prompt.changes))
        assert completion.finish == "length"


def test_the_prompts_of_one_seed_have_seeds_of_their_own(model):
    completions = list(model.generate_many([[1, 2]] * 3, batch=2, seed=40, max_new_tokens=10))
    assert [completion.seed for completion in completions] == [40, 41, 42]
    assert len({tuple(completion.tokens) for completion in completions}) == 3
    assert completions[2].tokens == alone(model, [1, 2], Options(seed=42, max_new_tokens=10))


def test_a_prompt_that_ends_at_once_frees_its_slot_without_a_step(model):
    first = alone(model, [5], Options(temperature=0.0, max_new_tokens=1))[0]
    prompts = [
        Prompt([5], temperature=0.0, stop_tokens=[first]),
        Prompt([6], max_new_tokens=0),
        Prompt([7], temperature=0.0),
    ]
    stopped, empty, last = model.generate_many(prompts, batch=1, max_new_tokens=4)
    assert (stopped.tokens, stopped.finish) == ([], "stop")
    assert (empty.tokens, empty.finish) == ([], "length")
    assert last.tokens == alone(model, [7], Options(temperature=0.0, max_new_tokens=4))


def test_a_prompt_shares_the_options_that_it_does_not_bring(model):
    (completion,) = model.generate_many([Prompt([3, 1], temperature=0.0)], max_new_tokens=8)
    assert completion.tokens == alone(model, [3, 1], Options(temperature=0.0, max_new_tokens=8))
    assert len(completion.tokens) == 8


def test_a_text_or_bytes_instead_of_prompts_are_refused(model, writer):
    with pytest.raises(UserError, match=r"prompts is a single text, expected several: generate_many\(\[text\]\)"):
        model.generate_many("abc")
    with pytest.raises(UserError, match="prompt 0: the prompt is bytes"):
        list(writer.generate_many([b"abc"]))
    with pytest.raises(UserError, match="text is bytes, expected a str or token ids"):
        writer.session().feed(b"abc")


def test_an_option_that_is_misspelt_is_named_at_once(model):
    for call in (lambda: Prompt([1], temprature=0.0), lambda: model.generate_many([[1]], temprature=0.0)):
        with pytest.raises(TypeError, match="no option 'temprature'; did you mean 'temperature'"):
            call()
    session = model.session()
    session.feed([1])
    with pytest.raises(TypeError, match="no option 'temprature'"):
        session.generate(temprature=0.0)


def test_prompts_are_taken_one_by_one_so_there_may_be_any_number(model):
    taken = []

    def endless():
        for index in range(10**9):
            taken.append(index)
            yield [index % 50]

    completions = model.generate_many(endless(), batch=2, max_new_tokens=2, seed=1)
    for _ in range(5):
        next(completions)
    assert len(taken) <= 8


def test_all_prompts_may_come_after_a_text_that_is_read_once(model):
    session = model.session()
    session.feed([9, 9, 8])
    stats = Stats()
    options = Options(temperature=0.0, max_new_tokens=5)
    completions = list(model.generate_many([[1], [2, 3]], options, batch=2, after=session.snapshot(), stats=stats))
    assert [completion.tokens for completion in completions] == [
        alone(model, [9, 9, 8, 1], options),
        alone(model, [9, 9, 8, 2, 3], options),
    ]
    assert stats.prompt_tokens == 3
    assert stats.new_tokens == 10


def test_the_prompt_at_fault_is_named(model):
    with pytest.raises(UserError, match="prompt 1: token 99 is not in the vocabulary"):
        list(model.generate_many([[1], [99]], batch=1, max_new_tokens=1))
    with pytest.raises(UserError, match="prompt 0: the prompt is empty"):
        list(model.generate_many([[]]))
    with pytest.raises(UserError, match="batch is 0"):
        model.generate_many([[1]], batch=0)


def test_no_prompts_give_nothing(model):
    assert list(model.generate_many([])) == []


def test_a_slot_that_is_not_finite_is_reported_with_its_prompt(model):
    session = model.session()
    session.feed([1])
    poisoned = session.snapshot()
    poisoned.state["state.000"][:] = np.nan
    with pytest.raises(UserError, match=r"prompt 0: the logits after step 2 are not finite .* of layer 0"):
        list(model.generate_many([[1]], after=poisoned))
