"""GroupSchedule: which example each group samples, as a pure function of the seed and the group's number."""

from hypothesis import given, settings
from hypothesis import strategies as st

from editrl.trainers.groups import GroupSchedule

sizes = st.integers(1, 12)
seeds = st.integers(0, 2**32)


def examples(schedule: GroupSchedule, groups) -> list[int]:
    return [schedule[group][1] for group in groups]


@settings(deadline=None)
@given(sizes, st.integers(1, 5), seeds)
def test_each_pass_meets_every_example_once(num_examples, passes, seed):
    schedule = GroupSchedule(num_examples, num_examples * passes, seed)
    for first in range(0, len(schedule), num_examples):
        assert sorted(examples(schedule, range(first, first + num_examples))) == list(range(num_examples))


@settings(deadline=None)
@given(sizes, st.integers(1, 40), seeds, st.data())
def test_a_group_is_decided_by_seed_and_number_alone(num_examples, num_groups, seed, data):
    """So a resumed run, which starts to ask in the middle, or a longer one meets the same groups."""
    expected = [GroupSchedule(num_examples, num_groups, seed)[group] for group in range(num_groups)]
    asked = data.draw(st.lists(st.integers(0, num_groups - 1), max_size=10))
    schedule = GroupSchedule(num_examples, num_groups + 5, seed)
    assert [schedule[group] for group in asked] == [expected[group] for group in asked]


def test_group_numbers_are_unique_also_where_examples_come_round_again():
    schedule = GroupSchedule(3, 10, seed=0)
    assert len(schedule) == 10
    assert [schedule[group][0] for group in range(10)] == list(range(10))


def test_passes_and_seeds_differ_in_their_order():
    schedule = GroupSchedule(50, 100, seed=1)
    first, second = examples(schedule, range(50)), examples(schedule, range(50, 100))
    assert first != second
    assert first != list(range(50))
    assert examples(GroupSchedule(50, 50, seed=2), range(50)) != first
