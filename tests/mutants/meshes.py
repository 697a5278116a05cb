"""Mistakes in what lies on which device of a mesh."""

from tests.mutants.mutant import in_file

MUTANTS = (
    *in_file(
        "stagecraft/models/attention.py",
        "tests/models/attention_test.py -k each_device",
        (
            "every part of a row is its first",
            "jax.lax.axis_index('context') * query.shape[1]",
            "0 * query.shape[1]",
        ),
        ("windows of a part reach too far", "apart < window", "apart <= window"),
    ),
    *in_file(
        "stagecraft/models/blockwise.py",
        "tests/models/attention_test.py -k part_of",
        (
            "blocks as if the part began the row",
            "marks[2] + row * block",
            "row * block",
        ),
        (
            "the segments of the row's beginning",
            "jax.lax.dynamic_slice_in_dim(segments, start, t, axis=1)",
            "segments[:, :t]",
        ),
    ),
    *in_file(
        "stagecraft/models/experts.py",
        "tests/models/families_test.py -k mesh",
        (
            "every device has the first experts",
            "chosen - jax.lax.axis_index('expert') * gate.shape[0]",
            "chosen",
        ),
        (
            "experts elsewhere count here",
            "(chosen >= 0) & (chosen < groups)",
            "chosen < groups",
        ),
    ),
    *in_file(
        "stagecraft/sharding.py",
        "tests/sharding_test.py",
        (
            "groups of devices are side by side within an axis",
            "[axis for place in range(count) for axis in (place, place + count)]",
            "[axis for place in range(count) for axis in (place + count, place)]",
        ),
        (
            "any number of groups is the number of slices",
            "slices not in (1, product)",
            "False",
        ),
    ),
    *in_file(
        "stagecraft/stages/stage.py",
        "tests/stages/offload_test.py",
        (
            "programs are lowered as if all lay on the devices",
            "in_host_memory(shapes) if sharding.HOST in kinds else shapes",
            "shapes",
        ),
        (
            "the moments stay on the devices",
            "state._replace(opt_state=in_host_memory(state.opt_state))",
            "state",
        ),
        (
            "a model in two roles is two",
            "{role.removesuffix('_from'): models[name]"
            " for role, name in names.items()}",
            "{role.removesuffix('_from'): jax.tree.map(jnp.copy, models[name])"
            " for role, name in names.items()}",
        ),
    ),
    *in_file(
        "stagecraft/stages/checks.py",
        "tests/lengths_test.py -k context",
        ("rows that context does not divide", "if tokens % parts:", "if False:"),
    ),
)
