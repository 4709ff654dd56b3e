"""The prefix cache: found by the very tokens, within its budget, and of no effect on the text."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retnet_export.runtime.errors import UserError
from retnet_export.runtime.generate.engine import Engine
from retnet_export.runtime.generate.generation import Options
from retnet_export.runtime.generate.jobs import Job, Made, Read
from retnet_export.runtime.generate.state import Snapshot
from retnet_export.serve.cache import STRIDE, PrefixCache, bytes_of
from retnet_export.serve.store import Store, name_of


def mark(number: int) -> Snapshot:
    """A snapshot of 108 bytes that can be told from others."""
    return Snapshot("", {"position": np.array([number])}, None, np.zeros(25, np.int32))


SEQUENCES = st.lists(st.integers(0, 2), max_size=7)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["keep", "find"]), SEQUENCES), max_size=40), st.integers(0, 6))
def test_it_is_a_map_from_beginnings_that_forgets_what_was_used_longest_ago(steps, capacity):
    cache, expected = PrefixCache(108 * capacity), {}
    for number, (verb, tokens) in enumerate(steps):
        if verb == "keep":
            cache.keep(tokens, mark(number))
            if capacity and tokens:
                expected.pop(tuple(tokens), None)
                expected[tuple(tokens)] = number
                if len(expected) > capacity:
                    del expected[next(iter(expected))]
        else:
            beginnings = [tuple(tokens[:end]) for end in range(len(tokens), -1, -1)]
            best = next((each for each in beginnings if each in expected), None)
            length, snapshot = cache.find(tokens)
            if best is None:
                assert (length, snapshot) == (0, None)
            else:
                assert (length, snapshot.position) == (len(best), expected[best])
                expected[best] = expected.pop(best)
        assert cache.bytes == 108 * len(expected) == 108 * len(cache)
        assert [(tuple(each), kept.position) for each, kept in cache.entries()] == list(expected.items())[::-1]


def test_a_reply_that_was_cancelled_after_it_moved_to_another_slot_is_continued_as_it_would_have_gone_on(model):
    """The first sequence ends, the second takes its place, and its client goes away before the next step."""
    engine, made = Engine(model.session, 2, cache=PrefixCache(10**6)), {}
    jobs = [Job([number, 7], [Options(temperature=0.0, max_new_tokens=most, speculate=0)], with_text=False)
            for number, most in ((1, 12), (2, 40), (3, 1))]  # fmt: skip

    def turn():
        for event in engine.turn():
            if isinstance(event, Made):
                made.setdefault(event.job, []).append(event.piece.token)

    first, second, last = jobs
    for each in (first, second):
        engine.add(each)
        while each not in made:
            turn()
    while engine.generating == 2:
        turn()
    second.cancelled = True
    turn()
    last.tokens = [*second.tokens, *made[second][:-1]]
    engine.add(last)
    turn()
    assert made[last] == made[second][-1:]


def test_it_asks_for_snapshots_where_prompts_part_and_every_so_far():
    cache = PrefixCache(10**6)
    first = list(range(100))
    assert list(cache.wanted(first, 0)) == []
    cache.keep(first, mark(1))
    assert list(cache.wanted([*range(60), 7, 7], 0)) == [60]
    assert list(cache.wanted([*range(60), 7, 7], 60)) == []
    assert list(cache.wanted([*range(3), 7, 7], 0)) == []
    assert list(cache.wanted([9] * (3 * STRIDE + 1), 600)) == [2 * STRIDE, 3 * STRIDE]
    assert len(cache.wanted([9] * 100_000, 0)) <= 8


def run(engine, prompt, seed=0, **about):
    """Tokens, how many of the prompt's came from the cache, and how many were read."""
    before = engine.stats.prompt_tokens
    engine.add(Job(prompt, [Options(temperature=1.1, seed=seed, max_new_tokens=12)], with_text=False, **about))
    events = []
    while engine.busy:
        events += engine.turn()
    tokens = [event.piece.token for event in events if isinstance(event, Made)]
    return tokens, next(event.cached for event in events if isinstance(event, Read)), engine.stats.prompt_tokens - before


def test_a_hit_gives_the_same_text_as_none_and_reads_only_what_is_new(model):
    generator = np.random.default_rng(5)
    cached, plain = Engine(model.session, 2, cache=PrefixCache(10**8)), Engine(model.session, 2)
    talk, known_before = generator.integers(0, 50, 40).tolist(), 0
    for turn in range(6):
        expected, _, _ = run(plain, talk, seed=turn)
        tokens, known, read = run(cached, talk, seed=turn)
        assert tokens == expected
        # The reply's last token was never read.
        assert (known, read) == (known_before, len(talk) - known_before)
        known_before = len(talk) + len(tokens) - 1
        talk += [*tokens, *generator.integers(0, 50, 5).tolist()]


def test_the_same_prompt_again_is_not_read_at_all(model):
    engine, prompt = Engine(model.session, 2, cache=PrefixCache(10**8)), list(range(30))
    first = run(engine, prompt, seed=1)
    assert run(engine, prompt, seed=1) == (first[0], 30, 0)
    assert run(engine, prompt, seed=1, cached=False) == (first[0], 0, 30)


def test_the_beginning_of_all_prompts_is_read_twice_at_most_or_once_where_it_is_marked(model):
    shared = list(range(40))
    engine = Engine(model.session, 2, cache=PrefixCache(10**8))
    assert [run(engine, [*shared, 40 + each, 3])[1] for each in range(4)] == [0, 0, 40, 40]
    engine = Engine(model.session, 2, cache=PrefixCache(10**8))
    assert [run(engine, [*shared, 40 + each, 3], marks=[40])[1] for each in range(4)] == [0, 40, 40, 40]


def test_a_sequence_is_kept_in_a_folder_with_the_tokens_that_led_to_it(model, other_model, tmp_path):
    session, store = model.session(), Store(tmp_path / "states", model.bundle.manifest)
    session.feed([1, 2, 3, 2])
    snapshot = session.snapshot()
    store.save("talk", [1, 2, 3, 2], snapshot)
    tokens, loaded = store.load("talk")
    assert tokens == [1, 2, 3, 2]
    assert bytes_of(loaded) == bytes_of(snapshot)
    assert store.names() == ["talk"]
    with pytest.raises(UserError, match="a state of another model"):
        Store(store.folder, other_model.bundle.manifest).load("talk")
    np.save(store.folder / "talk.tokens.npy", np.array([1, 2, 2, 3]))
    (store.folder / "talk.tokens.npy").rename(store.folder / "talk.tokens")
    with pytest.raises(UserError, match="these tokens do not belong to the state"):
        store.load("talk")
    store.delete("talk")
    with pytest.raises(UserError, match="no saved state 'talk'; saved states: none"):
        store.load("talk")


@pytest.mark.parametrize("name", ["", ".", "..", "../talk", "a/b", "/etc/passwd", "a\x00b", "-x", "x" * 101, "a\nb", "ä"])
def test_a_name_never_leads_out_of_the_folder(model, tmp_path, name):
    store = Store(tmp_path / "states", model.bundle.manifest)
    for act in (store.load, store.delete, lambda name: store.save(name, [1], mark(1))):
        with pytest.raises(UserError, match="is not a name for a state"):
            act(name)
    assert list(tmp_path.rglob("*")) == [store.folder]


def test_names_of_tokens_differ_with_them():
    assert name_of([1, 2]) != name_of([1, 3]) != name_of([1])
