"""The kinds of stages that train: how each is built, and what it offers to a loss."""

from stagecraft.stages import (
    group,
    language_model,
    online,
    policy,
    preference,
    reward,
    unpaired,
)

MAKE = {
    "language_model": language_model.make,
    "reward": reward.make,
    "preference": preference.make,
    "unpaired_preference": unpaired.make,
    "online_preference": online.make,
    "policy": policy.make,
    "group_policy": group.make,
}
# The arrays that a loss of such a stage may ask for, and the places it may lie at.
OFFERS = {
    "language_model": language_model.OFFERS,
    "reward": reward.OFFERS,
    "preference": preference.OFFERS,
    "unpaired_preference": unpaired.OFFERS,
    "online_preference": preference.OFFERS,
    "policy": policy.OFFERS,
    "group_policy": policy.OFFERS,
}
PLACES = {
    "language_model": language_model.PLACES,
    "reward": reward.PLACES,
    "preference": preference.PLACES,
    "unpaired_preference": unpaired.PLACES,
    "online_preference": preference.PLACES,
    "policy": policy.PLACES,
    "group_policy": policy.PLACES,
}
