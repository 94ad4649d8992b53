from clipft.data.order import EpochPlan
from clipft.training.plan import smaller_batch


def test_few_steps_name_a_batch_that_gives_more():
    assert smaller_batch(EpochPlan(921, 921, 64, 1), epochs=5) == "--effective-batch-size 32 or "


def test_a_batch_that_is_already_small_is_not_named_again():
    assert smaller_batch(EpochPlan(40, 8, 8, 1), epochs=2) == ""
