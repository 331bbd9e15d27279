import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimkit.data.order import Order, Plan
from mimkit.errors import UserError


@given(
    length=st.integers(4, 60),
    micro_batch_size=st.integers(1, 4),
    world_size=st.integers(1, 3),
    grad_accum_steps=st.integers(1, 3),
    seed=st.integers(0, 5),
)
@settings(max_examples=40, deadline=None)
def test_processes_and_accumulation_steps_divide_each_step(
    length, micro_batch_size, world_size, grad_accum_steps, seed
):
    batch_size = micro_batch_size * world_size * grad_accum_steps
    if batch_size > length:
        with pytest.raises(UserError, match=f"{batch_size} is more than the {length} images"):
            Plan(length, batch_size, 1)
        return
    plans = [
        Plan(length, batch_size, 5, seed=seed, rank=rank, world_size=world_size, grad_accum_steps=grad_accum_steps)
        for rank in range(world_size)
    ]
    single = list(Order(Plan(length, batch_size, 5, seed=seed)))
    divided = [list(Order(plan)) for plan in plans]
    for step, batch in enumerate(single):
        micro_batches = [
            divided[rank][step * grad_accum_steps + part]
            for part in range(grad_accum_steps)
            for rank in range(world_size)
        ]
        assert [i for micro_batch in micro_batches for i in micro_batch] == batch


def test_repeated_augmentation():
    """Each image occurs three times in a row, each time with its own number; epochs have as many steps as without."""
    once, thrice = (list(Order(Plan(50, 12, 9, repeats=repeats))) for repeats in (1, 3))
    assert len(once) == len(thrice) == 9
    for epoch in (0, 1):
        places = [place for batch in thrice[4 * epoch : 4 * epoch + 4] for place in batch]
        first = [place[1] for batch in once[4 * epoch : 4 * epoch + 4] for place in batch]
        assert [index for _, index in places] == [index for index in first[:16] for _ in range(3)]
        assert [number for number, _ in places] == [3 * epoch + copy for _ in range(16) for copy in range(3)]
    everything = [place for batch in thrice for place in batch]
    assert len(set(everything)) == len(everything)


def test_batch_size_must_be_divisible():
    with pytest.raises(UserError, match="--batch-size 10 cannot be shared by 2 processes x 3"):
        Plan(100, 10, 1, world_size=2, grad_accum_steps=3)
