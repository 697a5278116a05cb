"""The kinds of stages that train: how each is built, and what it offers to a loss."""

from stagecraft.stages import (
    group_policy,
    language_model,
    online_preference,
    policy,
    preference,
    reward,
    unpaired_preference,
)

MAKE = {
    "language_model": language_model.make,
    "reward": reward.make,
    "preference": preference.make,
    "unpaired_preference": unpaired_preference.make,
    "online_preference": online_preference.make,
    "policy": policy.make,
    "group_policy": group_policy.make,
}
# The arrays that a loss of such a stage may ask for, and the places it may lie at.
OFFERS = {
    "language_model": language_model.OFFERS,
    "reward": reward.OFFERS,
    "preference": preference.OFFERS,
    "unpaired_preference": unpaired_preference.OFFERS,
    "online_preference": preference.OFFERS,
    "policy": policy.OFFERS,
    "group_policy": policy.OFFERS,
}
PLACES = {
    "language_model": language_model.PLACES,
    "reward": reward.PLACES,
    "preference": preference.PLACES,
    "unpaired_preference": unpaired_preference.PLACES,
    "online_preference": preference.PLACES,
    "policy": policy.PLACES,
    "group_policy": policy.PLACES,
}
